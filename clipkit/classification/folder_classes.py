"""Which class an image is of by the folder that it stands in."""

from collections.abc import Sequence

import numpy as np

from clipkit.classification.labels import LabelSet
from clipkit.core import ClipkitError, did_you_mean
from clipkit.data.sources import Source

__all__ = ["class_folders", "classes_of", "plain_name", "truth_of"]


def class_folders(source: Source, classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The classes of a source, and which one each row belongs to.

    A class is called as the first folder in its keys, with spaces for underscores.

    Args:
        source: with a folder per class.
        classes: their names in the order that is wanted, or more; sorted when not given.

    Returns:
        Names, and int64 ``[rows]`` of places in them, -1 for a row that stands in no folder.

    Raises:
        ClipkitError: where there are no two classes, two folders have one name, or a folder is none of `classes`.
    """
    return classes_of(source.spec, [source.key(row) for row in range(len(source))], classes)


def classes_of(spec: str, keys: Sequence[str], classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """As `class_folders`, from the keys of a source's samples.

    Args:
        spec: how messages call the source.
        keys: of its samples, as they were relative to it.
        classes: see `class_folders`.
    """
    folders = [key.rpartition("/")[0].partition("/")[0] for key in keys]
    name_of = {folder: plain_name(folder) for folder in sorted(set(folders)) if folder}
    folder_of = {name: folder for folder, name in name_of.items()}
    for folder, name in name_of.items():
        if folder_of[name] != folder:
            raise ClipkitError(f"{spec}: folders {folder!r} and {folder_of[name]!r} are both called {name!r}")
    names = list(folder_of) if classes is None else [plain_name(name) for name in classes]
    for name in name_of.values():
        if name not in names:
            raise ClipkitError(f"{spec}: folder {name!r} is none of the classes{did_you_mean(name, names)}")
    if len(names) < 2:
        held = f"one sub-folder of images, {names[0]!r}" if names else "no sub-folders of images"
        raise ClipkitError(f"{spec} has {held}; name the folder that holds one per class, and two or more")
    place = {name: at for at, name in enumerate(names)}
    return names, np.array([place[name_of[folder]] if folder else -1 for folder in folders], np.int64)


def plain_name(folder: str) -> str:
    """A folder's name as a class is called: spaces for underscores, none twice."""
    return " ".join(folder.replace("_", " ").split())


def truth_of(paths: Sequence[str], labels: LabelSet) -> np.ndarray | None:
    """Which class each image is of, where the folder that it stands in, or one above, is called as a class or an alias.

    Args:
        paths: of the images, relative to the source.
        labels: the classes; case and underscores in names do not count.

    Returns:
        int64 ``[n]`` of places in the labels, -1 where no folder names one; None where none does for any image.
    """
    place = {
        plain_name(name).casefold(): at
        for at, label in reversed(list(enumerate(labels.labels)))
        for name in (*label.aliases, label.name)
    }
    found = np.full(len(paths), -1, np.int64)
    known: dict[str, int] = {}
    for at, path in enumerate(paths):
        above = path.rpartition("/")[0]
        if above not in known:
            folders = reversed(above.split("/"))  # the nearest first
            known[above] = next((place[n] for f in folders if (n := plain_name(f).casefold()) in place), -1)
        found[at] = known[above]
    return found if (found >= 0).any() else None
