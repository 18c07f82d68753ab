"""What labels are called as folders, and which name each file gets there."""

import itertools
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.classification.sort.plan import Item, Step, folders_of, numbered, plain_form, plan, safe_name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("cat", "cat"),
        ("a red heart", "a red heart"),
        ("a/b", "a_b"),
        ("a\\b", "a_b"),
        ("..", "_"),
        (".", "_"),
        ("../../etc", "__.._etc"),
        ("/", "_"),
        (" ", "_"),
        (".hidden", "_hidden"),
        ("dot.", "dot"),
        ("a\nb\0c", "a_b_c"),
        ("grüße 猫", "grüße 猫"),
        ("u\u0308", "ü"),
        ("CON", "CON_"),
        ("nul.txt", "nul.txt_"),
        ('what?"<>|*:', "what_______"),
    ],
)
def test_a_label_becomes_a_name_that_a_folder_can_have(label, name):
    assert safe_name(label) == name


@given(st.text(max_size=60) | st.text("a猫.", min_size=100, max_size=200))
def test_any_label_is_a_single_harmless_name(label):
    name = safe_name(label)
    assert name
    assert name not in (".", "..")
    assert not name.startswith(".")
    assert "/" not in name
    assert "\0" not in name
    assert len(name.encode()) <= 120
    assert Path("x", name).parent == Path("x")


def test_long_labels_that_begin_alike_stay_apart():
    names = {safe_name("猫" * 200 + end) for end in "abc"}
    assert len(names) == 3
    assert all(name.startswith("猫" * 30) for name in names)


@settings(max_examples=100)
@given(st.lists(st.text("aAäÄ/._ u\u0308ß", min_size=1, max_size=4), unique=True, max_size=12))
def test_no_two_labels_share_a_folder(labels):
    found = folders_of(labels, {}, lambda name: name == "a")
    plain = [plain_form(name) for name in found.values()]
    assert len(set(plain)) == len(labels)
    assert not {"a", "unsure", "background"} & set(found.values())
    assert folders_of(labels[::-1], found, lambda name: False) == found  # as they were called before


def test_labels_called_as_the_places_of_the_unsure_get_others():
    assert folders_of(["unsure", "Background"], {}, lambda _: False) == {
        "unsure": "unsure-2",
        "Background": "Background-2",
    }


def test_names_are_numbered_before_the_ending_and_cut_to_what_fits():
    assert numbered("a.jpg", 2) == "a-2.jpg"
    assert numbered("a", 13) == "a-13"
    assert numbered(".x", 2) == ".x-2"
    long = numbered("ü" * 125 + ".jpg", 100)
    assert len(os.fsencode(long)) <= 255
    assert long.endswith("ü-100.jpg")


def slow_plan(items, taken, done):
    """Twin: tries every name against all others."""
    used, steps, seen = [plain_form(name) for name in taken], [], set(done)
    for item in items:
        for folder in item.folders:
            if (item.path, folder) in seen:
                continue
            seen.add((item.path, folder))
            name = item.path.rpartition("/")[2]
            names = itertools.chain([name], (numbered(name, n) for n in itertools.count(2)))
            free = next(each for each in names if plain_form(f"{folder}/{each}") not in used)
            used.append(plain_form(f"{folder}/{free}"))
            steps.append(Step(item.path, f"{folder}/{free}"))
    return steps


NAMES = st.sampled_from(["a.jpg", "A.JPG", "a-2.jpg", "b", "ü.png", "u\u0308.png"])
ITEMS = st.builds(
    lambda above, name, folders: Item(f"/{above}/{name}", tuple(folders)),
    st.sampled_from("xyz"),
    NAMES,
    st.lists(st.sampled_from(["cat", "dog"]), unique=True),
)


@given(st.lists(ITEMS, max_size=12), st.lists(NAMES, max_size=3))
def test_a_plan_gives_every_file_a_name_of_its_own(items, there):
    taken = [f"cat/{name}" for name in there]
    steps = plan(items, taken, {("/x/b", "dog"): "dog/b"})
    assert steps == slow_plan(items, taken, {("/x/b", "dog"): "dog/b"})
    targets = [plain_form(step.target) for step in steps]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & {plain_form(name) for name in taken}


def test_ten_thousand_files_of_one_name_are_planned_at_once():
    items = [Item(f"/{n}/image.jpg", ("cat",)) for n in range(10_000)]
    began = time.process_time()
    steps = plan(items, [], {})
    assert steps[-1].target == "cat/image-10000.jpg"
    assert time.process_time() - began < 5
