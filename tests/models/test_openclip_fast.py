"""The shorter ways through open_clip's blocks against the blocks themselves: outputs, gradients, names, rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from clipkit.models.openclip_fast import PooledBlock, SelfAttention, attend_qkv, speed_up
from tests.conftest import tiny_model

PAIR = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": 40},
    "text_cfg": {"context_length": 9, "width": 32, "heads": 2, "layers": 2, "vocab_size": 99},
}
CHANGES = {
    "plain": {},
    "custom text": {"custom_text": True},
    "class token": {"custom_text": True, "text_cfg": {**PAIR["text_cfg"], "embed_cls": True, "pool_type": "last"}},
    "layer scale": {"vision_cfg": {**PAIR["vision_cfg"], "ls_init_value": 0.1, "patch_dropout": 0.5}},
    "both ways": {"custom_text": True, "text_cfg": {**PAIR["text_cfg"], "no_causal_mask": True}},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}},
    "patches' mean": {"vision_cfg": {**PAIR["vision_cfg"], "pool_type": "avg"}},
    "first end": {"text_cfg": {**PAIR["text_cfg"], "pool_type": "eos", "eos_id": 98}},
    "norm after pooling": {"vision_cfg": {**PAIR["vision_cfg"], "final_ln_after_pool": True}},
}
POOLED = (2, 2, 2, 2, 2, 1, 1, 2, 2)
"""In how many of each pair's towers the last block can compute one position only, or be asked to."""


def both(**changes):
    """A model as it is made here, and the same with the library's own attention and blocks."""
    fast = tiny_model(**{**PAIR, **changes}).train()
    slow = copy.deepcopy(fast)
    for module in slow.modules():
        if type(module) is SelfAttention:
            module.__class__ = nn.MultiheadAttention
        elif type(module) is PooledBlock:
            module.__class__ = ResidualAttentionBlock
    return fast, slow


def batch(side, size=5):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 98, (size, 9), generator=generator)
    tokens[:, 6] = 98
    tokens[:, 7:] = 0
    return pixels, tokens


def gradients(model, *, autocast=False):
    """Both embeddings and the gradients of some function of them."""
    torch.manual_seed(0)  # patch dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        image, text, _, _ = model(*batch(model.preprocess.size[0]))
    (image @ text.T).sin().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"image": image.detach(), "text": text.detach(), **found}


@pytest.mark.parametrize(("changes", "blocks"), list(zip(CHANGES.values(), POOLED, strict=True)), ids=CHANGES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_all_gradients_are_those_of_the_library(changes, blocks, checkpointing, dtype):
    fast, slow = (model.to(dtype) for model in both(**changes))
    if checkpointing:
        fast.backbone.set_grad_checkpointing()
    assert any(type(module) is SelfAttention for module in fast.modules())
    assert sum(type(module) is PooledBlock for module in fast.modules()) == blocks
    found, wanted = gradients(fast), gradients(slow)
    assert list(fast.state_dict()) == list(slow.state_dict())
    assert list(found) == list(wanted)
    # Embeddings are normalised in fp32.
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            fast.eval()(*batch(fast.preprocess.size[0]))[0], slow.eval()(*batch(fast.preprocess.size[0]))[0]
        )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("changes", [CHANGES["plain"], CHANGES["class token"]], ids=["plain", "class token"])
def test_bf16_rounds_no_worse_than_the_library(changes, autocast):
    fast, slow = both(**changes)
    exact = gradients(copy.deepcopy(slow).double())
    if not autocast:
        for model in (fast, slow):
            model.to(torch.bfloat16)
    found, wanted = gradients(fast, autocast=autocast), gradients(slow, autocast=autocast)

    def error(of):
        return sum((of[name].double() - tensor).norm() / tensor.norm() for name, tensor in exact.items())

    assert list(found) == list(exact)
    assert error(found) < 1.1 * error(wanted)


@pytest.mark.parametrize("length", [1, 7, 65])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_bf16_attention_is_its_definition(length, mask):
    generator = torch.Generator().manual_seed(length)
    qkv = torch.randn(3, length, 3 * 2 * 16, generator=generator).bfloat16()
    weight = torch.randn(3, length, 32, generator=generator)
    additive = None if mask == "none" else torch.full((length, length), -torch.inf).triu_(1)
    if additive is not None and mask == "padding":
        additive = additive.expand(6, -1, -1).clone()
        additive[2:4, :, length // 2 + 1 :] = -torch.inf

    def written_out(x):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        similarities = q @ k.transpose(-1, -2) / 4
        if additive is not None:
            similarities = similarities + (additive if additive.ndim == 2 else additive.view(3, 2, length, length))
        return (similarities.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def torch_s_own(x):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.chunk(3, -1))
        rounded = additive if additive is None else additive.to(x.dtype)
        rounded = rounded.view(3, 2, length, length) if rounded is not None and rounded.ndim == 3 else rounded
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rounded).transpose(1, 2).flatten(2)

    def with_gradient(function, x):
        x = x.clone().requires_grad_()
        found = function(x)
        (found * weight.to(x.dtype)).sum().backward()
        return torch.stack([found.detach().double().norm(dim=-1), x.grad.double().norm(dim=-1)]), found, x.grad

    _, out, grad = with_gradient(lambda x: attend_qkv(x, 2, additive), qkv)
    _, exact_out, exact_grad = with_gradient(written_out, qkv.double())
    _, own_out, own_grad = with_gradient(torch_s_own, qkv)

    def error(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    assert out.dtype == grad.dtype == torch.bfloat16
    assert error(out, exact_out) < max(1.5 * error(own_out, exact_out), 2e-3)
    assert error(grad, exact_grad) < max(1.5 * error(own_grad, exact_grad), 4e-3)


def test_what_is_not_known_to_be_the_same_stays():
    class Other(ResidualAttentionBlock):
        pass

    blocks = nn.ModuleList(
        [
            Other(32, 2),
            ResidualAttentionBlock(32, 2, is_cross_attention=True),
            ResidualAttentionBlock(32, 2, batch_first=False),
        ]
    )
    speed_up(blocks)
    assert all(type(block.attn) is nn.MultiheadAttention for block in blocks)


@pytest.mark.parametrize("length", [7, 9])
def test_the_last_block_computes_what_is_read_and_no_more(length):
    model, _ = both(custom_text=True)
    seen = []
    for part in (model.backbone.visual, model.backbone.text):
        for block in part.transformer.resblocks:
            block.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    pixels, tokens = batch(40)
    model(pixels, tokens[:, :length])
    assert seen == [26, 1, length, 1]


def test_a_block_that_is_read_everywhere_is_the_librarys():
    torch.manual_seed(0)
    fast = ResidualAttentionBlock(32, 2)
    slow = copy.deepcopy(fast)
    fast.attn.__class__, fast.__class__ = SelfAttention, PooledBlock
    x, mask = torch.randn(3, 5, 32), torch.full((5, 5), -torch.inf).triu_(1)
    wanted = slow(x, attn_mask=mask)
    assert torch.allclose(fast(x, attn_mask=mask), wanted, atol=1e-6)
    at = torch.tensor([4, 0, 2])
    assert torch.allclose(fast(x, attn_mask=mask, at=at)[:, 0], wanted[torch.arange(3), at], atol=1e-6)
    assert torch.allclose(fast(x, at=at)[:, 0], slow(x)[torch.arange(3), at], atol=1e-6)
