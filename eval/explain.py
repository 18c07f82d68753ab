"""Explain what in an image speaks for a text, as a heat map over it.

Nothing is trained: a vision transformer's own attention is read, or parts of the image are hidden one after another.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import format_option, model_option


@click.command(cls=Job)
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@model_option
@click.option(
    "--method",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "relevance", "occlusion"]),
    help="relevance: attention weighted by its gradient, quick, for vision transformers; occlusion: what the cosine "
    "loses when a part is hidden, for every model, hundreds of passes; auto: relevance where it can be had.",
)
@click.option(
    "--contrast", is_flag=True, help="What speaks for each text rather than for the others, instead of for it alone."
)
@click.option(
    "--window",
    type=click.IntRange(1),
    help="Of occlusion: how many cells wide and high a hidden part is [default: a fifth of the grid, 2 at least].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The picture, .png, or a page that holds it, .html [default: IMAGE-explained.png here; none with --format "
    "json, jsonl or csv].",
)
@click.option(
    "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Of occlusion: images at a time."
)
@click.option("--device", help="For the model [default: the GPU where there is one].")
@format_option
def main(
    image: Path,
    texts: tuple[str, ...],
    model: str | None,
    device: str | None,
    out: Path | None,
    fmt: str,
    **options: Any,
) -> None:
    """Show which parts of IMAGE speak for each of the TEXTS: clipkit explain photo.jpg "a dog" "a red car" --model RUN.

    Results: each text's cosine and, among several, its probability. --format json adds the maps as numbers, rows of
    cells from the top, and each cell's box (left, top, right, bottom) in pixels of the image. One scale of colours
    holds for all texts.
    """
    from clipkit.core import ClipkitError
    from clipkit.images import IMAGE_SUFFIXES

    for text in texts:
        if Path(text).suffix.lower() in IMAGE_SUFFIXES and Path(text).is_file():
            raise ClipkitError(f"{text} is an image and stands among the texts; explain takes one image at a time")
    if out is None and fmt == "human":
        out = Path(f"{image.stem}-explained.png")
    if out is not None and out.suffix.lower() not in (".png", ".html"):
        raise ClipkitError(f"--out {out}: a picture ends in .png, a page in .html")
    if out is not None and out.resolve() == image.resolve():
        raise ClipkitError(f"--out {out} is the image itself; name another file")
    if model is None:
        raise ClipkitError("name the model to explain with: --model RUN (or open_clip:NAME/TAG, or hf:ORG/NAME)")
    from clipkit.core import emit, note, pick_device, save_figure
    from clipkit.models import load_model
    from clipkit.models.explain import ExplainOptions, check_texts, explain

    chosen = ExplainOptions(**options)
    check_texts(texts, contrast=chosen.contrast)
    towers = load_model(model, pick_device(device))
    explanation = explain(image, texts, towers, chosen, show="occlusion")
    if fmt == "json":
        emit({"image": str(image), "model": model, "picture": str(out) if out else None, **explanation.as_json()}, fmt)
    elif fmt == "human":
        emit([{key: value for key, value in row.items() if key != "map"} for row in explanation.rows()], fmt)
    else:
        emit(explanation.rows(), fmt)
    if out is not None:
        if out.suffix.lower() == ".png":
            save_figure(out, explanation.figure())
        else:
            explanation.write_page(out, f"{image.name}, by {model}")
        note(f"{out}: {explanation.source}")


if __name__ == "__main__":
    main()
