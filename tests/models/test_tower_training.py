"""What training asks of every kind of tower, each beside what it stands for written out."""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipkit.core import ClipkitError
from clipkit.models import load_model
from clipkit.models.dual_encoder import GRAIN
from clipkit.models.openclip_training import resize_positions
from tests.conftest import TINY_VIT, tiny_model
from tests.models.test_text_towers import text_model_folder
from tests.models.test_towers import hugging_face_folder

SIGLIP_TEXT = {**TINY_VIT["text_cfg"], "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
TIMM = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A small model of each kind, in double precision so that equal means equal."""
    folder = tmp_path_factory.mktemp("kinds")
    bert, xlmr = (text_model_folder(folder / kind, kind) for kind in ("bert", "xlm-roberta"))

    def of(text_model):
        return {"hf_model_name": str(text_model), "context_length": 24, "hf_proj_type": "linear"}

    models = {
        "vit": tiny_model(),
        "custom": tiny_model(custom_text=True, vision_cfg={**TINY_VIT["vision_cfg"], "pool_type": "avg"}),
        "eos": tiny_model(text_cfg={**TINY_VIT["text_cfg"], "pool_type": "eos", "eos_id": 49407}),
        "siglip": tiny_model(custom_text=True, text_cfg=SIGLIP_TEXT),
        "cls": tiny_model(custom_text=True, text_cfg={**TINY_VIT["text_cfg"], "embed_cls": True}),
        "resnet": tiny_model(vision_cfg=RESNET),
        "timm": tiny_model(vision_cfg=TIMM),
        "timm_vit": tiny_model(vision_cfg=TIMM_VIT),
        "bert": tiny_model(text_cfg={**of(bert), "hf_pooler_type": "cls_pooler"}),
        "xlm-roberta": tiny_model(text_cfg=of(xlmr)),
        "hf_clip": load_model(hugging_face_folder(folder / "clip", "clip")),
        "hf_siglip": load_model(hugging_face_folder(folder / "siglip", "siglip")),
    }
    return {name: model.double() for name, model in models.items()}


KINDS = ("vit", "custom", "eos", "siglip", "cls", "resnet", "timm", "timm_vit", "bert", "xlm-roberta")
KINDS = (*KINDS, "hf_clip", "hf_siglip")
TEXTS = ["a red heart", "dog", "a red heart a dog a red"]


def gradients(model, embeddings):
    """Of an uneven sum, by name."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, embeddings.numel()).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=atol), name


@pytest.mark.parametrize("kind", KINDS)
def test_trimmed_texts_are_the_padded_ones(kinds, kind):
    model = copy.deepcopy(kinds[kind])
    tokens = model.tokenize(TEXTS)
    trimmed = model.trim(tokens)
    full = tokens.shape[1]
    if kind in ("siglip", "cls", "hf_siglip"):
        assert trimmed.shape[1] == full
    else:
        assert trimmed.shape[1] < full
        if kind != "hf_clip":  # whose old configuration pools the largest token
            assert not (tokens[:, trimmed.shape[1] :] != tokens[0, -1]).any()
        assert model.trim(tokens, 5).shape[1] == -(-trimmed.shape[1] // 5) * 5
    assert model.trim(tokens, 1000).shape[1] == full
    assert model.trim(tokens[:0]).shape[0] == 0
    padded, cut = model.encode_text(tokens), model.encode_text(trimmed)
    assert torch.allclose(padded, cut, atol=1e-6)
    assert_same(gradients(model, padded), gradients(model, cut))


WORDY = ["dog", "a red heart", "", "a red heart a dog a red dog a red heart", "heart", "dog a dog", "a a a a a a a a a"]


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_texts_are_the_padded_ones_in_blocks_of_one_height(kinds, kind):
    model, seen = kinds[kind], []
    encode = model.encode_text
    with torch.inference_mode():
        padded = encode(model.tokenize(WORDY)).numpy()
    vars(model)["encode_text"] = lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens)
    try:
        found = model.embed_texts(WORDY, 3)
        counts = [rows for rows, _ in seen]
        assert set(counts) == {3}
        assert len(counts) <= len(WORDY)
        if model.trim(model.tokenize(WORDY)).shape[1] < model.context_length:
            assert max(columns for _, columns in seen) < model.context_length
            assert {columns % GRAIN for _, columns in seen if columns < model.context_length} == {0}
        assert np.allclose(found, padded, atol=1e-6)
        # Neither order nor neighbours matter; small matrices are rounded by a row's place in them on some processors.
        ordered = sorted(WORDY, key=len)
        parts = [model.embed_texts(ordered[:3], 3), model.embed_texts(ordered[3:], 3)]
        assert np.allclose(np.concatenate(parts)[[ordered.index(text) for text in WORDY]], found, atol=1e-6)
        assert model.embed_texts([]).shape == (0, model.embed_dim)
    finally:
        del vars(model)["encode_text"]


def test_token_zero_is_a_word_of_the_byte_pair_encoding(kinds):
    """The padding is 0, and so is "!"."""
    model = kinds["vit"]
    tokens = model.tokenize(["wow ! !", "! a !"])
    assert model.trim(tokens).shape[1] == 5
    assert torch.allclose(model.encode_text(tokens), model.encode_text(model.trim(tokens)))
    # Without an end, the first position is pooled, or the largest token wherever it is; nothing else may be cut.
    loose = torch.tensor([[5, 9, 3, 0, 0, 0], [2, 0, 0, 8, 0, 0]])
    assert model.trim(loose).shape[1] == 4
    assert kinds["eos"].trim(loose).shape[1] == 1
    assert torch.allclose(kinds["eos"].encode_text(loose), kinds["eos"].encode_text(loose[:, :1]))


def test_hugging_faces_clip_pools_the_first_end(kinds):
    model = copy.deepcopy(kinds["hf_clip"])
    model.backbone.config.text_config.eos_token_id = model.backbone.text_model.eos_token_id = 5
    tokens = torch.tensor([[3, 5, 6, 5, 0, 0], [4, 4, 5, 6, 6, 5], [3, 4, 3, 4, 3, 3]])
    assert model.trim(tokens).tolist() == tokens[:, :3].tolist()
    assert torch.allclose(model.encode_text(tokens), model.encode_text(model.trim(tokens)), atol=1e-6)


def test_rows_of_nothing_but_padding_are_left_alone(kinds):
    model = kinds["bert"]
    tokens = model.tokenize(TEXTS)
    tokens[1] = 0
    assert model.trim(tokens).shape == tokens.shape


@pytest.mark.parametrize("kind", KINDS)
def test_any_length_goes_through_the_text_tower(kinds, kind):
    model = kinds[kind]
    tokens = model.tokenize(TEXTS)
    for length in (1, 5, tokens.shape[1]):
        assert torch.isfinite(model.encode_text(tokens[:, :length])).all()


def test_shortened_texts_keep_their_end(kinds):
    for kind, end in (("vit", 49407), ("siglip", 49407), ("bert", 2), ("xlm-roberta", 2), ("hf_clip", 2)):
        model = kinds[kind]
        tokens = model.tokenize(TEXTS)
        short = model.shorten(tokens, 4)
        for row, whole in zip(short.tolist(), tokens.tolist(), strict=True):
            wanted = whole[:4]
            if end not in wanted:
                wanted = [*whole[:3], end]
            assert row == wanted, kind
        assert torch.equal(model.shorten(tokens, tokens.shape[1]), tokens)
        assert model.tokenize(TEXTS).equal(tokens)
    endless = torch.tensor([[5, 6, 7, 8]])
    assert kinds["vit"].shorten(endless, 2).tolist() == [[5, 6]]


def images(side, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 255, (count, 3, side, side), dtype=np.uint8))


def test_positions_are_resized_as_open_clip_resizes_those_of_a_checkpoint(kinds):
    for side in (16, 24, 56):
        target = tiny_model(vision_cfg={**TINY_VIT["vision_cfg"], "image_size": side}).double().backbone
        state = {name: t.clone() for name, t in kinds["vit"].backbone.state_dict().items()}
        open_clip.model.resize_pos_embed(state, target)
        target.load_state_dict(state)
        pixels = images(side)
        theirs = target.encode_image(kinds["vit"]._normalise(pixels), normalize=True)
        assert torch.allclose(kinds["vit"].encode_image(pixels), theirs.float(), atol=1e-6)


def test_resized_positions_of_a_resnet_are_its_attention_pools(kinds):
    model = kinds["resnet"]
    pixels = images(96)
    twin = copy.deepcopy(model.backbone)
    pool = twin.visual.attnpool
    pool.positional_embedding = nn.Parameter(resize_positions(pool.positional_embedding, (2, 2), (3, 3)))
    theirs = twin.encode_image(model._normalise(pixels), normalize=True)
    assert torch.allclose(model.encode_image(pixels), theirs.float(), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "side"), [("vit", 16), ("custom", 40), ("resnet", 32), ("hf_clip", 32), ("hf_siglip", 16)]
)
def test_gradients_reach_the_whole_embedding_through_another_size(kinds, kind, side):
    model = copy.deepcopy(kinds[kind]).train()
    model.check_image_size(side)
    name = next(n for n, _ in model.named_parameters() if "position" in n and ("vis" in n or "attnpool" in n))
    found = gradients(model, model.encode_image(images(side)))
    assert (found[name].abs().sum(1) > 0).all()
    model.set_gradient_checkpointing(True)
    assert_same(gradients(model, model.encode_image(images(side))), found)

    narrow = copy.deepcopy(kinds[kind]).bfloat16()
    embeddings = narrow.encode_image(images(side))
    assert F.cosine_similarity(embeddings, kinds[kind].encode_image(images(side))).min() > 0.99
    assert gradients(narrow, embeddings)[name].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_at_its_own_size_a_tower_is_the_librarys_to_the_bit(kinds, kind):
    model = kinds[kind]
    side = model.preprocess.size[0]
    pixels, tokens = model._normalise(images(side)), model.tokenize(TEXTS)
    if kind.startswith("hf"):
        wanted = (
            model.backbone.get_image_features(pixels).pooler_output,
            model.backbone.get_text_features(tokens).pooler_output,
        )
    else:
        wanted = model.backbone.encode_image(pixels), model.backbone.encode_text(tokens)
    assert torch.equal(model.encode_image(images(side)), F.normalize(wanted[0].float(), dim=-1))
    assert torch.equal(model.encode_text(tokens), F.normalize(wanted[1].float(), dim=-1))
    model.check_image_size(side)


@pytest.mark.parametrize(
    ("kind", "side", "message"),
    [
        ("vit", 20, "phases.image_size=20: .* multiple of 8"),
        ("resnet", 48, "phases.image_size=48: .* multiple of 32"),
        ("hf_clip", 20, "phases.image_size=20: .* multiple of 8"),
    ],
)
def test_sides_that_a_tower_cannot_see_are_refused(kinds, kind, side, message):
    with pytest.raises(ClipkitError, match=message):
        kinds[kind].check_image_size(side)


def test_a_timm_tower_takes_the_sizes_that_its_own_code_takes(kinds):
    for kind, side in (("timm", 48), ("timm_vit", 96)):  # convolutions; a transformer that interpolates by itself
        kinds[kind].check_image_size(side)
        assert kinds[kind].encode_image(images(side)).shape == (3, 32)
    fixed = tiny_model(vision_cfg={**TIMM_VIT, "timm_model_name": "vit_tiny_patch16_224", "image_size": 224})
    with pytest.raises(ClipkitError, match="phases.image_size=96: this timm image tower takes only 224x224"):
        fixed.check_image_size(96)


def test_patch_dropout_is_open_clips(kinds):
    model = tiny_model().train()
    theirs = tiny_model(vision_cfg={**TINY_VIT["vision_cfg"], "patch_dropout": 0.5}).train()
    reference = open_clip.transformer.PatchDropout(0.5).train()
    x = torch.randn(5, 17, 8)
    model.set_patch_dropout(0.5)
    drop = model.backbone.visual.patch_dropout
    for call in (lambda m: (m(x),), lambda m: torch.autograd.grad(m(x.requires_grad_()).square().sum(), x)):
        torch.manual_seed(3)
        ours = call(drop)[0]
        torch.manual_seed(3)
        assert torch.equal(ours, call(reference)[0])
    pixels = images(32)
    torch.manual_seed(1)
    dropped = model.encode_image(pixels)
    torch.manual_seed(1)
    assert torch.equal(dropped, theirs.encode_image(pixels))
    assert not torch.equal(dropped, model.encode_image(pixels))
    assert torch.equal(model.eval().encode_image(pixels), theirs.eval().encode_image(pixels))
    theirs.set_patch_dropout(0.0)
    assert theirs.backbone.visual.patch_dropout.prob == 0
    theirs.set_patch_dropout(None)
    assert theirs.backbone.visual.patch_dropout.prob == 0.5
    assert "patch_dropout" not in str(model.backbone.state_dict().keys())


@pytest.mark.parametrize("kind", ["resnet", "timm", "hf_clip"])
def test_towers_without_patches_cannot_leave_any_out(kinds, kind):
    kinds[kind].set_patch_dropout(None)
    with pytest.raises(ClipkitError, match="patch_dropout: .* only open_clip's ViT has"):
        kinds[kind].set_patch_dropout(0.5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "timm"])
def test_gradient_checkpointing_changes_nothing_but_memory(kinds, kind):
    model = copy.deepcopy(kinds[kind]).train()
    if kind == "vit":
        model.set_patch_dropout(0.5)
    pixels, tokens = images(model.preprocess.size[0]), model.tokenize(TEXTS)
    found, saved, buffers = [], [], []
    for on in (False, True, False):
        twin = copy.deepcopy(model)
        twin.set_gradient_checkpointing(on)
        torch.manual_seed(0)  # patch dropout, and dropout in BERT
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            image, text = twin.encode_image(pixels), twin.encode_text(tokens)
        found.append(gradients(twin, torch.cat([image, text])))
        saved.append(count)
        buffers.append(dict(twin.named_buffers()))
    assert_same(found[0], found[1], atol=1e-9)
    assert_same(found[0], found[2], atol=0)
    assert saved[1] < saved[0] == saved[2]
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_what_cannot_be_checkpointed_is_told(kinds):
    with pytest.raises(ClipkitError, match="count BatchNorm's statistics twice"):
        kinds["timm"].set_gradient_checkpointing(True)
    kinds["timm"].set_gradient_checkpointing(False)
    odd = tiny_model(vision_cfg={**TINY_VIT["vision_cfg"], "qk_norm": True})
    with pytest.raises(ClipkitError, match=r"custom blocks \(qk_norm"):
        odd.set_gradient_checkpointing(True)


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_locked_tower_learns_in_its_projection_only(kinds, kind, side):
    model = copy.deepcopy(kinds[kind]).train()
    model.lock(side)
    depths = model.layer_depths()
    layout = model.layouts()[side]
    learning = {n for n, p in model.named_parameters() if p.requires_grad and depths[n][0] == side}
    projections = {n for n in depths if n.removeprefix("backbone.").startswith(layout.projection or "none")}
    assert learning == projections
    if (kind, side) not in (("hf_siglip", "image"), ("xlm-roberta", "none")):
        assert learning
    other = {n for n, p in model.named_parameters() if depths[n][0] != side}
    assert all(p.requires_grad for n, p in model.named_parameters() if n in other)
    before = {n: b.clone() for n, b in model.named_buffers()}

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        if side == "image":
            embeddings = model.encode_image(images(model.preprocess.size[0]))
        else:
            embeddings = model.encode_text(model.tokenize(TEXTS))
    assert len(saved) < 16, saved  # of the projection and the normalisation
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    if learning:
        assert set(gradients(model, embeddings)) == learning
    again = (
        model.encode_image(images(model.preprocess.size[0]))
        if side == "image"
        else model.encode_text(model.tokenize(TEXTS))
    )
    assert torch.equal(again, embeddings)
    assert not model.eval().backbone.training
    model.train()
    assert model.backbone.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layers_may_learn(kinds, kind):
    for side in ("image", "text"):
        model = copy.deepcopy(kinds[kind])
        model.lock(side, 1)
        model.train()
        depths, count = model.layer_depths(), len(model.layouts()[side].layers)
        for name, parameter in model.named_parameters():
            where, depth = depths[name]
            assert parameter.requires_grad == (where != side or depth >= count), name
        layers = [parts[0] for parts in model.layouts()[side].layers if len(parts) == 1]
        modules = [model.backbone.get_submodule(name) for name in layers]
        assert [m.training for m in modules] == [False] * (len(modules) - 1) + [True] * bool(modules)
        with pytest.raises(
            ClipkitError, match=f"towers.{side}.unlocked_layers=99: the {side} tower has {count} layers"
        ):
            model.lock(side, 99)


def test_a_locked_resnet_keeps_its_statistics_and_patches_are_kept(kinds):
    model = copy.deepcopy(kinds["vit"])
    model.lock("image")
    with pytest.raises(ClipkitError, match="a locked image tower sees whole images"):
        model.set_patch_dropout(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_side_and_a_depth(kinds, kind):
    model = kinds[kind]
    depths = model.layer_depths()
    assert list(depths) == [name for name, _ in model.named_parameters()]
    for name, (side, depth) in depths.items():
        assert (side is None) == ("logit_" in name and "attn" not in name), name
        assert depth <= (0 if side is None else len(model.layouts()[side].layers) + 1)
    for side in ("image", "text"):
        found = {d for s, d in depths.values() if s == side}
        assert found == set(range(len(model.layouts()[side].layers) + 2)), (side, found)


def test_depths_by_name(kinds):
    def depth(kind, name):
        return kinds[kind].layer_depths()[f"backbone.{name}"]

    assert depth("vit", "visual.conv1.weight") == ("image", 0)
    assert depth("vit", "visual.transformer.resblocks.1.ln_1.weight") == ("image", 2)
    assert depth("vit", "visual.proj") == ("image", 3)
    assert depth("vit", "text_projection") == ("text", 2)
    assert depth("vit", "logit_scale") == (None, 0)
    assert depth("custom", "text.token_embedding.weight") == ("text", 0)
    assert depth("resnet", "visual.layer2.0.conv1.weight") == ("image", 2)
    assert depth("resnet", "visual.attnpool.q_proj.weight") == ("image", 5)
    assert depth("timm_vit", "visual.trunk.blocks.0.attn.qkv.weight") == ("image", 1)
    assert depth("timm_vit", "visual.head.proj.weight")[1] == depth("timm_vit", "visual.trunk.norm.weight")[1]
    assert depth("bert", "text.transformer.encoder.layer.1.output.dense.weight") == ("text", 2)
    assert depth("bert", "text.transformer.pooler.dense.weight") == ("text", 3)
    assert depth("hf_clip", "vision_model.embeddings.class_embedding") == ("image", 0)
    assert depth("hf_siglip", "text_model.head.weight") == ("text", 3)
