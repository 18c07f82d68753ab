"""Questions of several parts are the arithmetic done by hand; pages, thresholds and twins."""

import json

import numpy as np
import pytest

from clipkit.core import ClipkitError
from clipkit.embedding import Embeddings
from clipkit.search import Index, Question, SearchOptions, ask, open_questions
from clipkit.search.query import QueryPart, fused_vector


@pytest.fixture(scope="module")
def opened(index):
    return Index.open(index)


@pytest.fixture(scope="module")
def stored(embeddings):
    return Embeddings.open(embeddings).vectors()


def parts(count, *weights):
    vectors = np.random.default_rng(4).normal(size=(count, 32))
    return [QueryPart(vector, weight) for vector, weight in zip(vectors, weights, strict=True)]


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_early_fusion_is_one_vector(opened, stored):
    asked = parts(3, 1.0, 0.5, -0.25)
    by_hand = unit(sum(part.weight * unit(part.vector) for part in asked))
    assert np.allclose(fused_vector(asked), by_hand, atol=1e-6)
    found = ask(opened, asked, SearchOptions(7))
    scores = stored @ by_hand
    assert found.positions[0].tolist() == np.argsort(-scores, kind="stable")[:7].tolist()
    assert np.allclose(found.scores[0], np.sort(scores)[::-1][:7], atol=1e-5)


def test_fusion_by_score_and_by_rank(opened, stored):
    """The index is small: every row is a candidate, and the formulas can be written out over all of them."""
    asked = parts(3, 1.0, 2.0, -0.5)
    cosines = np.stack([stored @ unit(part.vector) for part in asked])
    weights = np.array([part.weight for part in asked])
    standard = (cosines - cosines.mean(axis=1, keepdims=True)) / cosines.std(axis=1, keepdims=True)
    ranks = 1 + np.array([[(row > value).sum() for value in row] for row in cosines])
    for fusion, scores in (("score", weights @ standard), ("rank", weights @ (1 / (60 + ranks)))):
        found = ask(opened, asked, SearchOptions(48, fusion=fusion))
        assert found.positions[0].tolist() == np.argsort(-scores, kind="stable").tolist(), fusion
        assert np.allclose(found.scores[0], np.sort(scores)[::-1], atol=1e-5)


def test_a_single_part_is_the_plain_search(opened):
    (part,) = parts(1, 3.0)
    plain = opened.search(unit(part.vector)[None], 5)
    for fusion in ("early", "score", "rank"):
        assert ask(opened, [part], SearchOptions(5, fusion=fusion)).positions.tolist() == plain.positions.tolist()


def test_pages_put_together_are_the_whole(opened):
    asked = parts(1, 1.0)
    whole = ask(opened, asked, SearchOptions(48)).positions[0].tolist()
    pages = [ask(opened, asked, SearchOptions(10, offset=start)).positions[0].tolist() for start in range(0, 60, 10)]
    assert [len(page) for page in pages] == [10, 10, 10, 10, 8, 0]
    assert [position for page in pages for position in page] == whole


def test_thresholds_and_filters(opened):
    asked = parts(1, 1.0)
    whole = ask(opened, asked, SearchOptions(48))
    level = float(whole.scores[0][6])
    assert (
        ask(opened, asked, SearchOptions(48, min_score=level)).positions[0].tolist() == whole.positions[0][:7].tolist()
    )
    kept = ask(opened, asked, SearchOptions(48, where='"red" in caption', min_score=level)).positions[0]
    by_hand = [p for p in whole.positions[0][:7] if "red" in opened.rows([p])[0]["caption"]]
    assert kept.tolist() == by_hand


@pytest.mark.parametrize("k", [1, 3, 48])
def test_of_twins_the_best_stays(opened, stored, k):
    asked = parts(1, 1.0)
    whole = ask(opened, asked, SearchOptions(48)).positions[0]
    captions = [row["caption"] for row in opened.rows(whole)]
    by_column = [p for at, p in enumerate(whole) if captions[at] not in captions[:at]][:k]
    assert ask(opened, asked, SearchOptions(k, collapse="caption")).positions[0].tolist() == by_column
    near = []
    for position in whole:
        if all(unit(stored[position]) @ unit(stored[other]) < 0.9 for other in near):
            near.append(position)
    assert ask(opened, asked, SearchOptions(k, collapse=0.9)).positions[0].tolist() == near[:k]
    assert len(near) < 48


def test_what_cannot_be_asked(opened):
    with pytest.raises(ClipkitError, match="cancel each other"):
        ask(opened, [QueryPart(np.ones(32)), QueryPart(np.ones(32), -1.0)])
    with pytest.raises(ClipkitError, match="length zero"):
        ask(opened, [QueryPart(np.zeros(32))])
    with pytest.raises(ClipkitError, match="needs a text"):
        ask(opened, [])
    with pytest.raises(ClipkitError, match="needs a part that is wanted"):
        ask(opened, parts(2, -1.0, -1.0), SearchOptions(fusion="rank"))
    with pytest.raises(ClipkitError, match="no column 'size'"):
        ask(opened, parts(1, 1.0), SearchOptions(collapse="size"))
    for fusion in ("early", "score", "rank"):
        for size in (1, 16, 33):  # one number would be taken off every dimension
            with pytest.raises(ClipkitError, match=rf"shape \({size},\) does not fit an index of dimension 32"):
                ask(opened, [*parts(1, 1.0), QueryPart(np.ones(size))], SearchOptions(fusion=fusion))
        for vector, weight in ((np.full(32, np.nan), -1.0), (np.arange(32.0), np.nan), (np.arange(32.0), np.inf)):
            with pytest.raises(ClipkitError, match="NaN or infinity"):
                ask(opened, [*parts(1, 1.0), QueryPart(vector, weight)], SearchOptions(fusion=fusion))


def test_the_command_asks_with_all_of_it(run, index, pictures, model, tmp_path):
    picture = pictures.parent / "images" / "004.png"
    np.save(tmp_path / "v.npy", model.embed_texts(["a blue star"])[0])
    call = ["search", index, "a red heart", "--image", picture, "--vector", tmp_path / "v.npy", "--minus", "a circle"]
    rows = json.loads(run(*call, "--weights", "1,0.5,2,0.25", "-k", 4, "--with-vectors", "--format", "json").out)
    text, image = model.embed_texts(["a red heart", "a circle", "a blue star"]), model.embed_images([picture])[0]
    by_hand = unit(text[0] + 0.5 * image + 2 * text[2] - 0.25 * text[1])
    assert [row["score"] for row in rows] == pytest.approx(
        [np.array(row["vector"]) @ by_hand for row in rows], abs=1e-3
    )
    page = json.loads(run(*call, "--weights", "1,0.5,2,0.25", "-k", 2, "--page", 2, "--format", "json").out)
    assert [row["rank"] for row in page] == [3, 4]
    assert [row["key"] for row in page] == [row["key"] for row in rows[2:]]


def test_a_file_of_questions(run, refused, index, pictures, tmp_path):
    lines = [{"text": "a red heart"}, {"text": ["a", "b"], "minus": "c", "weights": [1, 2, 3]}, {"vector": [1.0] * 32}]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows = json.loads(run("search", index, "--file", tmp_path / "q.jsonl", "-k", 2, "--format", "json").out)
    assert [(row["query"], row["rank"]) for row in rows] == [(n, r) for n in (1, 2, 3) for r in (1, 2)]
    assert rows[2]["question"] == "a + b - c"
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert [question.told for question in open_questions(tmp_path / "q.jsonl")] == ["a\u2028b\x85c"]
    (tmp_path / "q.txt").write_text("a red heart\r\n\na blue star\n")
    assert [question.told for question in open_questions(tmp_path / "q.txt")] == ["a red heart", "a blue star"]
    for text, said in {
        '{"txt": "a"}': "line 1: no field 'txt' in a question (did you mean 'text'?)",
        '{"text": "a"}\n{"text": "a", "weights": [1, 2]}': "line 2: the question has 1 parts and 2 weights",
        "[1]": "is an object",
        '{"vector": 5}': "line 1: a question has texts",
        '{"vector": {"x": 1}}': "line 1: a question has texts",
        '{"vector": [null]}': "line 1: a question has texts",
        '{"vector": "x.npy"}': "line 1: could not convert",
        '{"text": "a"}\n{"text": "a", "weights": 1}': "line 2: a question has texts",
        '{"image": 5}': "line 1: a question has texts",
        "{": "line 1",
        "": "holds no question",
    }.items():
        (tmp_path / "bad.jsonl").write_text(text)
        assert said in refused("search", index, "--file", tmp_path / "bad.jsonl")
    assert "no .npy file" in refused("search", index, "--vector", tmp_path / "q.txt")
    (tmp_path / "none.npy").touch()
    assert "no .npy file" in refused("search", index, "--vector", tmp_path / "none.npy")
    np.savez(tmp_path / "more.npz", np.ones(32))
    assert "archive of arrays" in refused("search", index, "--vector", tmp_path / "more.npz")
    np.save(tmp_path / "two.npy", np.zeros((2, 32)))
    assert "shape (2, 32)" in refused("search", index, "--vector", tmp_path / "two.npy")


def test_the_contact_sheet_shows_pictures_and_names_what_is_missing(run, index, pictures, tmp_path):
    call = ["search", index, "a red heart", "-k", 5, "--html", tmp_path / "found.html"]
    assert run(*call, "--image-root", pictures.parent).status == 0
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/") == 5
    assert "http" not in page
    assert run(*call, "--image-root", tmp_path).status == 0
    assert "not at hand" in (tmp_path / "found.html").read_text()


def test_a_question_in_words():
    assert Question(("a",), minus=("b", "c")).told == "a - b - c"
    with pytest.raises(ClipkitError, match="ask with a text"):
        Question()


def test_columns_of_the_source_hide_nothing_that_the_command_says(run, pictures, model_dir, tmp_path):
    lines = pictures.read_text().splitlines()[:5]
    named = [f"{lines[0]}\tquery\tquestion\tvector", *(f"{line}\tcats\twhich?\tv" for line in lines[1:])]
    (tmp_path / "list.tsv").write_text("\n".join(named))
    source = (tmp_path / "list.tsv", "--image-root", pictures.parent)
    assert run("embed", *source, "--model", model_dir, "--out", tmp_path / "emb").status == 0
    assert run("build", tmp_path / "emb", "--out", tmp_path / "i").status == 0
    call = ["search", tmp_path / "i", "-k", 2, "--html", tmp_path / "found.html", "--image-root", pictures.parent]
    (row, _) = json.loads(run(*call, "a star", "--format", "json").out)
    assert (row["query"], row["question"], row["vector"]) == ("cats", "which?", "v")
    assert (tmp_path / "found.html").read_text().count("data:image/") == 2
    (tmp_path / "q.txt").write_text("a star\na heart\n")
    rows = json.loads(run(*call, "--file", tmp_path / "q.txt", "--with-vectors", "--format", "json").out)
    assert [(row["query"], row["question"]) for row in rows] == [(1, "a star")] * 2 + [(2, "a heart")] * 2
    assert (rows[0]["query_"], rows[0]["question_"], rows[0]["vector_"]) == ("cats", "which?", "v")
    assert len(rows[0]["vector"]) == 32
    assert (tmp_path / "found.html").read_text().count("data:image/") == 4
