"""Images to be classified, from wherever their embeddings come, and the rows that come of it."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipkit.core import ClipkitError
from clipkit.data.sources import Globs, Sample, Source, open_source
from clipkit.decisions import CHUNK, OK, STATUSES, Decisions, Rule, decide, joined
from clipkit.embedding import Embeddings, cached_images, cached_texts, stored_kind
from clipkit.labels import LabelSet, as_label_set
from clipkit.metrics import inner_products, on_grid
from clipkit.models import LazyModel, beside_background, fused, probabilities, refuse_another
from clipkit.storage import Cache
from clipkit.zeroshot import PROMPTS, class_vectors

if TYPE_CHECKING:
    from clipkit.models import DualEncoder

__all__ = [
    "Classifier",
    "Images",
    "classify",
    "classify_images",
    "open_images",
    "rows_of",
    "summary",
    "zero_shot",
]

NOTHING = {"label": None, "score": None, "probability": None, "margin": None, "top": []}


@dataclass(frozen=True)
class Images:
    """Embeddings of images by one or several models, and how each image is called."""

    paths: Sequence[str]
    """Of the images, relative to the source."""
    block: Callable[[int, slice], np.ndarray]
    """Unit-norm embeddings by the model of this number, of these images, float16 or float32 ``[n, dim]``."""
    unreadable: Sequence[dict[str, Any]] = ()
    """Ledger lines of what has no embedding: ``row``, ``key``, ``reason``."""
    rows: Sequence[int] | None = None
    """The source's row of each image; None where they stand in the order of their paths."""

    @classmethod
    def of_source(
        cls, source: Source, models: Sequence[LazyModel], cache: Cache, *, batch_size: int = 64, show: str | None = None
    ) -> "Images":
        """Embed the images of a source with each model, or take what the cache holds."""
        found = [cached_images(source, model, cache, batch_size=batch_size, show=show) for model in models]
        first = found[0]
        for other in found[1:]:
            if other.rows != first.rows:
                raise ClipkitError(f"{source.spec} was changed while it was read; run this again")
        unreadable = [*source.problems, *first.left_out]
        vectors = [each.image for each in found]
        return cls([_path(s) for s in first.samples], lambda number, at: vectors[number][at], unreadable, first.rows)

    @classmethod
    def of_embeddings(cls, embeddings: Embeddings, model: LazyModel, globs: Globs | None = None) -> "Images":
        """Embeddings as they are on the disk, those of images whose path passes."""
        refuse_another(embeddings.manifest, embeddings.folder, model.spec, model.facts.fingerprint)
        if "image" not in embeddings.sides:
            raise ClipkitError(f"{embeddings.folder} has no image embeddings; it has {' and '.join(embeddings.sides)}")
        paths = [path for table in embeddings.tables() for path in table["image_path"].to_pylist()]
        vectors = np.concatenate(list(embeddings.blocks("image")))
        embeddings.refuse_changed()
        ledger = embeddings.ledger()
        if globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            paths, vectors = [paths[at] for at in kept], vectors[kept]
            ledger = [line for line in ledger if globs.passes(line["key"])]
        return cls(paths, lambda _, at: vectors[at], ledger)

    @classmethod
    def of_index(
        cls, folder: str | Path, model: LazyModel, where: str | None = None, globs: Globs | None = None
    ) -> "Images":
        """The images that an index holds, or those of them that a condition holds for and whose path passes."""
        from clipkit.search import Index

        index = Index.open(folder)
        refuse_another(index.manifest, index.folder, model.spec, model.facts.fingerprint)
        positions = index.positions("image", where)
        paths = [str(path) for path in index.column("image_path", positions)]
        if globs:
            kept = [at for at, path in enumerate(paths) if globs.passes(path)]
            positions, paths = positions[kept], [paths[at] for at in kept]
        return cls(paths, lambda _, at: index.vectors(positions[at]))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, at: int, source: Any, root: Path) -> bytes:
        """The bytes of an image.

        Args:
            at: its number.
            source: that they come from, opened; of embeddings and an index it is not asked.
            root: where the paths of those start.

        Raises:
            BadSample: where it cannot be read.
        """
        return (Sample("", root / self.paths[at], "") if self.rows is None else source[self.rows[at]]).read()


def open_images(
    source: str | Path | Source | Embeddings,
    models: Sequence[LazyModel],
    cache: Cache,
    *,
    where: str | None = None,
    globs: Globs | None = None,
    batch_size: int = 64,
    show: str | None = None,
) -> Images:
    """Open whatever it is: a folder, a list, shards, embeddings or an index.

    Args:
        source: by name, or opened.
        models: that embed it; embeddings and an index have been embedded by one, which is refused unless it is that.
        cache: of what was embedded before.
        where: a condition on an index's metadata.
        globs: which images, by path; an opened source has its own.
        batch_size, show: see `cached_images`.

    Raises:
        ClipkitError: where it cannot be opened, or was made with another model.
    """
    kind = stored_kind(source) if isinstance(source, str | Path) else None
    if where is not None and kind != "index":
        raise ClipkitError(f"--where is a condition on what an index says of its images; {source} is none")
    if kind is not None or isinstance(source, Embeddings):
        if len(models) > 1:
            raise ClipkitError(f"{source} was embedded by one model; several need the images themselves")
        if kind == "index":
            return Images.of_index(source, models[0], where, globs)  # type: ignore[arg-type]
        opened = source if isinstance(source, Embeddings) else Embeddings.open(source)  # type: ignore[arg-type]
        return Images.of_embeddings(opened, models[0], globs)
    files = open_source(source, globs=globs) if isinstance(source, str | Path) else source
    return Images.of_source(files, models, cache, batch_size=batch_size, show=show)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Classifier:
    """How one model's embeddings become probabilities."""

    vectors: np.ndarray
    """float32 ``[classes, dim]``, unit norm: what the cosines are with."""
    shares: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Of embeddings ``[n, dim]`` and their cosines ``[n, classes]``: probabilities ``[n, classes]``."""


def zero_shot(
    labels: LabelSet,
    prompts: Sequence[str],
    model: LazyModel,
    cache: Cache,
    *,
    scale: float | None = None,
    several: bool = False,
) -> Classifier:
    """By the class vectors of the labels (see `class_vectors`), texts that the cache holds taken from there.

    Args:
        labels, prompts: what the classes are called.
        model: whose texts.
        cache: of texts.
        scale: the factor on the cosines; the model's own where not given.
        several: give each class a probability of its own: by the sigmoid that the model was trained with, else beside
            the background (see `beside_background`).

    Raises:
        ClipkitError: for several classes at once, where the model has no sigmoid and the labels no background.
    """
    facts = model.facts
    factor = facts.scale if scale is None else scale
    if several and facts.bias is None and not labels.background:
        raise ClipkitError(
            f"{model.spec} was trained to tell labels from each other, so a label alone has no probability; name what "
            "the others are told from: --background 'a photo of something else'"
        )
    vectors = class_vectors(labels, prompts, lambda texts: cached_texts(texts, model, cache))

    def shares(_: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        if several and facts.bias is None:
            return beside_background(cosines, factor, labels.background)
        return probabilities(cosines, factor, facts.bias if several else None)

    return Classifier(vectors, shares)


def classify_images(
    images: Images,
    classifiers: Sequence[Classifier],
    rule: Rule,
    *,
    top: int = 5,
    weights: Sequence[float] | None = None,
) -> Decisions:
    """Decide for every image. What is said of one is the same to the last digit whichever others are asked for.

    Args:
        images: with embeddings by as many models as there are classifiers.
        classifiers: of the same classes; the probabilities of several are joined by `fused`.
        rule: what is sure.
        top: how many classes to keep.
        weights: of the classifiers.
    """
    gridded = [on_grid(one.vectors) for one in classifiers]
    parts = []
    for start in range(0, len(images), CHUNK):
        at = slice(start, min(start + CHUNK, len(images)))
        blocks = [images.block(number, at) for number in range(len(classifiers))]
        cosines = [inner_products(block, names, gridded=True) for block, names in zip(blocks, gridded, strict=True)]
        each = [one.shares(block, near) for one, block, near in zip(classifiers, blocks, cosines, strict=True)]
        shares = each[0] if len(each) == 1 else fused(each, weights)
        parts.append(decide(shares, cosines[0] if len(each) == 1 else None, rule, top))
    classes = len(classifiers[0].vectors)
    return joined(parts) if parts else decide(np.zeros((0, classes)), None, rule, top)


def rows_of(
    images: Images, labels: LabelSet, decisions: Decisions, examples: np.ndarray | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each image and for each that has no embedding, in source order; see `clipkit.classify`.

    With groups there is ``groups`` too: those of the first class, the widest first, with the probability of each. Where
    an image may be of several classes ``labels`` names all that it is of. Where it is told which images are among the
    examples (bool ``[n]``), ``example`` says so.
    """
    names, groups = labels.names, {name: at for at, name in enumerate(labels.groups)}
    rows = range(len(images)) if images.rows is None else images.rows
    # Embeddings tell of what they left out, but no more where in the source it and they were.
    places = [len(images) if images.rows is None else line.get("row", -1) for line in images.unreadable]
    lines = sorted((place, 0, number) for number, place in enumerate(places))
    for _, is_image, at in heapq.merge(lines, ((row, 1, at) for at, row in enumerate(rows))):
        row = _row(images.paths[at], names, decisions, at) if is_image else _unreadable(images.unreadable[at])
        if groups:
            own = labels.labels[int(decisions.classes[at, 0])].groups if is_image else ()
            row["groups"] = [[name, float(decisions.groups[at, groups[name]])] for name in own]
        if decisions.present.shape[1]:
            row["labels"] = [names[c] for c in np.flatnonzero(decisions.present[at])] if is_image else []
        if examples is not None:
            row["example"] = bool(is_image and examples[at])
        yield row


def summary(labels: LabelSet, decisions: Decisions) -> list[dict[str, Any]]:
    """For each label that any image got: how many did, how many of these surely, and their mean probability."""
    first = decisions.classes[:, 0]
    found = []
    for at, name in enumerate(labels.names):
        own = first == at
        if own.any():
            sure = int((decisions.statuses[own] == OK).sum())
            mean = float(decisions.probabilities[own, 0].mean())
            found.append({"label": name, "images": int(own.sum()), "sure": sure, "mean_probability": mean})
    return sorted(found, key=lambda row: -row["images"])


def classify(
    source: str | Path | Source | Embeddings,
    labels: Sequence[str] | LabelSet,
    model: "DualEncoder | LazyModel",
    *,
    prompts: Sequence[str] = PROMPTS["default"],
    rule: Rule | None = None,
    top: int = 5,
    batch_size: int = 64,
    cache: Cache | None = None,
    show: str | None = None,
) -> list[dict[str, Any]]:
    """Say for every image of a source which of the names fits best.

    Args:
        source: a folder, list, shards, embeddings or an index (of the last two no image is encoded again).
        labels: the class names, or all that is known of the classes.
        model: for texts and images alike.
        prompts: templates with ``{}``, see `clipkit.zeroshot.prompt_set`.
        rule: what is sure; everything where not given.
        top: how many classes to list in ``top``.
        batch_size: images at a time.
        cache: of what was embedded before; none where not given.
        show: title of a progress bar.

    Returns:
        One row per image in source order: ``path``, ``label``, ``score`` (cosine), ``probability`` (softmax over the
        labels at the model's own scale), ``margin`` (to the second's probability), ``top`` (labels with probability),
        ``status``: ``ok``, ``unsure``, ``background`` (a label for "none of these" is first), or ``unreadable`` with
        the reason in ``reason``.

    Raises:
        ClipkitError: where the embeddings come from another model, or labels are wrong.
    """
    cache = cache or Cache(None)
    lazy = model if isinstance(model, LazyModel) else LazyModel.of(model)
    known = as_label_set(labels)
    rule = replace(rule or Rule(), background=known.background, groups=list(known.groups.values()))
    classifier = zero_shot(known, prompts, lazy, cache, several=rule.several)
    images = open_images(source, [lazy], cache, batch_size=batch_size, show=show)
    return list(rows_of(images, known, classify_images(images, [classifier], rule, top=top)))


def _row(path: str, names: Sequence[str], decisions: Decisions, at: int) -> dict[str, Any]:
    classes, shares = decisions.classes[at].tolist(), decisions.probabilities[at].tolist()
    cosine = float(decisions.cosines[at, 0])
    return {
        "path": path,
        "label": names[classes[0]],
        "score": None if np.isnan(cosine) else cosine,
        "probability": shares[0],
        "margin": float(decisions.margins[at]),
        "top": [[names[c], share] for c, share in zip(classes, shares, strict=True)],
        "status": STATUSES[decisions.statuses[at]],
        "reason": None,
    }


def _unreadable(line: dict[str, Any]) -> dict[str, Any]:
    return {"path": line["key"], **NOTHING, "status": "unreadable", "reason": line["reason"]}


def _path(sample: Sample) -> str:
    return str(sample.columns.get("path", sample.key))
