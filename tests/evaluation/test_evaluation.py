"""Evaluations: the same figures on any number of ranks, zero-shot on folders, what a run is measured on."""

import functools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.classification import class_folders
from clipkit.core import ClipkitError, gather_objects, process_group
from clipkit.data.sources import open_source
from clipkit.embedding import EncodeOptions, embed_source
from clipkit.evaluation import LabelledImages, SharedWork, evaluate_retrieval, evaluate_zeroshot, open_classes
from clipkit.metrics import retrieval_figures, retrieval_ranks
from clipkit.models import cast_for_inference, evaluating, load_model
from clipkit.training import open_validation
from clipkit.training.settings import ValidationConfig
from tests.conftest import make_pictures, tiny_model
from tests.distributed import run_two_ranks
from tests.samples import photo

# With BatchNorm, which the modes of modules matter to.
CONVOLUTIONS = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32, "head_width": 16}}


class Meeting:
    """Ranks as threads: a gather that waits for all of them."""

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.values = [None] * world_size

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


def on_ranks(world_size, call):
    """What ``call(rank=, world_size=, gather=)`` gives on each of so many ranks, or the error it raises."""
    meeting, found = Meeting(world_size), [None] * world_size

    def work(rank):
        try:
            among = {"world_size": world_size, "gather": functools.partial(meeting.gather, rank)}
            found[rank] = call(rank=rank, **among)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(scope="module")
def holed(tmp_path_factory) -> Path:
    """A list of 23 pictures with two captions each, of which three cannot be used."""
    listed = make_pictures(tmp_path_factory.mktemp("holed"), 23, captions=2, seed=5)
    for number in (0, 6, 7):
        (listed.parent / f"images/{number:03d}.png").write_bytes(b"no image")
    return listed


def make_classes(folder, count=17, names=("red_heart", "blue_star", "green_ring", "grey_square")):
    """Photos dealt out to sub-folders by class, unevenly."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        name = names[number] if number < len(names) else names[int(rng.integers(len(names)))]
        photo(number).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """17 photos in four classes, two broken files among them, and one photo that belongs to none."""
    folder = make_classes(tmp_path_factory.mktemp("classes") / "c")
    (folder / "blue_star" / "00a.png").write_bytes(b"no image")
    (folder / "red_heart" / "zz.jpg").write_text("words")
    photo(99).save(folder / "stray.png")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_retrieval_is_the_same_on_any_number_of_ranks(holed, batch_size, precision):
    model = cast_for_inference(tiny_model(), precision)
    source = open_source(holed)

    def evaluate(**among):
        return evaluate_retrieval(SharedWork(model, batch_size=batch_size, **among), source)

    alone = evaluate()
    assert alone.counts == {"images": 20, "captions": 40}
    assert [line["key"] for line in alone.left_out] == [f"images/{number:03d}.png" for number in (0, 6, 7)]
    assert alone.figures.keys() == alone.chance.keys()
    for world_size in (1, 2, 4, 9):  # of 9, some have no image
        assert on_ranks(world_size, evaluate) == [alone] * world_size


def test_retrieval_is_what_the_embeddings_of_one_process_say(holed, model):
    found = embed_source(open_source(holed), model, show=None)
    wanted = retrieval_figures(retrieval_ranks(found.image, found.text, found.image_of_text))
    assert evaluate_retrieval(SharedWork(model), open_source(holed)).figures == wanted


def test_an_unusable_image_shifts_no_other_into_another_batch(holed, model, monkeypatch):
    """Seen by the towers: every image with the same neighbours, whichever rank embeds it."""
    source = open_source(holed)
    sizes = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    options = EncodeOptions(sides=["image"], batch_size=4)
    whole = embed_source(source, model, options, show=None)
    assert sizes == [4] * 6  # those with gaps are filled up
    parts = [
        embed_source(source, model, options, rows=rows, show=None) for rows in (range(8), range(8, 12), range(12, 23))
    ]
    assert sizes[6:] == sizes[:6]
    assert np.array_equal(np.concatenate([part.image for part in parts]), whole.image)
    assert [row for part in parts for row in part.rows] == whole.rows


@pytest.mark.parametrize("templates", ["plain", "openai80"])
def test_zeroshot_is_the_same_on_any_number_of_ranks(classes, model, templates):
    images = open_classes(str(classes))

    def evaluate(**among):
        return evaluate_zeroshot(SharedWork(model, batch_size=3, **among), images, templates=templates)

    alone = evaluate()
    assert alone.counts == {"images": 17, "classes": 4}
    assert [line["key"] for line in alone.left_out] == ["blue_star/00a.png", "red_heart/zz.jpg", "stray.png"]
    assert set(alone.figures) == {"zeroshot_acc@1", "zeroshot_acc@5", "zeroshot_mean_per_class_recall"}
    assert alone.figures["zeroshot_acc@5"] == alone.chance["zeroshot_acc@5"] == 1
    assert alone.chance["zeroshot_acc@1"] == alone.chance["zeroshot_mean_per_class_recall"] == 1 / 4
    for world_size in (2, 4):
        assert on_ranks(world_size, evaluate) == [alone] * world_size


def test_zeroshot_counts_what_classify_says(classes, model):
    import clipkit

    rows = [row for row in clipkit.classify(classes, LABELS, model, prompts=["{}"]) if row["status"] == "ok"]
    rows = [row for row in rows if "/" in row["path"]]
    right = [row["label"] == row["path"].partition("/")[0].replace("_", " ") for row in rows]
    found = evaluate_zeroshot(SharedWork(model), open_classes(str(classes)), ks=[1])
    assert found.figures["zeroshot_acc@1"] == pytest.approx(np.mean(right))


LABELS = ["blue star", "green ring", "grey square", "red heart"]


def test_a_collapsed_model_scores_chance(classes, captioned, monkeypatch):
    model = tiny_model()
    one = torch.nn.functional.normalize(torch.ones(1, 32), dim=-1)
    monkeypatch.setattr(model, "encode_image", lambda pixels: one.repeat(len(pixels), 1))
    monkeypatch.setattr(model, "encode_text", lambda tokens: one.repeat(len(tokens), 1))
    for found in (
        evaluate_zeroshot(SharedWork(model), open_classes(str(classes)), templates="openai80", ks=(1, 2, 3)),
        evaluate_retrieval(SharedWork(model), open_source(captioned)),
    ):
        assert found.figures == pytest.approx(found.chance)


def test_folders_become_classes(tmp_path, classes, capsys):
    source = open_classes(str(classes)).source
    assert "has 4 classes; zeroshot_acc@5 counts all of them" in capsys.readouterr().err
    names, labels = class_folders(source)
    assert names == LABELS
    assert labels[-1] == -1
    assert [names[at] for at in labels[:-1]] == [source.key(i).split("/")[0].replace("_", " ") for i in range(19)]
    more = ["ball", "red_heart", *LABELS[:3]]
    assert class_folders(source, more)[0] == ["ball", "red heart", *LABELS[:3]]
    with pytest.raises(ClipkitError, match="folder 'red heart' is none of the classes \\(did you mean 'red hearts'"):
        class_folders(source, [*LABELS[:3], "red hearts"])
    deep = tmp_path / "deep"
    (deep / "cat" / "more").mkdir(parents=True)
    photo(1).save(deep / "cat" / "more" / "1.png")
    with pytest.raises(ClipkitError, match="has one sub-folder of images, 'cat'; name the folder that holds one per"):
        open_classes(str(deep))
    with pytest.raises(ClipkitError, match="has no sub-folders of images"):
        open_classes(str(deep / "cat" / "more"))
    (deep / "a_dog").mkdir()
    photo(2).save(deep / "a_dog" / "2.png")
    assert class_folders(open_source(deep))[0] == ["a dog", "cat"]
    (deep / "a dog").mkdir()
    photo(3).save(deep / "a dog" / "3.png")
    with pytest.raises(ClipkitError, match="folders 'a dog' and 'a_dog' are both called 'a dog'"):
        open_classes(str(deep))


def test_an_error_on_one_rank_is_an_error_on_all(holed, model):
    class Fails:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def __len__(self):
            return len(self.source)

        def __getitem__(self, i):
            if i == 20:
                raise ClipkitError("the disk is gone")
            return self.source[i]

    source = Fails(open_source(holed))
    found = on_ranks(3, lambda **among: evaluate_retrieval(SharedWork(model, batch_size=4, **among), source))
    assert [str(error) for error in found] == ["the disk is gone"] * 3
    assert all(isinstance(error, ClipkitError) for error in found)


def test_nothing_usable_is_said_on_all_ranks(tmp_path, model):
    (tmp_path / "list.tsv").write_text("path\tcaption\nnone.png\ta cat\nnot.png\ta dog\n")
    found = on_ranks(
        2, lambda **among: evaluate_retrieval(SharedWork(model, **among), open_source(tmp_path / "list.tsv"))
    )
    assert all("can be evaluated; the first: none.png" in str(error) for error in found)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    images = open_classes(str(tmp_path))
    found = on_ranks(2, lambda **among: evaluate_zeroshot(SharedWork(model, **among), images))
    assert all("can be evaluated; the first: a/x.png" in str(error) for error in found)


def config_of(holed, classes, **more):
    return ValidationConfig(retrieval=str(holed), zeroshot=str(classes), **more)


def on_two(rank, world_size, holed, classes, model_dir):
    """Both evaluations as a training run makes them, over gloo."""
    assert gather_objects(rank) == [0, 1]
    validation = open_validation(config_of(holed, classes))
    assert validation is not None
    figures, left_out = validation.run(load_model(model_dir), rank=rank, world_size=world_size)
    two, _ = class_folders(open_source(classes))
    work = SharedWork(load_model(model_dir), rank=rank, world_size=world_size)
    few = evaluate_zeroshot(work, LabelledImages.in_folders(open_source(classes), two))
    return json.dumps([figures, left_out, few.figures])


def test_two_processes_find_what_the_command_prints(run, holed, classes, model_dir):
    ranks = run_two_ranks(functools.partial(on_two, holed=holed, classes=classes, model_dir=model_dir))
    assert ranks[0] == ranks[1]
    figures, left_out, few = json.loads(ranks[0])
    retrieval = run("evaluate", "retrieval", holed, "--model", model_dir, "--format", "json")
    zeroshot = run("evaluate", "zeroshot", classes, "--model", model_dir, "--format", "json")
    assert (retrieval.status, zeroshot.status) == (1, 1)
    printed = json.loads(retrieval.out) | json.loads(zeroshot.out)
    assert figures == {name: printed[name] for name in figures}
    assert len(figures) == 13
    assert few == {name: printed[name] for name in few}
    assert len(left_out) == 6


def test_what_is_measured_is_left_as_it_was(holed, classes, capsys):
    model = tiny_model(**CONVOLUTIONS).train()
    model.backbone.visual.eval()  # as a locked tower is
    modes = [module.training for module in model.modules()]
    validation = open_validation(config_of(holed, classes))
    assert validation is not None
    capsys.readouterr()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, _ = validation.run(model)
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert validation.run(model)[0] == first
    assert capsys.readouterr().err == "", "what is said of the data is said once, when it is opened"


def test_precision_is_the_commands(run, holed, model_dir):
    for precision in ("bf16", "auto"):
        validation = open_validation(ValidationConfig(retrieval=str(holed), precision=precision))
        assert validation is not None
        figures, _ = validation.run(load_model(model_dir))
        call = ["evaluate", "retrieval", holed, "--model", model_dir, "--precision", precision, "--format", "json"]
        assert figures.items() <= json.loads(run(*call).out).items()


def test_what_cannot_be_validated_is_found_when_it_is_opened(holed, classes, tmp_path):
    def refused(**settings):
        with pytest.raises(ClipkitError) as caught:
            open_validation(ValidationConfig(**settings))
        return str(caught.value)

    assert open_validation(ValidationConfig()) is None
    assert "no such source" in refused(retrieval=str(tmp_path / "none"))
    assert "no captions" in refused(retrieval=str(classes))
    assert "no such source" in refused(zeroshot=str(tmp_path / "none"))
    assert "is no folder of images" in refused(zeroshot=str(holed))
    line = refused(retrieval=str(holed), best="val_image_retrieval_recall@1")
    assert "is no figure (did you mean 'image_retrieval_recall@1'?); there are image_retrieval_recall@1, " in line
    assert "did you mean 'zeroshot_acc@1'" in refused(zeroshot=str(classes), best="zeroshot_acc1")
    assert "is no figure" in refused(zeroshot=str(classes), best="image_retrieval_recall@1")
    assert "set validation.retrieval or validation.zeroshot too" in refused(best="zeroshot_acc@1")
    assert open_validation(ValidationConfig(zeroshot=str(classes), best="zeroshot_mean_per_class_recall"))


def test_modes_come_back_after_an_error(model):
    model.backbone.visual.train()
    try:
        modes = [module.training for module in model.modules()]
        with pytest.raises(ClipkitError), evaluating(model):
            assert not any(module.training for module in model.modules())
            raise ClipkitError
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_the_command_on_folders_of_classes(run, refused, classes, holed, model_dir, tmp_path):
    folder = make_classes(tmp_path / "c", 9, ("cat", "dog"))
    Image.new("RGB", (9, 9)).save(folder / "dog" / "small.png")
    call = ["evaluate", "zeroshot", folder, "--model", model_dir]
    result = run(*call)
    assert result.status == 0
    assert "10 images, 2 classes" in result.out
    assert "zeroshot_mean_per_class_recall" in result.out
    assert "has 2 classes; zeroshot_acc@5 counts all of them" in result.err
    shown = json.loads(run(*call, "-k", 1, "--templates", "openai80", "--format", "json").out)
    assert (shown["chance_zeroshot_acc@1"], shown["classes"], shown["left_out"]) == (0.5, 2, 0)
    assert "zeroshot_acc@5" not in shown
    assert "did you mean 'plain'" in refused(*call, "--templates", "plane")
    assert "are of lists" in refused(*call, "--image-column", "x")
    assert "is no folder of images" in refused("evaluate", "zeroshot", holed, "--model", model_dir)
    assert "--templates is of zeroshot" in refused(
        "evaluate", "retrieval", holed, "--model", model_dir, "--templates", "plain"
    )
    assert "name the model" in refused("evaluate", "zeroshot", folder)


def test_under_torchrun_one_process_prints(run, holed, model_dir):
    call = ["evaluate", "retrieval", str(holed), "--model", str(model_dir), "--batch-size", "4", "--format", "json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
    wrapped = ["bash", "-c", f"{sys.executable} -m clipkit {' '.join(call)}; test $? = 1"]
    about = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *wrapped], capture_output=True, text=True, check=False, env=about)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*call).out
    assert done.stderr.count("3 could not be used") == 1


def test_processes_wait_for_what_the_first_does_alone(monkeypatch):
    """Half an hour, which is what gloo waits when nothing is said, is less than a large index takes."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, timeout: asked.append((*args, timeout)))
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    for name, value in (("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    with process_group() as among:
        assert among == (1, 2)
    ((backend, patience),) = asked
    assert backend == "gloo"
    assert patience.days >= 1
