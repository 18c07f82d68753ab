"""Maps of what speaks for a text: the papers' rules, two methods that agree, and boxes that lie where they should."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.core import ClipkitError
from clipkit.data import COLOURS, draw, random_scene
from clipkit.images import Preprocess
from clipkit.models import load_model
from clipkit.models.explain import ExplainOptions, explain, heatmap
from clipkit.models.explain.attention import AttentionWatch, NoAttention, attention_relevance, patch_tokens
from clipkit.models.explain.relevance import cell_means, patch_readout, relevance, spread, weighted_attention, windows
from tests.conftest import TINY_VIT, tiny_model
from tests.core.test_html_report import assert_refers_to_nothing_outside
from tests.models.test_towers import hugging_face_folder, noise

SIDE = 32
TEXTS = ["a red heart", "a dog"]
VIT = TINY_VIT["vision_cfg"]
TIMM = {"timm_model_name": "test_vit", "image_size": 160}
TOWERS = {
    "class": {},
    "mean": {"vision_cfg": {**VIT, "pool_type": "avg"}},
    "norm after the mean": {"vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True}},
    "attention": {"vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3}},
    "normed queries": {"vision_cfg": {**VIT, "block_type": "custom", "qk_norm": True}},
    "timm class": {"vision_cfg": {**TIMM, "timm_pool": "token"}},
    "timm mean": {"vision_cfg": {**TIMM, "timm_pool": "avg"}},
    "timm attention": {"embed_dim": 64, "vision_cfg": {**TIMM, "timm_pool": "map", "timm_proj": "none"}},
}
HUGGING_FACE = ("clip", "siglip")
RESNET = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32}}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A random model by its kind; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            if kind in HUGGING_FACE:
                made[kind] = load_model(hugging_face_folder(tmp_path_factory.mktemp("hf") / kind, kind))
            else:
                made[kind] = tiny_model(**TOWERS[kind])
        return made[kind]

    return make


def pixels_of(model, seed=0):
    return torch.from_numpy(model.preprocess(noise(seed=seed)))[None]


def layers_of(rng, layers=3, heads=3, tokens=7):
    def one():
        return torch.from_numpy(rng.normal(size=(layers, heads, tokens, tokens)))

    return one().softmax(-1), one()


def test_relevance_is_the_papers_rule():
    attention, gradient = layers_of(np.random.default_rng(0))
    found = relevance(
        [weighted_attention(*each) for each in zip(attention, gradient, strict=True)], torch.eye(7)[2].double()
    )
    total = np.eye(7)
    for a, g in zip(attention.numpy(), gradient.numpy(), strict=True):
        mean = np.zeros((7, 7))
        for head in range(3):
            for i in range(7):
                for j in range(7):
                    mean[i, j] += max(0.0, a[head, i, j] * g[head, i, j]) / 3
        total = total + mean @ total
    assert np.allclose(found, total[2], rtol=1e-12)


def test_an_average_is_read_out_by_shares():
    rng = np.random.default_rng(0)
    tokens, gradient = (torch.from_numpy(rng.normal(size=(6, 5))) for _ in range(2))
    found = patch_readout(tokens, gradient, 2)
    wanted = [0, 0] + [max(0.0, float(t @ g)) for t, g in zip(tokens[2:], gradient[2:], strict=True)]
    assert np.allclose(found, np.array(wanted) / sum(wanted))
    assert patch_readout(tokens, 0 * gradient, 2).tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("kind", [*TOWERS, *HUGGING_FACE])
def test_a_watched_tower_computes_what_it_did(tower, kind):
    model = tower(kind)
    pixels, about = pixels_of(model), patch_tokens(model)
    with torch.inference_mode():
        plain = model.encode_image(pixels)
        with AttentionWatch() as seen:
            watched = model.encode_image(pixels)
    assert torch.allclose(plain, watched, atol=1e-6)
    assert len(seen.maps) == len(about.layers) + (about.pooling == "attention")
    for part in seen.maps:
        assert torch.allclose(part.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", [*TOWERS, *HUGGING_FACE])
def test_nothing_is_left_behind(tower, kind):
    model = tower(kind)
    pixels, targets = pixels_of(model), torch.from_numpy(model.embed_texts(TEXTS))
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    maps = attention_relevance(model, pixels, targets)
    side = model.preprocess.size[0] // patch_tokens(model).patch[0]
    assert maps.shape == (2, side, side)
    assert maps.min() >= 0
    assert maps[0].max() > 0
    assert not torch.allclose(maps[0], maps[1])
    assert all(p.grad is None for p in model.parameters())
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    learning = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)  # as `lock` leaves it
    try:
        with torch.no_grad():
            assert torch.allclose(attention_relevance(model, pixels, targets), maps, rtol=1e-4, atol=1e-7)
    finally:
        for p, before in zip(model.parameters(), learning, strict=True):
            p.requires_grad_(before)


def test_relevance_of_hugging_faces_own_attention(tower):
    """Their eager attention gives its maps; the papers' matrices are multiplied out, all of them."""
    model = tower("clip")
    pixels, target = pixels_of(model), torch.from_numpy(model.embed_texts(TEXTS[:1]))
    found = attention_relevance(model, pixels, target)[0]
    vision = model.backbone.vision_model
    before = vision.config._attn_implementation
    vision.set_attn_implementation("eager")
    try:
        given = vision(pixel_values=model._normalise(pixels), output_attentions=True)
        embedding = F.normalize(model.backbone.visual_projection(given.pooler_output), dim=-1)
        gradients = torch.autograd.grad((embedding @ target.T).sum(), given.attentions)
        with pytest.raises(NoAttention, match="in a way of their own"):
            attention_relevance(model, pixels, target)
    finally:
        vision.set_attn_implementation(before)
    total = torch.eye(10)
    for a, g in zip(given.attentions, gradients, strict=True):
        total = total + (a * g)[0].clamp(min=0).mean(0) @ total
    assert torch.allclose(found, total[0, 1:].view(3, 3), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["class", "timm attention"])
def test_gradients_are_those_of_finite_differences(kind):
    model = tiny_model(**TOWERS[kind]).double()
    pixels, target = model._normalise(pixels_of(model)), torch.from_numpy(model.embed_texts(TEXTS[:1]))[0].double()

    class Nudged(AttentionWatch):
        nudge: tuple = (None, None, 0.0)  # the layer, which of its numbers, by how much

        def _attend(self, query, key, value, scale):
            found = super()._attend(query, key, value, scale)
            layer, at, by = self.nudge
            if len(self.maps) - 1 != layer:
                return found
            moved = self.maps[-1].detach().clone()
            moved[at] += by
            return moved @ value

    def score(nudge=(None, None, 0.0)):
        with Nudged() as seen:
            seen.nudge = nudge
            return F.normalize(model._image_features(pixels), dim=-1)[0] @ target, seen.maps

    value, maps = score()
    gradients = torch.autograd.grad(value, maps)
    rng = np.random.default_rng(0)
    for layer, gradient in enumerate(gradients):
        for _ in range(3):
            at = tuple(int(rng.integers(n)) for n in gradient.shape)
            if layer == len(gradients) - 1 and kind == "class":
                at = (*at[:2], 0, at[3])  # of the last layer only the class token's row is read out
            with torch.no_grad():
                slope = (score((layer, at, 1e-5))[0] - score((layer, at, -1e-5))[0]) / 2e-5
            assert slope.item() == pytest.approx(gradient[at].item(), rel=1e-5, abs=1e-10)


def test_windows_hide_each_cell_equally_often():
    boxes = windows(3, 5, 2)
    assert len(boxes) == 4 * 6
    values = np.random.default_rng(0).normal(size=(2, len(boxes)))
    found = cell_means(values, boxes, 3, 5)
    for row in range(3):
        for column in range(5):
            over = [i for i, (t, b, le, r) in enumerate(boxes) if t <= row < b and le <= column < r]
            assert len(over) == 4
            assert np.allclose(found[:, row, column], values[:, over].mean(1))


def test_occlusion_is_what_the_cosine_loses(tower):
    model, image = tower("class"), noise()
    found = explain(image, TEXTS, model, ExplainOptions("occlusion", window=2, batch_size=7))
    pixels, texts = model.preprocess(image), model.embed_texts(TEXTS)
    grey = np.round(np.array(model.preprocess.mean) * 255).astype(np.uint8)

    def cosines(shown):
        with torch.inference_mode():
            return model.encode_image(torch.from_numpy(shown)[None])[0].numpy() @ texts.T

    wanted = np.zeros((2, 4, 4))
    for top in range(-1, 4):
        for left in range(-1, 4):
            hidden = pixels.copy()
            inside = [(r, c) for r in (top, top + 1) for c in (left, left + 1) if 0 <= r < 4 and 0 <= c < 4]
            for r, c in inside:
                hidden[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = grey[:, None, None]
            for r, c in inside:
                wanted[:, r, c] += (cosines(pixels) - cosines(hidden)) / 4
    assert np.allclose(found.maps, wanted, atol=1e-6)
    assert np.allclose(found.cosines, cosines(pixels), atol=1e-6)
    assert found.signed


def test_towers_that_cannot_be_read_are_occluded():
    resnet = tiny_model(**RESNET)
    found = explain(noise(), TEXTS, resnet)
    assert found.method == "occlusion"
    assert found.maps.shape == (2, 16, 16)
    with pytest.raises(NoAttention, match="a convolutional network.*--method occlusion takes any tower"):
        explain(noise(), TEXTS, resnet, ExplainOptions("relevance"))


def test_contrast_is_the_text_less_the_others(tower):
    model = tower("class")
    texts = [*TEXTS, "a blue ring"]
    plain, against = (explain(noise(), texts, model, ExplainOptions("occlusion", c)) for c in (False, True))
    wanted = [plain.maps[i] - np.delete(plain.maps, i, 0).mean(0) for i in range(3)]
    assert np.allclose(against.maps, wanted, atol=1e-6)
    assert np.allclose(against.cosines, plain.cosines)
    assert "less the mean of the others" in against.source


def test_probabilities(tower):
    clip, siglip = tower("clip"), tower("siglip")
    assert explain(noise(), TEXTS[:1], clip).probabilities is None
    assert explain(noise(), TEXTS, clip).probabilities.sum() == pytest.approx(1)
    one = explain(noise(), TEXTS[:1], siglip)
    scale, bias = siglip.logit_scale.exp().item(), siglip.logit_bias.item()
    assert one.probabilities[0] == pytest.approx(1 / (1 + np.exp(-(scale * one.cosines[0] + bias))))


def test_modes_are_put_back(tower):
    model = tower("class")
    model.train()
    try:
        explain(noise(), TEXTS, model)
        assert model.training
        assert model.backbone.visual.training
    finally:
        model.eval()


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(24, 150),
    height=st.integers(24, 150),
    size=st.tuples(st.integers(16, 60), st.integers(16, 60)),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_what_the_tower_sees_lies_where_it_does_in_the_image(width, height, size, resize_mode, place):
    """A ramp of grey tells where each pixel comes from, padding by a grey that the ramp has not."""
    preprocess = Preprocess(size=size, resize_mode=resize_mode, interpolation="bilinear", fill=0)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    ramps = np.stack([x, y, np.full_like(x, 255)], -1)
    ramps[..., :2] += 40
    pixels = preprocess(Image.fromarray(ramps.round().astype(np.uint8)))
    left, top, right, bottom = preprocess.seen(width, height)
    row, column = (min(n - 1, int(at * n)) for at, n in zip(place, size, strict=True))
    there = (left + (column + 0.5) / size[1] * (right - left), top + (row + 0.5) / size[0] * (bottom - top))
    inside = 0 < there[0] < width and 0 < there[1] < height
    assert inside == (pixels[2, row, column] == 255)
    # Where sides are shrunk or grown a pixel at the border is the mean of a part of its neighbourhood.
    near = 2.5 + max((right - left) / size[1], (bottom - top) / size[0])
    if inside:
        assert abs(int(pixels[0, row, column]) - 40 - there[0]) < near
        assert abs(int(pixels[1, row, column]) - 40 - there[1]) < near


@pytest.mark.parametrize(("size", "mode"), [((90, 50), "shortest"), ((50, 91), "longest"), ((70, 30), "squash")])
def test_boxes_and_heat_lie_on_what_was_seen(tower, size, mode, monkeypatch):
    """Whatever cell of the tower's square is hot, the heat lies over the same part of the image."""
    model = tower("class")
    before = model.preprocess
    model.set_preprocess(before.model_copy(update={"resize_mode": mode}))
    hot = np.zeros((1, 4, 4))
    hot[0, 1, 2] = 1
    monkeypatch.setattr(heatmap, "attention_relevance", lambda *_: torch.from_numpy(hot))
    try:
        found = explain(Image.new("RGB", size), ["a"], model)
    finally:
        model.set_preprocess(before)
    left, top, right, bottom = found.seen
    wide, high = (right - left) / 4, (bottom - top) / 4
    assert np.allclose(found.boxes[1, 2], [left + 2 * wide, top + high, left + 3 * wide, top + 2 * high])
    assert np.allclose(found.boxes[0, 0, :2], (left, top))
    assert np.allclose(found.boxes[3, 3, 2:], (right, bottom))
    heat = found.heat(size)[0]
    at = np.unravel_index(np.nanargmax(heat), heat.shape)
    assert abs(at[1] + 0.5 - (left + 2.5 * wide)) <= 1
    assert abs(at[0] + 0.5 - (top + 1.5 * high)) <= 1
    x, y = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    unseen = ((x < left) | (x > right))[None] | ((y < top) | (y > bottom))[:, None]
    assert np.array_equal(np.isnan(heat), unseen)
    assert unseen.any() == (mode == "shortest")


def test_patches_that_do_not_fill_the_square(tower):
    """A row of pixels that no patch covers is in no box: with 36 pixels and patches of 8 there are 4 of them."""
    model = tower("class")
    before = model.preprocess
    model.set_preprocess(before.model_copy(update={"size": (36, 36)}))
    try:
        found = explain(Image.new("RGB", (72, 72)), ["a"], model)
    finally:
        model.set_preprocess(before)
    assert found.maps.shape == (1, 4, 4)
    assert np.allclose(found.boxes[3, 3], [48, 48, 64, 64])
    assert np.isnan(found.heat((72, 72))[0, 64:]).all()


def test_heat_is_spread_evenly_between_centres():
    x, y = np.array([2.0, 6.0, 10.0]), np.array([1.0, 4.0])
    found = spread(2 * x[None] - 3 * y[:, None], x, y, (12, 6))
    across, down = np.meshgrid((np.arange(12) + 0.5).clip(2, 10), (np.arange(6) + 0.5).clip(1, 4))
    assert np.allclose(found, 2 * across - 3 * down)


def side_by_side(rng, left, right):
    """Two shapes on one plain ground."""
    scene = replace(random_scene(rng, [left]), place=(0, 1), size="medium", pattern="plain")
    other = replace(scene, colour=right[0], shape=right[1], place=(2, 1))
    image = draw(scene, rng, SIDE)
    image.paste(draw(other, rng, SIDE).crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    return image


@pytest.fixture(scope="module")
def seer():
    """A vision transformer that has learned what is red and what is a circle, in some seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other take 50 times as long on a busy machine
    try:
        return taught({}, 150)
    finally:
        torch.set_num_threads(threads)


def taught(changes, steps):
    rng = np.random.default_rng(0)
    pairs = [(colour, shape) for colour in list(COLOURS)[:4] for shape in ("circle", "square")]
    model = tiny_model(**changes).train()
    pictures, told = [], []
    for _ in range(192):
        left, right = (pairs[i] for i in rng.choice(len(pairs), 2, replace=False))
        pictures.append(np.asarray(side_by_side(rng, left, right)))
        told.append([left, right][rng.integers(2)])
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    tokens = model.tokenize([f"a {colour} {shape}" for colour, shape in pairs])
    tokens = model.trim(tokens)
    truth = torch.tensor([pairs.index(pair) for pair in told])
    # Random word vectors do, and 49,408 of them are most of what a step would cost.
    model.backbone.token_embedding.requires_grad_(False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(steps):
        batch = torch.from_numpy(rng.integers(0, len(pixels), 32))
        cosines = model.encode_image(pixels[batch]) @ model.encode_text(tokens).T
        loss = F.cross_entropy(14 * cosines, truth[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sides(model, method, count, contrast=False):
    """How often a map is hotter over what the text names than over the other shape."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(count):
        colours = rng.choice(list(COLOURS)[:4], 2, replace=False)
        shapes = rng.permutation(["circle", "square"])
        names = list(zip(colours, shapes, strict=True))
        found = explain(
            side_by_side(rng, *names), [f"a {c} {s}" for c, s in names], model, ExplainOptions(method, contrast)
        )
        half = found.maps.shape[2] // 2
        left, right = found.maps[:, :, :half].mean((1, 2)), found.maps[:, :, half:].mean((1, 2))
        hits += [left[0] > right[0], right[1] > left[1]]
    return np.mean(hits)


def test_the_map_is_hot_over_what_the_text_names(seer):
    """Both methods, on 24 texts each; guessing would be right half of the time."""
    for method in ("relevance", "occlusion"):
        for contrast in (False, True):
            assert sides(seer, method, 12, contrast=contrast) >= 0.85, (method, contrast)


@pytest.mark.slow
def test_the_map_of_a_tower_that_averages_its_patches():
    """What sets a text apart from the other; by itself a text is found in 3 of 4, as both shapes speak for "a"."""
    model = taught({"vision_cfg": {**VIT, "pool_type": "avg"}}, 150)
    for method in ("relevance", "occlusion"):
        assert sides(model, method, 12, contrast=True) >= 0.85, method


def test_two_methods_that_share_nothing_agree(seer):
    """Spearman's rank correlation over the cells of each map; of unrelated maps the mean would be 0 +- 0.06."""
    rng, found = np.random.default_rng(2), []
    for _ in range(10):
        image = side_by_side(rng, ("red", "circle"), ("blue", "square"))
        maps = [
            explain(image, ["a red circle", "a blue square"], seer, ExplainOptions(method, True)).maps
            for method in ("relevance", "occlusion")
        ]
        for one, other in zip(*maps, strict=True):
            ranks = [np.argsort(np.argsort(each.ravel())) for each in (one, other)]
            found.append(np.corrcoef(*ranks)[0, 1])
    assert np.mean(found) > 0.25


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise(60).save("photo.png")
    return tmp_path / "photo.png"


def test_the_command_draws_a_picture(run, photo, model_dir):
    done = run("explain", "photo.png", *TEXTS, "--model", model_dir)
    assert done.status == 0, done
    assert "a red heart" in done.out
    assert "probability" in done.out
    assert "photo-explained.png: gradient-weighted attention (Chefer, Gur, Wolf 2021)" in done.err
    with Image.open("photo-explained.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
        colours = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=2) > 60).mean() > 0.05  # neither white nor grey


def test_the_command_writes_a_page(run, photo, model_dir):
    done = run("explain", photo, "<b>", "--model", model_dir, "--out", "p.html", "--method", "occlusion", "--window", 2)
    assert done.status == 0, done
    page = (photo.parent / "p.html").read_text()
    assert_refers_to_nothing_outside(page)
    assert "&lt;b&gt;" in page
    assert "what the cosine loses when a part is hidden" in page


def test_the_command_gives_the_numbers(run, photo, trained):
    """Of a run's model; no picture is written unless it is asked for."""
    texts = [*TEXTS, "--contrast", "--model", trained]
    found = json.loads(run("explain", photo, *texts, "--format", "json").out)
    assert (found["width"], found["height"], found["method"], found["contrast"]) == (69, 60, "relevance", True)
    assert np.shape(found["boxes"]) == (4, 4, 4)
    assert [row["text"] for row in found["texts"]] == TEXTS
    wanted = explain(photo, TEXTS, load_model(trained), ExplainOptions(contrast=True))
    for row, of_text, cosine in zip(found["texts"], wanted.maps, wanted.cosines, strict=True):
        assert np.allclose(row["map"], of_text)
        assert row["cosine"] == pytest.approx(cosine)
    assert found["picture"] is None
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]
    lines = run("explain", photo, *texts, "--format", "jsonl", "--out", "heat.png").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == TEXTS
    assert (photo.parent / "heat.png").is_file()


def test_what_cannot_be_explained_is_one_line(refused, photo, model_dir, tmp_path):
    def told(*args):
        return refused("explain", *args, "--model", model_dir)

    (tmp_path / "text.jpg").write_text("this is no picture")
    assert "no such image: none.png" in told("none.png", "a dog")
    assert "text.jpg: not an image" in told("text.jpg", "a dog")
    assert 'name a text to explain the image by: clipkit explain IMAGE "a red car"' in told(photo)
    assert "text 2 is empty" in told(photo, "a dog", "  ")
    assert "'a dog' stands twice" in told(photo, "a dog", "a dog")
    assert "a picture ends in .png, a page in .html" in told(photo, "a dog", "--out", "x.jpg")
    assert "is the image itself" in told(photo, "a dog", "--out", photo)
    assert "explain takes one image at a time" in told(photo, "photo.png", "a dog")
    assert "give two at least" in told(photo, "a dog", "--contrast")
    assert "--window is of --method occlusion" in told(photo, "a dog", "--window", 2)
    assert "hides everything: the grid has 4 x 4 cells" in told(photo, "a", "--method", "occlusion", "--window", 5)
    assert "name the model to explain with" in refused("explain", photo, "a dog")
    tiny_model(**RESNET).save(tmp_path / "resnet")
    line = refused("explain", photo, "a dog", "--method", "relevance", "--model", tmp_path / "resnet")
    assert "a convolutional network); --method occlusion takes any tower" in line


def test_a_wrong_method_is_told(model):
    with pytest.raises(ClipkitError, match="no method 'attention'; there are auto, relevance, occlusion"):
        explain(noise(), TEXTS, model, ExplainOptions("attention"))
