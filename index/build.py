"""Build a search index from embeddings.

Several embedding folders of one model may go into one index. The search is exact.
"""

from pathlib import Path

import click

from clipkit.cli import Job, out_options


@click.command(cls=Job)
@click.argument("embeddings", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_options("the index")
def main(embeddings: tuple[Path, ...], out: Path, overwrite: bool) -> None:
    """Build a FAISS index over one or several EMBEDDINGS folders (made by clipkit embed)."""
    from clipkit.artifact import relative_to_artifact
    from clipkit.embeddings import Embeddings
    from clipkit.log import note
    from clipkit.search import build_index

    sets = [Embeddings.open(folder) for folder in embeddings]
    reference = dict(sets[0].manifest["model"])
    if "path" in reference:
        reference["path"] = relative_to_artifact(sets[0].folder / reference["path"], out)
    manifest = build_index(sets, out, model_reference=reference, overwrite=overwrite)
    held = " and ".join(f"{rows:,} {side} vectors" for side, rows in manifest["counts"].items())
    note(f"{out}: {manifest['type']} index of {held}, dimension {manifest['dim']}")
    note(f'next: clipkit search {out} "what to look for"')


if __name__ == "__main__":
    main()
