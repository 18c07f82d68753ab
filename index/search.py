"""Search an index by text or by image.

The index knows which model it was made with and where; another model is refused.
"""

from pathlib import Path

import click

from clipkit.cli import Job, format_option, model_option


@click.command(cls=Job)
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Search by this image instead of a text.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many results.")
@click.option(
    "--in",
    "side",
    default="image",
    show_default=True,
    type=click.Choice(["image", "text"]),
    help="What to find.",
)
@click.option("--device", help="For the model [default: the GPU where there is one].")
@model_option
@format_option
def main(
    index: Path,
    text: str | None,
    image: Path | None,
    k: int,
    side: str,
    device: str | None,
    model: str | None,
    fmt: str,
) -> None:
    """Find in INDEX what is nearest to TEXT, or to --image FILE.

    Rows come best first: rank, score (cosine), image_path, caption, id and whatever else the source said of them.
    """
    from clipkit.embeddings import Side
    from clipkit.errors import ClipkitError
    from clipkit.log import emit, note
    from clipkit.search import Index
    from clipkit.towers import load_model_of, pick_device

    if (text is None) == (image is None):
        raise ClipkitError('ask with a text or with --image FILE, one of the two: clipkit search INDEX "a red heart"')
    if image is not None and not image.is_file():
        raise ClipkitError(f"no such image: {image}")
    opened = Index.open(index)
    towers = load_model_of(opened.manifest, index, model, pick_device(device))
    try:
        query = towers.embed_images([image]) if image is not None else towers.embed_texts([text or ""])
    except ClipkitError as error:
        raise ClipkitError(f"{image}: {error}") from error
    looked_in: Side = "text" if side == "text" else "image"
    scores, positions = opened.search(query, k, looked_in)
    if len(positions[0]) < k:
        note(f"the index holds {len(positions[0])} {side} vectors; all of them are listed")
    rows = [
        {"rank": rank, "score": float(score), **row}  # sources keep these two names free
        for rank, (score, row) in enumerate(zip(scores[0], opened.rows(positions[0], looked_in), strict=True), 1)
    ]
    if fmt == "human":
        rows = [{key: row.get(key) for key in ("rank", "score", "image_path", "caption")} for row in rows]
    emit(rows, fmt)


if __name__ == "__main__":
    main()
