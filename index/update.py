"""Bring an index up to date: add, replace, take away, put together, go back.

Who searches meanwhile sees the index before or after, and never a part of a change.
"""

from pathlib import Path

import click

from clipkit.cli import Job
from clipkit.options import memory_option


@click.command(cls=Job)
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("embeddings", nargs=-1, type=click.Path(path_type=Path))
@click.option("--gone", is_flag=True, help="Take away what is in none of the EMBEDDINGS.")
@click.option("--delete", "ids", multiple=True, type=int, metavar="ID", help="Take the image of this id away.")
@click.option("--delete-where", metavar="CONDITION", help="Take away what this holds for, as in search --where.")
@click.option("--compact", is_flag=True, help="Put all segments together into one, without what is gone.")
@click.option("--back", is_flag=True, help="Go back to the generation before the last change.")
@memory_option
def main(
    index: Path,
    embeddings: tuple[Path, ...],
    gone: bool,
    ids: tuple[int, ...],
    delete_where: str | None,
    compact: bool,
    back: bool,
    memory: int | None,
) -> None:
    """Change INDEX: bring it up to date with EMBEDDINGS (new images are added, changed ones replaced), or as told."""
    from clipkit.core import ClipkitError, note
    from clipkit.embedding import Embeddings
    from clipkit.search import Index, compact_index, delete_rows, go_back, update_index

    told = [bool(embeddings), bool(ids) or delete_where is not None, compact, back]
    if sum(told) != 1:
        raise ClipkitError("name EMBEDDINGS, or one of --delete, --delete-where, --compact and --back")
    if gone and not embeddings:
        raise ClipkitError("--gone takes away what is not in the EMBEDDINGS; name them")
    if embeddings:
        sets = [Embeddings.open(folder) for folder in embeddings]
        changed = update_index(index, sets, gone=gone, memory=memory)
        note(
            f"{index}: {changed.added:,} added, {changed.replaced:,} replaced, {changed.deleted:,} taken away, "
            f"{changed.unchanged:,} as they were"
        )
    elif compact:
        compact_index(index, memory=memory)
    elif back:
        go_back(index)
    else:
        note(f"{index}: {delete_rows(index, ids, where=delete_where).deleted:,} taken away")
    opened = Index.open(index)
    held = " and ".join(f"{opened.count(side):,} {side} vectors" for side in opened.sides)
    note(f"{index}: generation {opened.state.number}, {held} in {len(opened.state.segments)} segments")


if __name__ == "__main__":
    main()
