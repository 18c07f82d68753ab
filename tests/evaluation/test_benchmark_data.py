"""Datasets in CLIP_benchmark's layout are read as webdataset reads them."""

import gc
import io

import numpy as np
import pytest
import webdataset

from clipkit.core import ClipkitError
from clipkit.evaluation.benchmark_data import is_benchmark, open_benchmark
from tests.samples import encoded, photo


def write(folder, members, *, split="test", per_tar=3, **texts):
    (folder / split).mkdir(parents=True)
    for start in range(0, len(members), per_tar):
        with webdataset.TarWriter(str(folder / split / f"{start // per_tar}.tar"), encoder=False) as tar:
            for at, more in enumerate(members[start : start + per_tar], start):
                tar.write({"__key__": f"s{at:05d}", "webp": encoded(photo(at, 40, 30), "WEBP"), **more})
    (folder / split / "nshards.txt").write_text(str(-(-len(members) // per_tar)))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


CLASSES = "cat\ndog\n\nbird\n"
PROMPTS = "a photo of a {c}.\na bad photo of a {c}.\n"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_classes_and_templates(tmp_path):
    wanted = [2, 0, 1, 1, 0]
    members = [{"cls": str(number).encode()} for number in wanted]
    folder = write(tmp_path, members, classnames=CLASSES, zeroshot_classification_templates=PROMPTS)
    assert is_benchmark(folder)
    found = open_benchmark(folder)
    assert (found.kind, found.classes) == ("classification", ["cat", "dog", "bird"])
    assert found.prompts == ["a photo of a {}.", "a bad photo of a {}."]
    theirs = webdataset.WebDataset(
        [str(folder / "test" / f"{n}.tar") for n in range(2)], shardshuffle=False, nodesplitter=None
    )
    keys = [sample["__key__"] for sample in theirs]
    del theirs
    gc.collect()  # webdataset leaves the tars open; their warning belongs to this test
    assert [found.source.key(row) for row in range(len(found.source))] == keys
    assert found.truth().tolist() == wanted


def test_several_labels_for_an_image(tmp_path):
    wanted = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    folder = write(tmp_path, [{"npy": npy(row)} for row in wanted], classnames=CLASSES, dataset_type="multilabel")
    found = open_benchmark(folder)
    assert found.kind == "multilabel"
    assert np.array_equal(found.truth(), wanted.astype(bool))


def test_captions_one_a_line(tmp_path):
    members = [{"txt": b"one caption\nand another\n"}, {"txt": "zwei Hände".encode()}]
    found = open_benchmark(write(tmp_path, members, split="val", dataset_type="retrieval"), "val")
    assert [found.source.without_image(row).captions for row in range(2)] == [
        ("one caption", "and another"),
        ("zwei Hände",),
    ]
    assert found.source[1].image is not None


def test_what_does_not_fit_is_named(tmp_path):
    cls = [{"cls": b"1"}, {"cls": b"5"}]
    folder = write(tmp_path / "a", cls, classnames=CLASSES)
    with pytest.raises(ClipkitError, match=r"s00001 is of class 5, and classnames.txt has 3"):
        open_benchmark(folder).truth()
    with pytest.raises(ClipkitError, match=r"no split 'train'; it has test"):
        open_benchmark(folder, "train")
    (folder / "dataset_type.txt").write_text("captions")
    with pytest.raises(ClipkitError, match=r"says 'captions'; it can be classification, multilabel, retrieval"):
        open_benchmark(folder)
    folder = write(tmp_path / "b", [{"cls": b"one"}], classnames=CLASSES, zeroshot_classification_templates="a {}.")
    with pytest.raises(ClipkitError, match=r"'a {}.' has no {c}"):
        open_benchmark(folder)
    (folder / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(ClipkitError, match=r"the class of s00000 cannot be read"):
        open_benchmark(folder).truth()
    (folder / "classnames.txt").write_text("cat\n")
    with pytest.raises(ClipkitError, match="fewer than two classes"):
        open_benchmark(folder)
    folder = write(tmp_path / "c", [{"npy": npy([1, 0])}], classnames=CLASSES, dataset_type="multilabel")
    with pytest.raises(ClipkitError, match=r"has \(2,\) labels for 3 classes"):
        open_benchmark(folder).truth()
