"""Build a search index from embeddings.

Which kind of index it is, is measured: with the captions of the images, or whatever texts people ask with.
"""

from pathlib import Path
from typing import Any

import click

from clipkit.cli import Job
from clipkit.options import Bytes, memory_option, model_option, out_options

INDEX_TYPES = ("auto", "Flat", "IVF-Flat", "IVF-SQ8", "IVF-PQ", "OPQ", "RaBitQ", "HNSW")


@click.command(cls=Job)
@click.argument("embeddings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recall", default=0.95, show_default=True, type=click.FloatRange(0, 1), help="Recall@10 to reach.")
@click.option(
    "--kind",
    default="auto",
    show_default=True,
    type=click.Choice(INDEX_TYPES),
    callback=lambda _context, _option, kind: None if kind == "auto" else kind,
    help="Of the index.",
)
@click.option("--serve-memory", type=Bytes(), help="What the index may take in memory while it is searched.")
@click.option("--queries", type=click.Path(path_type=Path), help="Texts people ask, a line each, to measure with.")
@click.option("--verify", is_flag=True, help="Compare the embeddings with their checksums first; reads them once more.")
@memory_option
@model_option
@out_options("the index")
def main(
    embeddings: tuple[Path, ...],
    queries: Path | None,
    verify: bool,
    model: str | None,
    out: Path,
    overwrite: bool,
    **wanted: Any,
) -> None:
    """Build a FAISS index over one or several EMBEDDINGS folders (made by clipkit embed).

    The fastest kind is taken that finds the wanted share of what the exact search finds, asked with held-out captions,
    with --queries, or, where there are neither, with images. What was tried stands in OUT/manifest.json and as a plot.
    """
    from clipkit.core import note
    from clipkit.embedding import Embeddings
    from clipkit.search import Wanted, build_index
    from clipkit.storage import digest

    sets = [Embeddings.open(folder) for folder in embeddings]
    if verify:
        for opened in sets:
            opened.verify()
    texts = vectors = None
    if queries is not None:
        texts = _lines(queries)
        from clipkit.models import load_model_of  # torch takes memory, and is needed for nothing else here

        vectors = load_model_of(sets[0].manifest, sets[0].folder, model).embed_texts(texts)
    manifest = build_index(
        sets, out, Wanted(**wanted), queries=vectors, queries_identity=digest(texts), overwrite=overwrite
    )
    for side, rows in manifest["counts"].items():
        chosen = manifest["chosen"][side]
        note(
            f"{out}: {rows:,} {side} vectors of dimension {manifest['dim']}, {chosen['kind']} ({chosen['why']}), "
            f"recall@10 {chosen['recall']:.3f}"
        )
    note(f'next: clipkit search {out} "what to look for"')


def _lines(path: Path) -> list[str]:
    from clipkit.core import ClipkitError

    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ClipkitError(f"cannot read {path}: {error}") from error
    if not texts:
        raise ClipkitError(f"{path} holds no text; write one question a line")
    return texts


if __name__ == "__main__":
    main()
