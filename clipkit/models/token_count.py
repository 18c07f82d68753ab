"""How long texts are in a model's tokens, without building its towers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.core import ClipkitError, did_you_mean, read_json
from clipkit.models.loading import download
from clipkit.models.model_spec import model_folder

__all__ = ["TokenCounter", "token_counter"]


@dataclass(frozen=True)
class TokenCounter:
    """A model's tokenizer, for counting."""

    count: Callable[[Sequence[str]], list[int]]
    """Texts to their numbers of tokens, those of beginning and end among them, none cut."""
    context_length: int
    """Where the model cuts."""
    name: str


def token_counter(spec: str | None = None) -> TokenCounter:
    """The tokenizer of a model; no weights are read.

    Args:
        spec: what `clipkit.models.load_model` takes, and ``open_clip:NAME`` without weights; None for open_clip's own
            byte-pair encoding of 49,408 tokens with a context of 77.

    Raises:
        ClipkitError: where there is no such model, or its tokenizer is broken.
    """
    if spec is None:
        return _of_openclip({"text_cfg": {}}, None, None, "open_clip's CLIP tokenizer")
    folder = model_folder(spec)
    if folder is None and spec.startswith("open_clip:"):
        import open_clip

        name = spec.removeprefix("open_clip:").partition("/")[0]
        config = open_clip.get_model_config(name)
        if config is None:
            raise ClipkitError(f"open_clip has no model {name!r}{did_you_mean(name, open_clip.list_models())}")
        return _of_openclip(config, name, None, spec)
    if folder is None and spec.startswith("hf:"):
        folder = download(spec.removeprefix("hf:"), ["*.json", "*.txt", "*.model"])
    if folder is not None and (folder / "open_clip_config.json").is_file():
        return _of_openclip(read_json(folder / "open_clip_config.json").get("model_cfg"), None, folder, spec)
    if folder is not None and (folder / "config.json").is_file():
        from clipkit.models.huggingface import load_huggingface_tokenizer

        tokenizer = load_huggingface_tokenizer(folder)
        return TokenCounter(lambda texts: _count(tokenizer.tokenizer, texts), tokenizer.context_length, spec)
    raise ClipkitError(f"no such model: {spec}; name a run or model folder, open_clip:NAME/TAG, or hf:ORG/NAME")


def _of_openclip(model_cfg: Any, name: str | None, folder: Path | None, spec: str) -> TokenCounter:
    from clipkit.models.openclip import load_openclip_tokenizer

    if not isinstance(model_cfg, dict) or "text_cfg" not in model_cfg:
        raise ClipkitError(f"{folder}: open_clip_config.json lacks model_cfg with text_cfg")
    tokenizer: Any = load_openclip_tokenizer(model_cfg, name, folder)
    if hasattr(tokenizer, "encode"):  # the byte-pair encoding, which leaves out beginning and end
        return TokenCounter(lambda texts: [len(tokenizer.encode(t)) + 2 for t in texts], tokenizer.context_length, spec)

    def count(texts: Sequence[str]) -> list[int]:
        return _count(tokenizer.tokenizer, [tokenizer.clean_fn(text) for text in texts])

    return TokenCounter(count, tokenizer.context_length, spec)


def _count(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    if not texts:
        return []
    return [len(row) for row in tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]]
