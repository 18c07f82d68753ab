"""Zero-shot classification: class names become vectors, images take the nearest (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from clipkit.artifact import kind_of
from clipkit.embeddings import Embedded, Embeddings
from clipkit.encoding import embed_source
from clipkit.errors import ClipkitError, did_you_mean
from clipkit.sources import Sample, Source, open_source
from clipkit.towers import DualEncoder, openai_templates

__all__ = ["PROMPTS", "class_vectors", "classify", "probabilities", "prompt_set"]

PROMPTS: dict[str, tuple[str, ...]] = {
    "default": ("{}", "a photo of a {}."),
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
}


def prompt_set(name: str) -> list[str]:
    """A set of templates by name (``default``, ``plain``, ``photo``, ``openai80``), or one's own, separated by ``|``.

    Raises:
        ClipkitError: for an unknown name, or a template without ``{}``.
    """
    if name == "openai80":
        return openai_templates()
    if name in PROMPTS:
        return list(PROMPTS[name])
    if "{}" in name:
        templates = [part.strip() for part in name.split("|")]
        wrong = [t for t in templates if "{}" not in t]
        if not wrong:
            return templates
        raise ClipkitError(f"the prompt {wrong[0]!r} has no {{}} for the class name")
    known = [*PROMPTS, "openai80"]
    raise ClipkitError(
        f"no prompt set {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}, or give templates with {{}}"
    )


def class_vectors(
    model: DualEncoder,
    labels: Sequence[str],
    prompts: Sequence[str],
    embed_texts: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> Float[np.ndarray, "labels dim"]:
    """One unit vector per class: each prompt embedded and normalised, averaged, normalised again.

    Args:
        model: gives the text embeddings; every prompt is encoded once.
        labels: class names, at least one, none twice.
        prompts: templates with ``{}``.
        embed_texts: embeds in place of the model's own `embed_texts`, such as one that divides texts among ranks.

    Raises:
        ClipkitError: where there are no labels, or one is empty or stands twice.
    """
    if not labels:
        raise ClipkitError("no labels are given")
    for label in labels:
        if not label.strip():
            raise ClipkitError("a label is empty")
        if list(labels).count(label) > 1:
            raise ClipkitError(f"the label {label!r} is given twice")
    texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
    vectors = (embed_texts or model.embed_texts)(texts).reshape(len(labels), len(prompts), -1).mean(axis=1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def probabilities(cosines: Float[np.ndarray, "n classes"], scale: float) -> Float[np.ndarray, "n classes"]:
    """Softmax of the scaled cosines, in float64."""
    logits = cosines.astype(np.float64) * scale
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


def classify(
    source: str | Path | Source | Embeddings,
    labels: Sequence[str],
    model: DualEncoder,
    *,
    prompts: Sequence[str] = PROMPTS["default"],
    top: int = 5,
    batch_size: int = 64,
    show: str | None = None,
) -> list[dict[str, Any]]:
    """Say for every image of a source which of the names fits best.

    Args:
        source: a folder, list, shards, or embeddings (then no image is encoded again).
        labels: the class names.
        model: for texts and images alike.
        prompts: templates with ``{}``, see `prompt_set`.
        top: how many classes to list in ``top``.
        batch_size: images at a time.
        show: title of a progress bar.

    Returns:
        One row per image in source order: ``path``, ``label``, ``score`` (cosine), ``probability`` (softmax over the
        labels at the model's own scale), ``margin`` (to the second's probability), ``top`` (labels with probability),
        ``status`` (``ok``, or ``unreadable`` with the reason in ``reason``).

    Raises:
        ClipkitError: where the embeddings come from another model, or labels are wrong.
    """
    vectors = class_vectors(model, labels, prompts)
    images, paths, left_out = _images(source, model, batch_size, show)
    cosines = images @ vectors.T
    shares = probabilities(cosines, float(model.logit_scale.detach().float().exp()))
    rows: dict[int, dict[str, Any]] = {}
    for (number, path), cosine, share in zip(paths, cosines, shares, strict=True):
        order = np.argsort(-share, kind="stable")
        best = int(order[0])
        rows[number] = {
            "path": path,
            "label": labels[best],
            "score": float(cosine[best]),
            "probability": float(share[best]),
            "margin": float(share[best] - share[order[1]]) if len(labels) > 1 else 1.0,
            "top": [[labels[i], float(share[i])] for i in order[:top]],
            "status": "ok",
            "reason": None,
        }
    nothing = {"label": None, "score": None, "probability": None, "margin": None, "top": []}
    for line in left_out:
        rows[line["row"]] = {"path": line["key"], **nothing, "status": "unreadable", "reason": line["reason"]}
    return [rows[number] for number in sorted(rows)]


def _images(
    source: str | Path | Source | Embeddings, model: DualEncoder, batch_size: int, show: str | None
) -> tuple[np.ndarray, list[tuple[int, str]], list[dict[str, Any]]]:
    if isinstance(source, str | Path):
        is_embeddings = Path(source).is_dir() and kind_of(Path(source)) == "embeddings"
        source = Embeddings.open(source) if is_embeddings else open_source(source)
    if isinstance(source, Embeddings):
        if source.fingerprint != model.fingerprint():
            raise ClipkitError(
                f"{source.folder} was embedded with model {source.fingerprint[:12]}, you classify with "
                f"{model.fingerprint()[:12]}; name the first with --model"
            )
        paths = source.table("image")["image_path"].to_pylist()
        left_out = [{**line, "row": len(paths) + at} for at, line in enumerate(source.ledger())]
        return source.vectors("image"), list(enumerate(paths)), left_out
    found: Embedded = embed_source(source, model, sides=["image"], batch_size=batch_size, show=show)
    return (
        found.image,
        [(row, _path(s)) for row, s in zip(found.rows, found.samples, strict=True)],
        found.left_out,
    )


def _path(sample: Sample) -> str:
    return str(sample.columns.get("path", sample.key))
