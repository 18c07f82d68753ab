"""Search an index by text, by image, by a vector, or by several of them together.

The index knows which model it was made with and where; another model is refused.
"""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipkit.cli import Job
from clipkit.options import format_option, model_option

if TYPE_CHECKING:
    from clipkit.core import Side
    from clipkit.search import Found, Fusion, Index, Question, SearchOptions


@click.command(cls=Job)
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--image", "images", multiple=True, type=click.Path(path_type=Path), help="Ask with this image too.")
@click.option("--vector", "vectors", multiple=True, type=click.Path(path_type=Path), help="And with this .npy file.")
@click.option("--minus", multiple=True, metavar="TEXT", help="And away from this text.")
@click.option("--minus-image", multiple=True, type=click.Path(path_type=Path), help="And away from this image.")
@click.option("--weights", metavar="W,W,...", help="Of texts, images, vectors and what is unwanted, in this order.")
@click.option(
    "--fusion",
    default="early",
    show_default=True,
    type=click.Choice(["early", "score", "rank"]),
    help="Of several parts: one vector, or lists joined by score or by reciprocal rank.",
)
@click.option("--file", "batch", type=click.Path(path_type=Path), help="Questions: a text a line, or JSONL.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many results.")
@click.option("--page", default=1, show_default=True, type=click.IntRange(1), help="Which k of the results.")
@click.option("--where", metavar="CONDITION", help="Only rows of which this holds: 'width > 512 and lang == \"en\"'.")
@click.option("--min-score", type=float, help="Leave out what scores less.")
@click.option("--collapse", metavar="COLUMN|COSINE", help="Of rows of one value, or as near as this, show the best.")
@click.option(
    "--in", "side", default="image", show_default=True, type=click.Choice(["image", "text"]), help="What to find."
)
@click.option("--exact", is_flag=True, help="Compare with everything, whatever the kind of the index.")
@click.option("--with-vectors", is_flag=True, help="Give the vectors of the results too (JSON, JSONL).")
@click.option("--html", type=click.Path(path_type=Path), help="Write a contact sheet.")
@click.option("--image-root", type=click.Path(path_type=Path), help="Where the sheet's pictures are.")
@click.option("--device", help="For the model [default: the GPU where there is one].")
@model_option
@format_option
def main(index: Path, **options: Any) -> None:
    """Find in INDEX what is nearest to TEXT, or to --image FILE, or to all of them together.

    Rows come best first: rank, score (cosine), image_path, caption, id and whatever else the source said of them. Of a
    --file of questions, each row starts with the number and the text of its question; in JSONL a question is an
    object with any of text, image, vector, minus, minus_image (a value or a list) and weights.
    """
    from clipkit.core import ClipkitError, emit, note, pick_device
    from clipkit.models import load_model_of
    from clipkit.search import Index, ask

    asked = Asked(**options)
    if asked.with_vectors and asked.fmt not in ("json", "jsonl"):
        raise ClipkitError("--with-vectors goes with --format json or jsonl")
    questions, search = _questions(asked), _search_options(asked)
    opened = Index.open(index)
    needs_model = any(question.needs_model for question in questions)
    towers = load_model_of(opened.manifest, index, asked.model, pick_device(asked.device)) if needs_model else None
    answers = []
    for number, question in enumerate(questions, 1):
        found = ask(opened, question.parts(towers), search)
        if len(found.positions[0]) < asked.k:
            note(f"there are {len(found.positions[0]):,} {search.side} results on this page; all of them are listed")
        about = {} if asked.batch is None else {"query": number, "question": question.told}
        answers.append(_rows(opened, found, search, about, asked.with_vectors))
    if asked.html is not None:
        from clipkit.search import write_sheet

        write_sheet(asked.html, [question.told for question in questions], answers, asked.image_root or Path())
        note(f"{asked.html}: the results as pictures")
    rows = [row for answer in answers for row in answer]
    if asked.fmt == "human":
        shown = (*(["query"] if asked.batch is not None else []), "rank", "score", "image_path", "caption")
        rows = [{key: row.get(key) for key in shown} for row in rows]
    emit(rows, asked.fmt)


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    texts: tuple[str, ...]
    images: tuple[Path, ...]
    vectors: tuple[Path, ...]
    minus: tuple[str, ...]
    minus_image: tuple[Path, ...]
    weights: str | None
    fusion: "Fusion"
    batch: Path | None
    k: int
    page: int
    where: str | None
    min_score: float | None
    collapse: str | None
    side: "Side"
    exact: bool
    with_vectors: bool
    html: Path | None
    image_root: Path | None
    device: str | None
    model: str | None
    fmt: str


def _questions(asked: Asked) -> "list[Question]":
    from clipkit.search import Question, open_questions

    if asked.batch is not None:
        return open_questions(asked.batch)
    parts = (asked.texts, asked.images, asked.vectors, asked.minus, asked.minus_image)
    return [Question(*parts, weights=_numbers(asked.weights))]


def _search_options(asked: Asked) -> "SearchOptions":
    from clipkit.search import SearchOptions

    return SearchOptions(
        asked.k,
        asked.side,
        asked.fusion,
        asked.where,
        asked.min_score,
        offset=(asked.page - 1) * asked.k,
        collapse=_collapse(asked.collapse),
        exact=asked.exact,
    )


def _rows(
    index: "Index", found: "Found", search: "SearchOptions", about: dict[str, Any], with_vectors: bool
) -> list[dict[str, Any]]:
    """The rows of one answer: what is said of the question, rank, score, and the metadata."""
    own = {*about, "vector"} if with_vectors else set(about)  # sources keep rank and score free
    positions = found.positions[0]
    metadata = index.rows(positions, search.side)
    rows = []
    for rank, (score, row) in enumerate(zip(found.scores[0], metadata, strict=True), search.offset + 1):
        columns = {f"{name}_" if name in own else name: _written(value) for name, value in row.items()}
        rows.append({**about, "rank": rank, "score": float(score), **columns})
    if with_vectors:
        for row, vector in zip(rows, index.vectors(positions, search.side), strict=True):
            row["vector"] = vector.tolist()
    return rows


def _written(value: Any) -> Any:
    # JSON has no word for infinity, and readers refuse what Python writes for it.
    return None if isinstance(value, float) and not isfinite(value) else value


def _numbers(given: str | None) -> tuple[float, ...] | None:
    from clipkit.core import ClipkitError

    if given is None:
        return None
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ClipkitError(f"--weights takes numbers with commas between them, as in 1,0.5; got {given!r}") from None


def _collapse(given: str | None) -> str | float | None:
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        return given


if __name__ == "__main__":
    main()
