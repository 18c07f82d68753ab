"""`clipkit evaluate`: choices, several labels, intervals, baselines, CLIP_benchmark's definitions, embeddings."""

import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipkit.data.sources import open_source
from clipkit.embedding import EncodeOptions, cached_images, cached_texts
from clipkit.embedding.store import part_table_path, part_vectors_path
from clipkit.metrics import (
    chance_of,
    choice_scores,
    clip_benchmark_choice,
    mean_average_precision,
    retrieval_figures,
    retrieval_ranks,
    winoground_per_sample,
)
from clipkit.models import DualEncoder, LazyModel
from clipkit.search import Index, delete_rows
from clipkit.storage import Cache
from tests.conftest import tiny_model
from tests.evaluation.test_benchmark_data import CLASSES, npy, write
from tests.samples import photo
from tests.search.test_quantize import peak


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The same questions in all forms, and the vectors that answer them."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "im").mkdir()
    for number in range(6):
        photo(number, 40, 32).save(folder / "im" / f"{number}.png")
    said = [(f"a red thing {n}", f"a blue thing {n * 7 % 5}")[:: 1 - 2 * (n % 2)] for n in range(9)]
    rows = [{"image": f"im/{n % 6}.png", "caption": a, "negative": b} for n, (a, b) in enumerate(said)]
    lines = ["image\tcaption\tnegative", *("\t".join(row.values()) for row in rows)]
    (folder / "list.tsv").write_text("\n".join(lines) + "\n")
    shipped = {
        str(3 * n): {"filename": f"{n % 6}.png", "caption": a, "negative_caption": b} for n, (a, b) in enumerate(said)
    }
    (folder / "swap.json").write_text(json.dumps(shipped))
    pairs = [
        {"image_0": f"im/{n % 6}.png", "caption_0": a, "image_1": f"im/{(n + 1) % 6}.png", "caption_1": b}
        for n, (a, b) in enumerate(said)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder, said


def vectors_of(folder, said, model_dir):
    lazy = LazyModel(model_dir, Cache(None), precision="fp32")
    image = cached_images(open_source(folder / "im"), lazy, Cache(None), EncodeOptions()).image
    text = cached_texts([caption for both in said for caption in both], lazy, Cache(None)).reshape(len(said), 2, -1)
    return image, text


def test_choices_in_all_forms_say_the_same(run, asked, model_dir):
    folder, said = asked
    image, text = vectors_of(folder, said, model_dir)
    own = image[np.arange(9) % 6]
    right = (np.einsum("nd,nd->n", own, text[:, 0]) > np.einsum("nd,nd->n", own, text[:, 1])).mean()
    call = ["--model", model_dir, "--format", "json", "--compat", "clip_benchmark"]
    found = [
        json.loads(run("evaluate", "choice", *where, *call).out)
        for where in ([folder / "list.tsv"], [folder / "swap.json", "--image-root", folder / "im"])
    ]
    assert found[0] == found[1]
    assert found[0]["choice_acc"] == pytest.approx(right)
    assert (found[0]["chance_choice_acc"], found[0]["instances"], found[0]["left_out"]) == (0.5, 9, 0)
    assert found[0]["choice_acc_low"] < right < found[0]["choice_acc_high"]
    assert found[0]["clip_benchmark_text_acc"] == pytest.approx(right)
    pairs = np.stack([own, image[(np.arange(9) + 1) % 6]], axis=1)
    wanted = {name: values.mean() for name, values in winoground_per_sample(choice_scores(pairs, text)).items()}
    shown = json.loads(run("evaluate", "choice", folder / "pairs.jsonl", *call).out)
    assert {name: shown[name] for name in wanted} == pytest.approx(wanted)
    assert shown["chance_winoground_group"] == pytest.approx(1 / 6)
    for name, value in clip_benchmark_choice(pairs, text).items():
        assert shown[f"clip_benchmark_{name}"] == pytest.approx(value)


def test_choices_from_shards(run, refused, model_dir, tmp_path, asked):
    members = [{"txt": f"a red thing {n}\na blue thing {n}".encode()} for n in range(5)]
    members.append({"txt": b"alone"})
    folder = write(tmp_path / "d", members, dataset_type="image_caption_selection")
    result = run("evaluate", "choice", folder, "--model", model_dir, "--format", "json")
    assert result.status == 1
    assert "s00005: has 1 captions, and a choice is between two" in result.err
    assert json.loads(result.out)["instances"] == 5
    assert "is a dataset for choice" in refused("evaluate", "retrieval", folder, "--model", model_dir)
    (folder / "dataset_type.txt").write_text("retrieval")
    assert json.loads(run("evaluate", "choice", folder, "--model", model_dir, "--format", "json").out)["instances"] == 5
    listed = asked[0] / "list.tsv"
    members = [{"txt": b"a\nb"}, {"txt": b""}, {"txt": b"caf\xe9"}]
    result = run("evaluate", "choice", write(tmp_path / "e", members, dataset_type="retrieval"), "--model", model_dir)
    assert "2 could not be used; the first: s00001: the sample has no caption" in result.err  # each of them once
    assert "a choice is between two" in refused("evaluate", "choice", listed, "--model", model_dir, "-k", 1)
    assert "poses no choices" in refused("evaluate", "choice", asked[0] / "im", "--model", model_dir)
    (tmp_path / "no.tsv").write_text("image\tcaption\n1.png\tx\n")
    assert "has no negative column" in refused("evaluate", "choice", tmp_path / "no.tsv", "--model", model_dir)


def test_what_cannot_be_used_of_the_choices_is_left_out(run, refused, asked, model_dir, tmp_path):
    folder = asked[0]
    rows = [["a.png", "x", "y"], [str(folder / "im/1.png"), "a cat", "a dog"], [str(folder / "im/2.png"), "a cat", ""]]
    listed = tmp_path / "l.tsv"
    listed.write_text("\n".join("\t".join(row) for row in [["image", "caption", "negative"], *rows]) + "\n")
    result = run("evaluate", "choice", listed, "--model", model_dir, "--format", "json")
    assert result.status == 1
    assert json.loads(result.out)["instances"] == 1
    assert "2 could not be used; the first: a.png" in result.err
    listed.write_text("image\tcaption\tnegative\nb.png\tx\t\n")
    assert "the first: row 1: has no negative" in refused("evaluate", "choice", listed, "--model", model_dir)
    listed.write_text("image\tcaption\tnegative\nb.png\tx\ty\n")
    assert "b.png" in refused("evaluate", "choice", listed, "--model", model_dir)


def test_several_labels_are_measured_by_average_precision(run, refused, model_dir, tmp_path):
    rng = np.random.default_rng(0)
    wanted = (rng.random((11, 3)) < 0.4).astype(int)
    members = [{"npy": npy(row)} for row in wanted]
    members.append({"json": b"{}"})
    folder = write(tmp_path / "d", members, classnames=CLASSES, dataset_type="multilabel")
    call = ["evaluate", "zeroshot", folder, "--model", model_dir, "--compat", "clip_benchmark"]
    result = run(*call, "--format", "json", "--out", tmp_path / "r.json")
    assert result.status == 1
    assert "1 could not be used; the first: s00011: its class is not told" in result.err
    shown = json.loads(result.out)
    lazy = LazyModel(model_dir, Cache(None), precision="fp32")
    image = cached_images(open_source(f"{folder}/test/"), lazy, Cache(None), EncodeOptions()).image[:11]
    scores = image @ cached_texts(["cat", "dog", "bird"], lazy, Cache(None)).T
    name = "zeroshot_mean_average_precision"
    assert shown[name] == pytest.approx(mean_average_precision(scores, wanted == 1))
    assert shown[f"chance_{name}"] == chance_of(wanted == 1)
    assert shown[f"{name}_low"] <= shown[name] <= shown[f"{name}_high"]
    assert shown["clip_benchmark_mean_average_precision"] == pytest.approx(shown[name], abs=1e-6)
    metrics = json.loads((tmp_path / "r.json").read_text())[0]["metrics"]
    assert metrics["mean_average_precision"] == pytest.approx(shown[name])
    assert "leave -k out" in refused(*call, "-k", 1)


def test_a_collapsed_model_scores_exactly_chance_in_every_task(run, asked, captioned, tmp_path, monkeypatch, model_dir):
    one = torch.nn.functional.normalize(torch.ones(1, 32), dim=-1)
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, pixels: one.repeat(len(pixels), 1))
    monkeypatch.setattr(DualEncoder, "encode_text", lambda self, tokens: one.repeat(len(tokens), 1))
    several = write(
        tmp_path / "d",
        [{"npy": npy([n % 2, n % 3 == 0, 1])} for n in range(7)],
        classnames=CLASSES,
        dataset_type="multilabel",
    )
    for task, source in (
        ("choice", asked[0] / "list.tsv"),
        ("choice", asked[0] / "pairs.jsonl"),
        ("zeroshot", several),
        ("retrieval", captioned),
    ):
        found = json.loads(run("evaluate", task, source, "--model", model_dir, "--format", "json").out)
        names = [name for name in found if f"chance_{name}" in found]
        assert names
        assert {name: found[name] for name in names} == {name: found[f"chance_{name}"] for name in names}
    assert found["image_retrieval_median_rank"] == 6.5
    assert found["image_retrieval_mrr"] == pytest.approx(np.mean(1 / np.arange(1, 13)))


def test_intervals_and_ranks_of_retrieval(run, captioned, model_dir):
    call = ["evaluate", "retrieval", captioned, "--model", model_dir, "-k", 1, "-k", 50]
    result = run(*call, "--format", "json", "--compat", "clip_benchmark")
    shown = json.loads(result.out)
    assert "there are 12 images and 36 captions; recall@50" in result.err
    figures = ["image_retrieval_recall@1", "image_retrieval_mrr", "text_retrieval_median_rank"]
    for name in figures:
        assert shown[f"{name}_low"] <= shown[name] <= shown[f"{name}_high"], name
    assert shown["clip_benchmark_image_retrieval_recall@1"] == pytest.approx(shown["image_retrieval_recall@1"])
    assert "clip_benchmark_image_retrieval_recall@50" not in shown
    assert shown["text_retrieval_recall@50"] == 1
    table = run(*call).out
    assert "image_retrieval_median_rank" in table
    assert "[" in table


def test_a_model_beside_itself_differs_by_nothing(run, captioned, model_dir, tmp_path):
    call = ["evaluate", "retrieval", captioned, "--model", model_dir, "--model", model_dir]
    rows = json.loads(run(*call, "--format", "json").out)
    twice = f"{model_dir} (2)"
    assert len(rows) == 10
    for row in rows:
        assert row[twice] == row[str(model_dir)]
        assert [row[f"{twice}_difference{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
        assert row[f"{twice}_low"] <= row[twice] <= row[f"{twice}_high"]


def test_baselines(run, refused, captioned, asked, model_dir, tmp_path, monkeypatch):
    tiny_model(seed=4).save(tmp_path / "other")
    first, file = ["evaluate", "retrieval", captioned, "--model", model_dir], tmp_path / "base.json"
    assert run(*first, "--out", file).status == 0
    same = run(*first, "--baseline", file, "--format", "json")
    assert same.status == 0
    shown = json.loads(same.out)
    assert shown["regressions"] == []
    assert shown["difference_image_retrieval_mrr"] == shown["difference_image_retrieval_mrr_low"] == 0
    told = json.loads(file.read_text())
    told[0]["clipkit"]["figures"]["image_retrieval_recall@10"] = 2.0
    samples = told[0]["clipkit"].pop("samples")
    file.write_text(json.dumps(told))
    worse = run(*first, "--baseline", file)
    assert worse.status == 1
    assert worse.err.count("regression: ") == 1
    assert "image_retrieval_recall@10" in worse.err
    assert "not paired" in worse.err
    assert run(*first, "--baseline", file, "--tolerance", 1.5).status == 0
    del told[0]["clipkit"]
    told[0]["metrics"] = {"image_retrieval_recall@5": 3.0}
    file.write_text(json.dumps(told[0]))  # as CLIP_benchmark writes it
    assert run(*first, "--baseline", file).err.count("regression: ") == 1
    assert samples["form"] == "retrieval"
    # One that sorts everything the wrong way is worse on the same images, and says so of every figure that shows it.
    model = run(*first, "--baseline", tmp_path / "other", "--format", "json")
    other = json.loads(run("evaluate", "retrieval", captioned, "--model", tmp_path / "other", "--format", "json").out)
    mine = json.loads(run(*first, "--format", "json").out)
    shown = json.loads(model.out)
    name = "image_retrieval_mrr"
    assert shown[f"baseline_{name}"] == other[name]
    assert shown[f"difference_{name}"] == pytest.approx(mine[name] - other[name])
    assert model.status == bool(shown["regressions"])
    choice = ["evaluate", "choice", asked[0] / "list.tsv", "--model", model_dir]
    assert "name one with --baseline" in refused(*first, "--tolerance", 0.1)
    assert "--split is of a dataset" in refused(*first, "--split", "val")
    assert "the baseline has no choice on" in refused(*choice, "--baseline", file)
    two = tmp_path / "two.json"
    assert run(*first, "--model", tmp_path / "other", "--out", two).status == 0
    monkeypatch.setattr(
        "clipkit.evaluation.tasks.evaluate_model", None
    )  # what cannot be compared is not measured first
    assert "holds several results of retrieval" in refused(*first, "--baseline", two)
    (tmp_path / "no.json").write_text("[1]")
    assert "holds no results" in refused(*first, "--baseline", tmp_path / "no.json")


def test_embeddings_and_an_index_say_what_the_source_says(run, refused, embeddings, index, pictures, model_dir):
    call = ["--format", "json", "-k", 1, "-k", 5]
    stored = json.loads(run("evaluate", "retrieval", embeddings, *call, "--compat", "clip_benchmark").out)
    indexed = json.loads(run("evaluate", "retrieval", index, *call, "--through-index").out)
    source = json.loads(run("evaluate", "retrieval", pictures, "--model", model_dir, *call).out)
    for name in source:
        if name.startswith(("image_", "text_")):
            assert stored[name] == pytest.approx(source[name], rel=0.1, abs=0.03), name  # float16
            assert indexed[name] == stored[name], name
    assert stored["model"] == source["model"]
    for side in ("image", "text"):  # a flat index answers exactly
        assert indexed[f"served_{side}_retrieval_recall@5"] == pytest.approx(
            stored[f"{side}_retrieval_recall@5"], abs=0.05
        )
        assert 0.9 < indexed[f"{side}_retrieval_served_share@5"] <= 1
        assert indexed[f"{side}_retrieval_served_share@5_low"] <= 1
    assert "--through-index is of retrieval on an index" in refused(
        "evaluate", "retrieval", embeddings, "--through-index"
    )
    assert (
        json.loads(run("evaluate", "retrieval", embeddings, *call, "--model", model_dir).out)["model"]
        == stored["model"]
    )


def test_another_model_than_the_embeddings_is_refused(refused, embeddings, tmp_path):
    tiny_model(seed=4).save(tmp_path / "other")
    assert "was made with model" in refused("evaluate", "retrieval", embeddings, "--model", tmp_path / "other")


def test_classes_of_embeddings_are_the_folders(run, model_dir, tmp_path):
    for number in range(9):
        folder = tmp_path / "c" / ("red_heart", "sea", "sky")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / f"{number}.png")
    assert (
        run("embed", tmp_path / "c", "--model", model_dir, "--precision", "fp32", "--out", tmp_path / "emb").status == 0
    )
    call = ["evaluate", "zeroshot", "--format", "json"]
    stored = json.loads(run(*call, tmp_path / "emb").out)
    source = json.loads(run(*call, tmp_path / "c", "--model", model_dir).out)
    assert stored["images"] == source["images"] == 9
    assert stored["zeroshot_acc@1"] == pytest.approx(source["zeroshot_acc@1"], abs=0.12)
    assert stored["model"] == source["model"]


def test_several_captions_of_one_image_in_embeddings(run, captioned, model_dir, tmp_path):
    made = run(
        "embed", captioned, "--model", model_dir, "--precision", "fp32", "--part-size", 5, "--out", tmp_path / "e"
    )
    assert made.status == 0, made
    from clipkit.embedding import Embeddings

    opened = Embeddings.open(tmp_path / "e")
    image, text = opened.vectors("image"), opened.vectors("text")
    wanted = retrieval_figures(retrieval_ranks(image, text, opened.table("text")["image_row"].to_numpy()))
    found = json.loads(run("evaluate", "retrieval", tmp_path / "e", "--format", "json").out)
    assert {name: found[name] for name in wanted} == wanted
    assert (found["images"], found["captions"]) == (12, 36)
    assert run("build", tmp_path / "e", "--out", tmp_path / "i").status == 0
    assert json.loads(run("evaluate", "retrieval", tmp_path / "i", "--format", "json").out) == found
    # Taken away from the index, images and their captions are no items any more.
    listed = captioned.read_text().splitlines()
    kept = [line for line in listed if not line.startswith(("images/003", "images/007"))]
    (captioned.parent / "fewer.tsv").write_text("\n".join(kept) + "\n")
    assert run("embed", captioned.parent / "fewer.tsv", "--model", model_dir, "--out", tmp_path / "f").status == 0
    assert run("update", tmp_path / "i", tmp_path / "f", "--gone").status == 0
    fewer = json.loads(run("evaluate", "retrieval", tmp_path / "i", "--through-index", "--format", "json").out)
    assert (fewer["images"], fewer["captions"]) == (10, 30)
    assert fewer["served_text_retrieval_recall@1"] == pytest.approx(fewer["text_retrieval_recall@1"])


def test_a_result_is_of_its_options(run, captioned, model_dir):
    call = ["evaluate", "retrieval", captioned, "--model", model_dir, "--format", "json"]
    plain, compat = run(*call), run(*call, "--compat", "clip_benchmark")
    assert "clip_benchmark_image_retrieval_recall@1" not in json.loads(plain.out)
    assert "clip_benchmark_image_retrieval_recall@1" in json.loads(compat.out)
    assert run(*call) == plain
    assert json.loads(run(*call, "--threads", 0, "--no-cache").out) == json.loads(plain.out)


def enlarge(folder, images, every, dim=128, part=20_000):
    """Make an embeddings folder hold so many images, and a caption for one of `every`."""
    rng = np.random.default_rng(0)
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = [{"name": f"{n:04d}", "images": part, "captions": part // every} for n in range(images // part)]
    for number, each in enumerate(parts):
        vectors = rng.normal(size=(part, dim)).astype(np.float32)
        own = np.arange(0, part, every)
        said = vectors[own] + 4 * rng.normal(size=(len(own), dim)).astype(np.float32)
        for side, rows in (("image", vectors), ("text", said)):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            np.save(part_vectors_path(folder, side, each["name"]), unit.astype(np.float16))
        ids = np.arange(number * part, (number + 1) * part)
        table = {
            "id": ids,
            "key": ids.astype(str),
            "image_path": ids.astype(str),
            "caption": pa.nulls(part, pa.string()),
        }
        pq.write_table(pa.table(table), part_table_path(folder, "image", each["name"]))
        table = {"caption": own.astype(str), "image_id": ids[own], "image_row": own}
        pq.write_table(pa.table(table), part_table_path(folder, "text", each["name"]))
    counts = {**manifest["counts"], "images": images, "captions": images // every}
    manifest |= {"sides": ["image", "text"], "dim": dim, "parts": parts, "counts": counts}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_does_not_hold_what_is_compared(embeddings, tmp_path):
    """Seen from outside: 200,000 images and 25,000 captions, whose scores would be 20 GB and whose vectors 115 MB."""
    most = []
    for images in (40_000, 200_000):
        folder = tmp_path / str(images)
        shutil.copytree(embeddings, folder)
        enlarge(folder, images, 8)
        out = tmp_path / f"{images}.json"
        call = [sys.executable, "-m", "clipkit", "evaluate", "retrieval", folder, "--out", out, "--no-cache"]
        most.append(peak([str(part) for part in call]))
        (found,) = json.loads(out.read_text())
        assert found["clipkit"]["counts"] == {"images": images, "captions": images // 8}
        assert 0 < found["metrics"]["image_retrieval_recall@10"] < 1
    grown = (most[1] - most[0]) / 160_000
    assert grown < 256, f"{grown:.0f} bytes for each image more; its vector alone would be 512 in float32"
    assert most[1] < 700 * 2**20


def test_what_an_index_does_not_answer_is_not_served(run, index, monkeypatch):
    whole = Index.search

    def half(self, vectors, k=10, side="image", **how):
        found = whole(self, vectors, k, side, **how)
        found.positions[::2] = -1
        return found

    monkeypatch.setattr(Index, "search", half)
    shown = json.loads(run("evaluate", "retrieval", index, "--through-index", "-k", 48, "--format", "json").out)
    assert shown["image_retrieval_recall@48"] == 1
    for side in ("image", "text"):
        assert shown[f"served_{side}_retrieval_recall@48"] == shown[f"{side}_retrieval_served_share@48"] == 0.5
        assert shown[f"served_{side}_retrieval_recall@48_low"] < 0.5 < shown[f"served_{side}_retrieval_recall@48_high"]


def test_an_index_whose_images_are_gone_has_nothing_to_be_measured(refused, index, tmp_path):
    shutil.copytree(index, tmp_path / "index")
    images = Index.open(index).column("id", Index.open(index).positions("image"))
    delete_rows(tmp_path / "index", [int(each) for each in images])
    for task in ("retrieval", "zeroshot"):
        assert "holds no images" in refused("evaluate", task, tmp_path / "index")
