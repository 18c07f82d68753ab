"""What people ask with: texts, images and vectors, wanted or not, one by one or from a file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from clipkit.core import ClipkitError, did_you_mean
from clipkit.models import DualEncoder
from clipkit.search.query import QueryPart

__all__ = ["Question", "open_questions"]

FIELDS = ("text", "image", "vector", "minus", "minus_image")


@dataclass(frozen=True)
class Question:
    """One question; any of its parts may be missing, but not all.

    Raises:
        ClipkitError: where there is nothing to ask with, or another number of weights than of parts.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    vectors: tuple[Path | tuple[float, ...], ...] = ()
    minus: tuple[str, ...] = ()
    minus_image: tuple[Path, ...] = ()
    weights: tuple[float, ...] | None = None
    """Of all parts in the order above; those of what is unwanted count as negative. None for 1 each."""

    def __post_init__(self) -> None:
        count = len(self.texts) + len(self.images) + len(self.vectors) + len(self.minus) + len(self.minus_image)
        if not count:
            raise ClipkitError('ask with a text, an --image or a --vector: clipkit search INDEX "a red heart"')
        if self.weights is not None and len(self.weights) != count:
            raise ClipkitError(f"the question has {count} parts and {len(self.weights)} weights; give one for each")

    @property
    def needs_model(self) -> bool:
        """Whether there is anything to embed."""
        return bool(self.texts or self.images or self.minus or self.minus_image)

    @property
    def told(self) -> str:
        """The question in a line."""
        wanted = [*self.texts, *(str(path) for path in self.images)]
        wanted += [str(given) if isinstance(given, Path) else "a vector" for given in self.vectors]
        unwanted = [*self.minus, *(str(path) for path in self.minus_image)]
        return " + ".join(wanted) + "".join(f" - {each}" for each in unwanted)

    def parts(self, model: DualEncoder | None) -> list[QueryPart]:
        """The vectors and their weights.

        Raises:
            ClipkitError: where an image or a vector cannot be read.
        """
        vectors = [*self._embedded(model, self.texts, self.images), *(_vector(given) for given in self.vectors)]
        signs = [1.0] * len(vectors)
        vectors += self._embedded(model, self.minus, self.minus_image)
        signs += [-1.0] * (len(vectors) - len(signs))
        weights = self.weights or (1.0,) * len(vectors)
        return [QueryPart(vector, sign * weight) for vector, sign, weight in zip(vectors, signs, weights, strict=True)]

    def _embedded(self, model: DualEncoder | None, texts: Sequence[str], images: Sequence[Path]) -> list[np.ndarray]:
        if model is None or not (texts or images):
            return []
        vectors = list(model.embed_texts(texts))
        for path in images:
            if not path.is_file():
                raise ClipkitError(f"no such image: {path}")
            try:
                vectors.append(model.embed_images([path])[0])
            except ClipkitError as error:
                raise ClipkitError(f"{path}: {error}") from error
        return vectors


def _vector(given: Path | tuple[float, ...]) -> np.ndarray:
    if isinstance(given, tuple):
        return np.array(given, np.float32)
    try:
        vector = np.load(given)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ClipkitError(f"cannot read {given}: it is no .npy file of numbers ({error})") from error
    if not isinstance(vector, np.ndarray):
        raise ClipkitError(f"{given} is an archive of arrays; save one vector as .npy")
    if vector.ndim == 2 and len(vector) == 1:
        vector = vector[0]
    if vector.ndim != 1 or not np.issubdtype(vector.dtype, np.number):
        raise ClipkitError(f"{given} holds an array of shape {vector.shape}; one vector is needed")
    return vector.astype(np.float32)


def open_questions(path: Path) -> list[Question]:
    """Questions of a file: a text a line, or, where its name ends in ``.jsonl``, an object a line.

    Raises:
        ClipkitError: naming the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ClipkitError(f"cannot read {path}: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)) if path.suffix == ".jsonl" else Question((line,)))
            except (ValueError, ClipkitError) as error:
                raise ClipkitError(f"{path}, line {number}: {error}") from error
            except (TypeError, KeyError, OverflowError) as error:
                raise ClipkitError(
                    f"{path}, line {number}: a question has texts, paths of images, and vectors and weights of numbers "
                    f"({error})"
                ) from error
    if not questions:
        raise ClipkitError(f"{path} holds no question")
    return questions


def _question(given: Any) -> Question:
    if not isinstance(given, dict):
        raise ClipkitError('a question is an object, such as {"text": "a red heart"}')
    for name in given:
        if name not in (*FIELDS, "weights"):
            raise ClipkitError(
                f"no field {name!r} in a question{did_you_mean(name, FIELDS)}; there are {', '.join(FIELDS)}"
            )
    texts, images, _, minus, minus_images = (_listed(given.get(name)) for name in FIELDS)
    vectors = given.get("vector") or []
    if vectors and not isinstance(vectors[0], list):
        vectors = [vectors]
    return Question(
        tuple(str(each) for each in texts),
        tuple(Path(each) for each in images),
        tuple(tuple(float(number) for number in each) for each in vectors),
        tuple(str(each) for each in minus),
        tuple(Path(each) for each in minus_images),
        tuple(float(each) for each in given["weights"]) if "weights" in given else None,
    )


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
