"""The gradient of a step: piece by piece it is the whole batch's, dropout, scale and two ranks included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.training.gradient import clip_gradients, compute_gradient
from clipkit.training.loss import info_nce, sigmoid_loss
from tests.conftest import tiny_model
from tests.distributed import run_two_ranks


class Towers(nn.Module):
    """Two small towers with everything that a replay can get wrong: dropout, a scale, a bias, batch statistics."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Dropout(0.3), nn.Linear(9, 5))
        self.text = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Dropout(0.4), nn.Linear(24, 5))
        self.norm = nn.BatchNorm1d(5, affine=False) if norm else nn.Identity()
        self.log_scale = nn.Parameter(torch.tensor(1.3))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, pixels, tokens):
        image = F.normalize(self.norm(self.image(pixels.flatten(1))), dim=-1)
        return image, F.normalize(self.text(tokens), dim=-1), self.log_scale.exp(), self.bias


def batch(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, 2, 2, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(0, 20, (n, 3), generator=generator)


def towers(**settings):
    torch.manual_seed(7)
    return Towers(**settings).double().train()


def nce(image, text, scale, bias):
    return info_nce(image, text, scale) + 0 * bias


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", [nce, sigmoid_loss])
@pytest.mark.parametrize(("n", "micro"), [(7, 3), (8, 4), (5, 1), (6, 5)])
def test_piece_by_piece_with_dropout_it_is_one_big_batch(objective, n, micro):
    """The twin keeps every graph: the same pieces with the same random draws, one loss, one backward pass."""
    model = towers()
    twin = copy.deepcopy(model)
    pixels, tokens = batch(n)
    torch.manual_seed(3)
    outputs = [twin(*piece) for piece in zip(pixels.split(micro), tokens.split(micro), strict=True)]
    wanted = objective(torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs]), *outputs[0][2:])
    wanted.backward()
    drawn_after = torch.rand(1)
    torch.manual_seed(3)
    found = compute_gradient(model, pixels, tokens, objective, micro_batch=micro)
    assert torch.rand(1) == drawn_after  # the generators stand where one pass leaves them
    assert torch.allclose(found.loss, wanted, rtol=1e-12)
    for name, gradient in grads(twin).items():
        assert torch.allclose(grads(model)[name], gradient, rtol=1e-10, atol=1e-14), name


def test_without_dropout_it_is_the_plain_step_and_open_clips_factor_is_not_there():
    model = towers().eval()
    pixels, tokens = batch(9)
    plain, pieces = copy.deepcopy(model), copy.deepcopy(model)
    compute_gradient(plain, pixels, tokens, sigmoid_loss)
    compute_gradient(pieces, pixels, tokens, sigmoid_loss, micro_batch=2)
    for name, gradient in grads(plain).items():
        assert torch.allclose(grads(pieces)[name], gradient, rtol=1e-10, atol=1e-14), name
    assert grads(plain)["log_scale"] != 0


def test_real_towers_with_patch_dropout(model):
    model = tiny_model(vision_cfg={**tiny_model().model_cfg["vision_cfg"], "patch_dropout": 0.5}).train()
    twin = copy.deepcopy(model)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenize(["a", "b c", "d", "a red heart", "five"])
    torch.manual_seed(1)
    outputs = [twin(*piece) for piece in zip(pixels.split(2), tokens.split(2), strict=True)]
    info_nce(torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs]), outputs[0][2]).backward()
    torch.manual_seed(1)
    compute_gradient(model, pixels, tokens, lambda i, t, s, b: info_nce(i, t, s), micro_batch=2)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-7), name


def test_batch_statistics_see_each_sample_once():
    model = towers(norm=True)
    twin = copy.deepcopy(model)
    pixels, tokens = batch(6)
    torch.manual_seed(5)
    compute_gradient(model, pixels, tokens, nce, micro_batch=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for piece in zip(pixels.split(3), tokens.split(3), strict=True):
            twin(*piece)
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked == 2


def test_a_locked_tower_gets_no_gradient():
    model = towers()
    for parameter in model.image.parameters():
        parameter.requires_grad_(False)
    compute_gradient(model, *batch(5), nce, micro_batch=2)
    assert all(p.grad is None for p in model.image.parameters())
    assert all(p.grad is not None for p in model.text.parameters())


def test_gradients_are_collected_after_each_piece():
    calls = []
    compute_gradient(towers(), *batch(5), nce, micro_batch=2, collect=lambda: calls.append(1))
    assert len(calls) == 3


def _ranks(rank, world_size):
    model = towers().eval()
    pixels, tokens = batch(10)
    mine = slice(rank * 5, rank * 5 + 5)
    given = {}
    for micro in (None, 2):
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        compute_gradient(wrapped, pixels[mine], tokens[mine], sigmoid_loss, micro_batch=micro)
        given[micro] = grads(wrapped.module)
    return given


def test_two_ranks_in_pieces_have_the_joint_batchs_gradient():
    model = towers().eval()
    compute_gradient(model, *batch(10), sigmoid_loss)
    for result in run_two_ranks(_ranks):
        for found in result.values():
            for name, gradient in grads(model).items():
                assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-13), name


def test_bad_rows_are_named():
    model = towers().eval()
    pixels, tokens = batch(4)
    pixels[2] = torch.nan
    assert compute_gradient(model, pixels, tokens, nce).bad_rows() == [2]
    assert compute_gradient(model, *batch(4), nce).bad_rows() == []


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_clipping_is_torchs(limit):
    model = towers()
    compute_gradient(model, *batch(6), nce)
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    wanted = nn.utils.clip_grad_norm_(twin.parameters(), float("inf") if limit is None else limit)
    assert torch.allclose(clip_gradients(model.parameters(), limit), wanted, rtol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)
