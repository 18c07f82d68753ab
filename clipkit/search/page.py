"""Search results as a contact sheet: one page that shows what was found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.core import BadSample, Report
from clipkit.images import decode

__all__ = ["write_sheet"]


def write_sheet(path: Path, questions: Sequence[str], answers: Sequence[Sequence[dict[str, Any]]], root: Path) -> None:
    """Write a self-contained page with the pictures of the rows under their questions.

    Args:
        path: of the page.
        questions: in words.
        answers: the rows of each: ``rank``, ``score``, ``image_path``, ``caption``.
        root: where image paths start. A picture that is not there is told by its name.
    """
    page = Report("Search", f"{sum(map(len, answers)):,} results")
    for question, rows in zip(questions, answers, strict=True):
        page.heading(question)
        shown, missing = [], []
        for row in rows:
            label = f"{row['rank']}  {row['score']:.3f}  {row.get('caption') or row['image_path']}"
            picture = _picture(root / row["image_path"])
            if picture is None:
                missing.append({"rank": row["rank"], "score": row["score"], "image": row["image_path"]})
            else:
                shown.append((picture, label, False))
        if shown:
            page.sheet(shown)
        if missing:
            page.text("These are not at hand (--image-root says where pictures are):")
            page.table(missing)
    page.write(path)


def _picture(path: Path) -> Image.Image | None:
    try:
        return decode(path.read_bytes())
    except (OSError, BadSample):
        return None
