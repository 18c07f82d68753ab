"""Bring an index up to date: add, replace, take away, put together, go back.

Who searches meanwhile sees the index before or after, and never a part of a change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
def main(index: Path, **options: Any) -> None:
    """Change INDEX: bring it up to date with EMBEDDINGS (new images are added, changed ones replaced), or as told."""
    from clipkit.core import note
    from clipkit.embedding import Embeddings
    from clipkit.search import Index, compact_index, delete_rows, go_back, update_index

    change = Change(**options)
    change.check()
    if change.embeddings:
        sets = [Embeddings.open(folder) for folder in change.embeddings]
        changed = update_index(index, sets, gone=change.gone, memory=change.memory)
        note(
            f"{index}: {changed.added:,} added, {changed.replaced:,} replaced, {changed.deleted:,} taken away, "
            f"{changed.unchanged:,} as they were"
        )
    elif change.compact:
        compact_index(index, memory=change.memory)
    elif change.back:
        go_back(index)
    else:
        note(f"{index}: {delete_rows(index, change.ids, where=change.delete_where).deleted:,} taken away")
    opened = Index.open(index)
    counts = " and ".join(f"{opened.count(side):,} {side} vectors" for side in opened.sides)
    note(f"{index}: generation {opened.state.number}, {counts} in {len(opened.state.segments)} segments")


@dataclass(frozen=True)
class Change:
    """The options of the command: one of four changes, and what belongs to it."""

    embeddings: tuple[Path, ...]
    gone: bool
    ids: tuple[int, ...]
    delete_where: str | None
    compact: bool
    back: bool
    memory: int | None

    def check(self) -> None:
        from clipkit.core import ClipkitError

        deletes = bool(self.ids) or self.delete_where is not None
        if sum([bool(self.embeddings), deletes, self.compact, self.back]) != 1:
            raise ClipkitError("name EMBEDDINGS, or one of --delete, --delete-where, --compact and --back")
        if self.gone and not self.embeddings:
            raise ClipkitError("--gone takes away what is not in the EMBEDDINGS; name them")


if __name__ == "__main__":
    main()
