"""Which class a folder names, by the one rule that classification and evaluation share."""

import itertools

import pytest

from clipkit.classification import class_folders, classes_of
from clipkit.classification.folder_classes import plain_name, truth_of
from clipkit.classification.labels import Label, LabelSet, as_label_set
from clipkit.core import ClipkitError
from clipkit.data.sources import open_source
from tests.samples import photo


def test_the_nearest_folder_that_names_a_class_counts():
    labels = LabelSet((Label("sea lion", aliases=("otary",)), Label("cat")))
    paths = ["cat/Sea__Lion/1.png", "cat/other/2.png", "OTARY/x/3.png", "dog/4.png", "5.png", "Cat/6.png"]
    truth = truth_of(paths, labels)
    assert truth is not None
    assert truth.tolist() == [0, 1, 0, -1, -1, 1]
    assert truth_of(["dog/1.png", "2.png"], labels) is None


def test_a_folder_called_exactly_as_a_class_is_of_no_other():
    truth = truth_of(["cat/1.png", "Cat/2.png", "CAT/3.png"], as_label_set(["Cat", "cat"]))
    assert truth is not None
    assert truth.tolist() == [1, 0, 0]  # of any other case the first is meant
    aliased = LabelSet((Label("dog", aliases=("cat",)), Label("cat")))
    assert truth_of(["cat/1.png"], aliased) == [1]


def test_where_the_folders_are_the_classes_only_the_first_names_one():
    """What is called alike further down, or in another case, is a class of its own or none."""
    keys = ["a/b/1.png", "b/2.png", "A/a/b/3.png", "4.png", "a/5.png", "b/other/6.png"]
    names, places = classes_of("spec", keys)
    assert names == ["A", "a", "b"]
    assert places.tolist() == [1, 2, 0, -1, 1, 2]
    assert truth_of(keys, as_label_set(names)).tolist() == [2, 2, 2, -1, 1, 2]  # the nearest, where names are given
    with pytest.raises(ClipkitError, match="folder 'A' is none of the classes"):
        classes_of("spec", keys, ["a", "b"])


def test_every_layout_has_the_classes_of_its_first_folders():
    """As a dictionary of them says, for all ways to nest a few names."""
    parts = ["cat", "Cat", "sea_lion", "sea lion 2"]
    keys = ["/".join((*way, f"{number}.png")) for number in range(2) for deep in range(4)
            for way in itertools.product(parts, repeat=deep)]  # fmt: skip
    names, places = classes_of("spec", keys)
    assert names == [plain_name(part) for part in sorted(parts)]
    wanted = [names.index(plain_name(key.split("/")[0])) if "/" in key else -1 for key in keys]
    assert places.tolist() == wanted


def test_a_folder_of_folders_is_read_by_both(tmp_path):
    for number, path in enumerate(("cat/dog", "cat", "dog")):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        photo(number).save(tmp_path / path / f"{number}.png")
    source = open_source(tmp_path)
    keys = [source.key(row) for row in range(len(source))]
    names, places = class_folders(source)
    assert [names[at] for at in places] == [key.split("/")[0] for key in keys]
    truth = truth_of(keys, as_label_set(names))
    assert truth is not None
    assert [names[at] for at in truth] == [key.split("/")[-2] for key in keys]
