"""Zero-shot classification: class names become vectors, images take the nearest (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
from jaxtyping import Float

from clipkit.classification.labels import LabelSet, as_label_set
from clipkit.core import ClipkitError, did_you_mean
from clipkit.storage import Cache, hash_of

__all__ = ["PROMPTS", "cached_prompts", "class_vectors", "prompt_set"]

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
        from clipkit.models import openai_templates  # imports torch

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


EmbedTexts = Callable[[Sequence[str]], np.ndarray]


def class_vectors(
    labels: LabelSet | Sequence[str], prompts: Sequence[str], embed_texts: EmbedTexts
) -> Float[np.ndarray, "labels dim"]:
    """One unit vector per class: each text embedded and normalised, averaged, normalised again.

    Args:
        labels: the classes, or their names.
        prompts: templates with ``{}``, for those that have none of their own.
        embed_texts: gives unit-norm float32 ``[n, dim]``.

    Raises:
        ClipkitError: where there are no labels, or one is empty or stands twice.
    """
    texts = [label.texts(prompts) for label in as_label_set(labels).labels]
    vectors = embed_texts([text for of_label in texts for text in of_label])
    ends = np.cumsum([len(of_label) for of_label in texts])
    means = np.stack([part.mean(axis=0) for part in np.split(vectors, ends[:-1])])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def cached_prompts(given: str | Sequence[str], cache: Cache) -> Sequence[str]:
    """As `clipkit.classification.prompt_set`; templates that another library ships, which takes seconds to import, are
    kept. Templates that are given themselves stay as they are."""
    if not isinstance(given, str):
        return given
    if given != "openai80":
        return prompt_set(given)
    key = hash_of(given, version("open_clip_torch"))
    templates = cache.fact(key)
    if templates is None:
        templates = prompt_set(given)
        cache.keep_fact(key, templates)
    return templates
