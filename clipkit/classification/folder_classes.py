"""Which class an image is of by the folders that it stands in: one rule, for classification and for evaluation.

A folder names the class that is called exactly as it, else one that is in another case or by an alias; spaces and
underscores are the same. Of several folders above an image the nearest that names a class counts. Evaluation takes a
source for what it is laid out as, a folder for each class: there the first folders are the classes, and only they name
any, so that what is called alike further down changes nothing.
"""

from collections.abc import Sequence

import numpy as np

from clipkit.classification.labels import LabelSet
from clipkit.core import ClipkitError, did_you_mean
from clipkit.data.sources import Source

__all__ = ["class_folders", "classes_of", "plain_name", "truth_of"]


def plain_name(folder: str) -> str:
    """A folder's name as a class is called: spaces for underscores, none twice."""
    return " ".join(folder.replace("_", " ").split())


def truth_of(paths: Sequence[str], labels: LabelSet) -> np.ndarray | None:
    """Which class each image is of, where a folder above it names one.

    Args:
        paths: of the images, relative to the source.
        labels: the classes.

    Returns:
        int64 ``[n]`` of places in the labels, -1 where no folder names one; None where none does for any image.
    """
    truth = _named(paths, [(label.name, label.aliases) for label in labels.labels])
    return truth if (truth >= 0).any() else None


def _named(paths: Sequence[str], classes: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
    """The rule: int64 ``[n]``, places in the classes, of which there are the name and the aliases; -1 for none."""
    backwards = [(at, *classes[at]) for at in reversed(range(len(classes)))]  # the first of equal ones counts
    exact = {plain_name(own): at for at, own, _ in backwards}
    in_any_case = {plain_name(name).casefold(): at for at, own, aliases in backwards for name in (*aliases, own)}
    truth = np.full(len(paths), -1, np.int64)
    known: dict[str, int] = {}
    for at, path in enumerate(paths):
        above = path.rpartition("/")[0]
        if above not in known:
            folders = [plain_name(folder) for folder in reversed(above.split("/")) if folder]  # the nearest first
            places = (exact.get(folder, in_any_case.get(folder.casefold(), -1)) for folder in folders)
            known[above] = next((place for place in places if place >= 0), -1)
        truth[at] = known[above]
    return truth


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
        content = f"one sub-folder of images, {names[0]!r}" if names else "no sub-folders of images"
        raise ClipkitError(f"{spec} has {content}; name the folder that holds one per class, and two or more")
    return names, _named([f"{folder}/" for folder in folders], [(name, ()) for name in names])
