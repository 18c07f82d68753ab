"""Parameter groups, layer-wise rates, Muon beside torch's own, and the same steps with sharded weights."""

import copy

import pytest
import torch
from torch import nn

from clipkit.models import ModelConfig, create_model
from clipkit.training import optim
from clipkit.training.optim import Muon, make_optimizers, parameter_groups, set_rate
from clipkit.training.settings import OptimConfig
from tests.conftest import tiny_model
from tests.distributed import run_two_ranks

CPU = torch.device("cpu")
SAME = {"image": 1.0, "text": 1.0}


def optimizers_of(model, kind="adamw", layer_decay=SAME, **settings):
    config = OptimConfig(kind=kind, **settings)
    return make_optimizers(model.named_parameters(), config, model.layer_depths(), layer_decay, CPU)


def names_of(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}


def scales(groups, model):
    names = {id(p): name.removeprefix("backbone.") for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_each_layer_learns_slower_than_the_one_above_it():
    model = tiny_model(init_logit_bias=-10.0)  # 2 layers of images, 1 of texts
    decay = {"image": 0.5, "text": 0.1}
    groups = parameter_groups(model.named_parameters(), 0.3, depths=model.layer_depths(), layer_decay=decay)
    keys = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert keys == sorted(set(keys), reverse=True)
    scale = scales(groups, model)
    assert set(scale) == {name for name, _ in model.backbone.named_parameters()}
    wanted = {
        "logit_scale": 1,
        "logit_bias": 1,
        "visual.proj": 1,
        "visual.ln_post.weight": 1,
        "visual.transformer.resblocks.1.ln_1.weight": 0.5,
        "visual.transformer.resblocks.0.attn.in_proj_weight": 0.25,
        "visual.conv1.weight": 0.125,
        "visual.positional_embedding": 0.125,
        "text_projection": 1,
        "ln_final.bias": 1,
        "transformer.resblocks.0.mlp.c_fc.weight": 0.1,
        "token_embedding.weight": 0.01,
    }
    assert {name: scale[name] for name in wanted} == pytest.approx(wanted)
    optimizers = optimizers_of(model, layer_decay=decay, lr=2.0)
    set_rate(optimizers, 4.0)
    assert [g["lr"] for g in optimizers[0].param_groups] == [4.0 * g["lr_scale"] for g in groups]


def test_masters_stand_for_parameters_and_without_depths_there_is_one_rate():
    model = tiny_model()
    masters = [(name, p.detach().double()) for name, p in model.named_parameters()]
    groups = parameter_groups(masters, 0.3)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.3), (1.0, 0.0)]
    assert groups[0]["params"][0] is next(t for n, t in masters if t.ndim > 1 and "embedding" not in n)


def test_muon_takes_the_matrices_inside_the_layers():
    model = tiny_model()
    adamw, muon = optimizers_of(model, "muon")
    blocks = {n for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2}
    assert names_of(muon, model) == blocks
    assert names_of(adamw, model) == {n for n, _ in model.named_parameters()} - blocks
    parts = {
        n: g["parts"]
        for g in muon.param_groups
        for n in blocks
        for p in g["params"]
        if p is dict(model.named_parameters())[n]
    }
    assert {n.rpartition(".")[2] for n, count in parts.items() if count == 3} == {"in_proj_weight"}
    [only] = optimizers_of(model)
    assert isinstance(only, torch.optim.AdamW)
    assert len(names_of(only, model)) == len(list(model.parameters()))


def test_muon_is_torchs_with_queries_keys_and_values_apart(monkeypatch):
    monkeypatch.setattr(optim, "fast_bf16", lambda device: True)
    torch.manual_seed(0)
    fused, wide = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(6, 17))
    apart = [nn.Parameter(part.detach().clone()) for part in fused.chunk(3)] + [nn.Parameter(wide.detach().clone())]
    ours = Muon([{"params": [fused], "parts": 3, "weight_decay": 0.2}, {"params": [wide], "weight_decay": 0.2}], lr=0.1)
    theirs = torch.optim.Muon(apart, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        fused.grad, wide.grad = torch.randn(24, 8), torch.randn(6, 17)
        for twin, grad in zip(apart, [*fused.grad.chunk(3), wide.grad], strict=True):
            twin.grad = grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(fused, torch.cat(apart[:3]))
        assert torch.equal(wide, apart[3])


def test_a_device_that_is_slow_at_bf16_takes_muons_steps_in_fp32(monkeypatch):
    taken = {}
    for fast in (True, False):
        monkeypatch.setattr(optim, "fast_bf16", lambda device, fast=fast: fast)
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.zeros(24, 40))
        matrix.grad = torch.randn(24, 40)
        Muon([{"params": [matrix], "weight_decay": 0.0}], lr=1.0).step()
        taken[fast] = matrix.detach() / (0.2 * 40**0.5)
        values = torch.linalg.svdvals(taken[fast])
        assert 0.6 < values.min() < values.max() < 1.3
    assert torch.allclose(taken[True], taken[False], atol=0.05)
    assert not torch.equal(taken[True], taken[False])


def test_muon_takes_the_convolutions_inside_a_resnet_as_matrices():
    torch.manual_seed(0)
    kernel, flat = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.empty(8, 36))
    flat.data.copy_(kernel.data.flatten(1))
    optimizers = [Muon([kernel], lr=0.1), Muon([flat], lr=0.1)]
    for _ in range(2):
        kernel.grad = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
        flat.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), flat)

    config = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    text = {"context_length": 8, "width": 16, "heads": 2, "layers": 2}
    model = create_model(ModelConfig(embed_dim=16, vision_cfg=config, text_cfg=text))
    taken = names_of(optimizers_of(model, "muon")[1], model)
    kernels = {n for n, p in model.named_parameters() if p.ndim == 4}
    assert taken & kernels == {n for n in kernels if ".layer" in n} != set()
    depthwise = nn.Parameter(torch.randn(8, 1, 3, 3))
    depths = {"stem": ("image", 0), "inside": ("image", 1), "head": ("image", 2)}
    named = [("stem", kernel), ("inside", depthwise), ("head", flat)]
    [only] = make_optimizers(named, OptimConfig(kind="muon"), depths, SAME, CPU)
    assert isinstance(only, torch.optim.AdamW)


def steps_of(model, optimizers, side, length):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(3):
        pixels = torch.randint(0, 255, (4, 3, side, side), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(1, 49406, (4, length), generator=generator)
        image, text, scale, _ = model(pixels, tokens)
        loss = nn.functional.cross_entropy(scale * image @ text.T, torch.arange(4))
        loss.backward()
        set_rate(optimizers, 1e-2 / (step + 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded_steps(rank, world_size):
    """Both kinds of optimizer on a model sharded by FSDP2 and on its whole twin, the second with smaller samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    mesh = init_device_mesh("cpu", (world_size,))
    for kind, side, length in (("adamw", 32, 24), ("muon", 16, 9)):
        decay = {"image": 0.7, "text": 0.9}
        whole = tiny_model().train().to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels_last
        sharded = copy.deepcopy(whole)
        for layer in [*sharded.backbone.visual.transformer.resblocks, *sharded.backbone.transformer.resblocks]:
            fully_shard(layer, mesh=mesh)
        scalars = {p for p in sharded.parameters() if p.ndim == 0}  # FSDP2 takes none
        fully_shard(sharded, mesh=mesh, ignored_params=scalars)
        whole.set_gradient_checkpointing(True)
        sharded.set_gradient_checkpointing(kind == "muon")
        losses = [steps_of(m, optimizers_of(m, kind, decay, lr=1e-2), side, length) for m in (whole, sharded)]
        full = {n: p.full_tensor() if p.ndim else p for n, p in sharded.named_parameters()}
        found[kind] = (losses, {n: (p - full[n]).detach().abs().max().item() for n, p in whole.named_parameters()})
    return found


def gathered_muon(rank, world_size):
    """Muon on rows that two ranks share, odd numbers of them too, beside the same matrix whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, equal = init_device_mesh("cpu", (world_size,)), []
    for shape, parts in (((24, 8), 3), ((5, 7), 1), ((1, 9), 1)):
        torch.manual_seed(0)
        whole = nn.Parameter(torch.randn(shape))
        mine = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        optimizers = [Muon([{"params": [p], "parts": parts}], lr=0.1) for p in (whole, mine)]
        for _ in range(3):
            whole.grad = torch.randn(shape)
            mine.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        equal.append(torch.equal(whole, mine.full_tensor()))
        momentum = optimizers[1].state[mine]["momentum_buffer"]
        equal.append(momentum.to_local().shape == mine.to_local().shape)
    return equal


def both(rank, world_size):
    return gathered_muon(rank, world_size), sharded_steps(rank, world_size)


def test_sharded_weights_take_the_same_steps():
    for equal, found in run_two_ranks(both):
        assert equal == [True] * 6
        for losses, differences in found.values():
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
            assert max(differences.values()) < 1e-5, differences
