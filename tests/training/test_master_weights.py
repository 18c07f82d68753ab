"""fp32 masters under bf16 weights, and the moving average, against the loops that they stand for."""

import copy

import pytest
import torch
from torch import nn

from clipkit.training.loss import info_nce
from clipkit.training.master_weights import Weights
from tests.conftest import tiny_model
from tests.distributed import run_two_ranks

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocab_size": 99},
}
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": RESNET["text_cfg"],
}
MODELS = pytest.mark.parametrize("changes", [VIT, RESNET], ids=["vit", "resnet"])


def batch(seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 98, (size, 8), generator=generator)
    tokens[:, 5] = 98  # the highest number ends a text
    return pixels, tokens


def lossy(model, seed):
    image, text, scale, _ = model(*batch(seed))
    return info_nce(image, text, scale)


def optimizer_of(named, lr=1e-3):
    return torch.optim.AdamW([tensor for _, tensor in named], lr=lr, weight_decay=0.1)


def is_cast(model, name):
    """What the twin casts, stated another way: everything but the scale and what belongs to batch normalisation."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, nn.BatchNorm2d) and not name.endswith("logit_scale")


@MODELS
def test_bf16_weights_do_what_the_written_out_loop_does(changes):
    model = tiny_model(**changes).train()
    plain = copy.deepcopy(model)  # fp32
    cast = copy.deepcopy(model)
    for name, parameter in cast.named_parameters():
        if is_cast(cast, name):
            parameter.data = parameter.data.bfloat16()
    weights, twin = Weights(model, bf16=True), dict(plain.named_parameters())
    optimizer, slow = optimizer_of(weights.named_parameters()), optimizer_of(twin.items())
    assert {name for name, _ in weights.named_parameters()} == set(twin)
    for step in range(3):
        for part in range(2):  # gradients of several calls add up
            lossy(model, 10 * step + part).backward()
            weights.collect_gradients()
            lossy(cast, 10 * step + part).backward()
            for name, parameter in cast.named_parameters():
                gradient = parameter.grad.float()
                twin[name].grad = gradient.clone() if twin[name].grad is None else twin[name].grad + gradient
                parameter.grad = None
        for name, tensor in weights.named_parameters():
            assert torch.equal(tensor.grad, twin[name].grad), name
            assert tensor.grad.stride() == tensor.stride(), name
        optimizer.step()
        slow.step()
        weights.publish()
        weights.zero_grad()
        slow.zero_grad()
        for name, parameter in cast.named_parameters():
            parameter.data.copy_(twin[name])
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.bfloat16 if is_cast(model, name) else torch.float32), name
            assert torch.equal(parameter, cast.get_parameter(name)), name
            assert parameter.grad is None, name
        for name, tensor in weights.named_parameters():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, twin[name]), name
            assert tensor.grad is None
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, cast.get_buffer(name)), name


def test_without_bf16_the_parameters_are_their_own_masters():
    model = tiny_model(**VIT)
    weights = Weights(model, bf16=False)
    assert all(tensor is model.get_parameter(name) for name, tensor in weights.named_parameters())
    lossy(model, 0).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    weights.collect_gradients()
    weights.publish()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    weights.update_average(1)
    assert weights.named_average() is None


def test_updates_that_bf16_would_lose_are_kept():
    layer = nn.Linear(16, 16)
    start = layer.weight.detach().clone()
    weights = Weights(layer, bf16=True)
    optimizer = torch.optim.SGD([tensor for _, tensor in weights.named_parameters()], lr=1e-6)
    for _ in range(1000):
        layer.weight.grad = torch.ones_like(layer.weight)
        weights.collect_gradients()
        optimizer.step()
        weights.publish()
        weights.zero_grad()
    master = dict(weights.named_parameters())["weight"]
    torch.testing.assert_close(master, start - 1e-3, rtol=0, atol=1e-5)
    assert torch.equal(layer.weight, master.bfloat16())
    lost = start.bfloat16()
    for _ in range(1000):
        lost -= 1e-6
    assert (lost.float() - start.bfloat16().float()).abs().mean() < 1e-4


@MODELS
@pytest.mark.parametrize("bf16", [True, False])
def test_the_average_is_its_definition(changes, bf16):
    model = tiny_model(**changes).train()
    weights = Weights(model, bf16=bf16, ema=0.5)
    slow = {name: tensor.detach().double() for name, tensor in weights.named_tensors()}
    optimizer = optimizer_of(weights.named_parameters(), lr=1e-2)
    for step in range(1, 9):
        lossy(model, step).backward()
        weights.collect_gradients()
        optimizer.step()
        weights.publish()
        weights.zero_grad()
        weights.update_average(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in weights.named_tensors():
            whole = not tensor.is_floating_point()
            slow[name] = tensor.double() if whole else decay * slow[name] + (1 - decay) * tensor.detach().double()
    average = weights.named_average()
    assert average is not None
    for name, tensor in average:
        torch.testing.assert_close(tensor.double(), slow[name], rtol=1e-5, atol=1e-7)
    if changes is RESNET:
        counted = dict(weights.named_average() or ())["backbone.visual.bn1.num_batches_tracked"]
        assert counted == 8


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_is_saved_of_a_locked_tower_is_bit_equal(ema):
    model = tiny_model(**RESNET)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.backbone.visual.requires_grad_(False)
    weights = Weights(model, bf16=True, ema=ema)
    optimizer = optimizer_of(weights.named_parameters())
    assert not any("visual" in name for name, _ in weights.named_parameters())
    for step in range(2):
        lossy(model, step).backward()
        weights.collect_gradients()
        optimizer.step()
        weights.publish()
        weights.update_average(step)
        weights.zero_grad()
    for found in (dict(weights.named_tensors()), dict(weights.named_average() or weights.named_tensors())):
        assert list(found) == list(start)
        for name, tensor in found.items():
            assert tensor.dtype == start[name].dtype, name
            assert torch.equal(tensor, start[name]) == (".visual." in name), name


@MODELS
def test_a_checkpoint_written_into_the_tensors_reaches_the_towers(changes):
    model, other = tiny_model(**changes), tiny_model(seed=1, **changes)
    model.backbone.visual.requires_grad_(False)
    weights = Weights(model, bf16=True)
    wanted = other.state_dict()
    with torch.no_grad():
        for name, tensor in weights.named_tensors():
            tensor.copy_(wanted[name])
    weights.publish()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


def test_tied_weights_have_one_master_and_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weights = Weights(model, bf16=True)
    named = dict(weights.named_tensors())
    assert named["0.weight"] is named["1.weight"]
    assert [name for name, _ in weights.named_parameters()] == ["0.weight", "0.bias", "1.bias"]


def sharded_average(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    layer = nn.Linear(3, 5)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        full = torch.randn(parameter.shape, generator=generator)
        setattr(layer, name, nn.Parameter(distribute_tensor(full, mesh, [Shard(0)])))
    weights = Weights(layer, bf16=False, ema=0.5)
    optimizer = torch.optim.SGD([tensor for _, tensor in weights.named_parameters()], lr=1.0)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights.collect_gradients()
    optimizer.step()
    weights.publish()
    weights.update_average(100)
    return [(tensor.full_tensor().detach(), a.full_tensor()) for (_, tensor), (_, a) in both(weights)]


def both(weights):
    return zip(weights.named_tensors(), weights.named_average() or (), strict=True)


def test_sharded_parameters_are_averaged_where_they_are():
    for of_rank in run_two_ranks(sharded_average):
        generator = torch.Generator().manual_seed(0)
        for now, average in of_rank:
            start = torch.randn(now.shape, generator=generator)
            torch.testing.assert_close(now, start - 1)
            torch.testing.assert_close(average, start - 0.5)
