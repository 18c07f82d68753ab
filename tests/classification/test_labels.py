"""Labels from wherever they come: what each class is called, described as and belongs to."""

import pytest

from clipkit.classification import parse_labels
from clipkit.classification.labels import Label, LabelSet
from clipkit.core import ClipkitError

WHOLE = """
prompts: ["a drawing of a {}.", "{}"]
labels:
  cat:
    aliases: [kitten]
    descriptions: A small animal that purrs.
  dog:
    prompts: "a good {}"
    group: [animal, pet]
  7:
  car: ["It has four wheels.", It is driven.]
background: [something else]
hierarchy:
  animal:
    pet: [cat]
  thing: [7, car]
"""


def test_all_that_yaml_can_say(tmp_path):
    (tmp_path / "labels.yaml").write_text(WHOLE)
    found = parse_labels(str(tmp_path / "labels.yaml"))
    assert found.names == ["cat", "dog", "7", "car", "something else"]
    assert found.prompts == ("a drawing of a {}.", "{}")
    assert found.background == [4]
    texts = [label.texts(found.prompts) for label in found.labels]
    assert texts[0] == ["a drawing of a cat.", "cat", "a drawing of a kitten.", "kitten", "A small animal that purrs."]
    assert texts[1] == ["a good dog"]
    assert texts[2] == ["a drawing of a 7.", "7"]
    assert texts[3][2:] == ["It has four wheels.", "It is driven."]
    assert found.groups == {"animal": [0, 1], "thing": [2, 3], "pet": [0, 1]}


def test_names_with_commas_a_text_file_and_a_bare_list_are_the_same(tmp_path):
    (tmp_path / "labels.txt").write_text("red heart\n\n blue star \n", encoding="utf-8-sig")
    (tmp_path / "labels.yml").write_text("- red heart\n- blue star\n")
    wanted = LabelSet((Label("red heart"), Label("blue star")))
    for given in ("red heart, blue star,", str(tmp_path / "labels.txt"), str(tmp_path / "labels.yml")):
        assert parse_labels(given) == wanted
    more = wanted.with_background("nothing")
    assert (more.names, more.background) == (["red heart", "blue star", "nothing"], [2])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("labels: [cat, dog]\nprompt: photo", "unknown key 'prompt'.*did you mean 'prompts'"),
        ("labels: {cat: {alias: x}}", "unknown key 'alias' in cat.*did you mean 'aliases'"),
        ("labels: [cat, no]", "labels: a name .* got no \\(put it in quotes"),
        ("labels: [cat, 1.5]", "got 1.5"),
        ("labels: {cat: 3}", "cat: a mapping is wanted, got 3"),
        ("labels: [cat, cat]", "the label 'cat' is given twice"),
        ("labels: [cat, ' ']", "a label is empty"),
        ("labels: []", "no labels are given"),
        ("background: [none]", "labels: a name or a list of names is wanted, got nothing"),
        ("labels: [cat]\nprompts: [a photo]", "the prompt 'a photo' has no {}"),
        ("labels: [cat, dog]\nhierarchy: {pets: [cat, dgo]}", "'dgo', which is no label .did you mean 'dog'"),
        ("labels: [cat, dog]\nhierarchy: {pets: [cat], animals: [cat]}", "names 'cat' twice"),
        ("labels: [cat, dog]\nhierarchy: {cat: [dog]}", "'cat' is both a label and a group"),
        ("labels: [cat", "is not valid YAML"),
        ("cat", "a mapping is wanted"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, told):
    (tmp_path / "labels.yaml").write_text(text)
    with pytest.raises(ClipkitError, match=told):
        parse_labels(str(tmp_path / "labels.yaml"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ClipkitError, match="no such file of labels: lables.yaml"):
        parse_labels("lables.yaml")
    (tmp_path / "labels.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ClipkitError, match="is not UTF-8"):
        parse_labels(str(tmp_path / "labels.txt"))
