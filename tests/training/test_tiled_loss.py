"""The tiled objectives against the plain ones, open_clip's and the definition; their memory; two processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipkit.training.loss import (
    distillation_loss,
    info_nce,
    sigmoid_loss,
    tiled_distillation_loss,
    tiled_info_nce,
    tiled_sigmoid_loss,
)
from tests.distributed import run_two_ranks
from tests.training.test_loss import assert_equal_with_gradients, pairs

# Rows, dimension, side of the tiles: one row, one tile, ragged tiles, tiles of one entry.
SHAPES = [(1, 3, None), (3, 5, 2), (17, 4, 5), (17, 4, 1), (129, 6, 50), (130, 7, None)]


def given_ids(n, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(groups, (n,), generator=generator) for name in ("image_ids", "text_ids")}


def teachers(n, dim=3, seed=1):
    return tuple(t.detach() for t in pairs(n, dim, seed)[:2])


@pytest.mark.parametrize(("n", "dim", "side"), SHAPES)
def test_info_nce(n, dim, side):
    image, text, scale, _ = inputs = pairs(n, dim)
    ours = tiled_info_nce(image, text, scale, side=side)
    assert_equal_with_gradients(ours, ClipLoss()(image, text, scale), inputs[:3])
    for ids in ({}, given_ids(n, n), {"image_ids": given_ids(n, 3)["image_ids"]}):
        for label_smoothing in (0.0, 0.3):
            how = {**ids, "label_smoothing": label_smoothing}
            ours = tiled_info_nce(image, text, scale, **how, side=side)
            assert_equal_with_gradients(ours, info_nce(image, text, scale, **how), inputs[:3])


@pytest.mark.parametrize(("n", "dim", "side"), SHAPES)
def test_sigmoid(n, dim, side):
    image, text, scale, bias = inputs = pairs(n, dim)
    ours = tiled_sigmoid_loss(image, text, scale, bias, side=side)
    assert_equal_with_gradients(ours, SigLipLoss()(image, text, scale, bias), inputs)
    for ids in (given_ids(n, n), {"text_ids": given_ids(n, 3)["text_ids"]}):
        ours = tiled_sigmoid_loss(image, text, scale, bias, **ids, side=side)
        assert_equal_with_gradients(ours, sigmoid_loss(image, text, scale, bias, **ids), inputs)


@pytest.mark.parametrize(("n", "dim", "side"), SHAPES)
def test_distillation(n, dim, side):
    image, text, scale, _ = inputs = pairs(n, dim)
    teacher = (*teachers(n), torch.tensor(20.0, dtype=torch.float64))
    theirs = DistillClipLoss()(image, text, scale, *teacher)[1]
    assert_equal_with_gradients(distillation_loss(image, text, scale, *teacher), theirs, inputs[:3])
    theirs = DistillClipLoss()(image, text, scale, *teacher)[1]
    assert_equal_with_gradients(tiled_distillation_loss(image, text, scale, *teacher, side=side), theirs, inputs[:3])


def test_a_teacher_in_half_precision_is_compared_at_the_students():
    image, text, scale, _ = inputs = pairs(17, 4)
    teacher = tuple(t.half() for t in teachers(17))
    ours = tiled_distillation_loss(image, text, scale, *teacher, 20.0, side=5)
    theirs = DistillClipLoss()(image, text, scale, *(t.double() for t in teacher), torch.tensor(20.0))[1]
    assert_equal_with_gradients(ours, theirs, inputs[:3])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_and_any_ids(data):
    n, dim, side = (data.draw(st.integers(1, most)) for most in (20, 9, 8))
    image, text, scale, bias = inputs = pairs(n, dim, data.draw(st.integers(0, 99)))
    ids = {
        name: torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
        for name in data.draw(st.sets(st.sampled_from(["image_ids", "text_ids"])))
    }
    how = {**ids, "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 0.9]))}
    ours = tiled_info_nce(image, text, scale, **how, side=side)
    assert_equal_with_gradients(ours, info_nce(image, text, scale, **how), inputs[:3])
    ours = tiled_sigmoid_loss(image, text, scale, bias, **ids, side=side)
    assert_equal_with_gradients(ours, sigmoid_loss(image, text, scale, bias, **ids), inputs)


def opposites(n, dtype):
    """Similarities of 1 and -1 only, at scale 100; exp overflows from 89 on."""
    axis = torch.zeros(n, 3, dtype=dtype)
    axis[:, 0] = torch.tensor([1.0, -1.0, -1.0] * n)[:n]
    scale = torch.tensor(100.0, dtype=dtype)
    return axis.clone().requires_grad_(), axis.flip(0).clone().requires_grad_(), scale.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype):
    image, text, _ = inputs = opposites(11, dtype)
    bias = torch.tensor(-10.0, dtype=dtype).requires_grad_()
    teacher = teachers(11)
    cases = [
        (tiled_info_nce(*inputs, side=4), info_nce(*(t.double() for t in inputs))),
        (
            tiled_distillation_loss(*inputs, image, text, 100.0, side=4),
            distillation_loss(*(t.double() for t in inputs), image, text, 100.0),
        ),
        (
            tiled_distillation_loss(*inputs, *(t.to(dtype) for t in teacher), 100.0, side=4),
            distillation_loss(*(t.double() for t in inputs), *(t.to(dtype) for t in teacher), 100.0),
        ),
        (tiled_sigmoid_loss(*inputs, bias, side=4), sigmoid_loss(*(t.double() for t in (*inputs, bias)))),
    ]
    for ours, theirs in cases:
        assert torch.isfinite(ours)
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-4 if dtype is torch.float32 else 1e-10)
        for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
            assert torch.isfinite(mine).all()
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)


def _of(function, inputs):
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("tiled", "plain", "count"),
    [
        (tiled_info_nce, info_nce, 3),
        (tiled_sigmoid_loss, sigmoid_loss, 4),
        (
            lambda *inputs, **how: tiled_distillation_loss(*inputs, *teachers(100), 20.0, **how),
            lambda *inputs: distillation_loss(*inputs, *teachers(100), 20.0),
            3,
        ),
    ],
)
def test_bf16_is_no_further_from_the_truth_than_the_plain_form(tiled, plain, count):
    wrong = torch.zeros(2, 1 + count, dtype=torch.float64)
    for seed in range(5):
        image, text, scale, bias = pairs(100, 33, seed)
        low = [image.detach().bfloat16(), text.detach().bfloat16(), scale.detach().float() * 10, bias.detach().float()]
        inputs = [t.requires_grad_() for t in low[:count]]
        truth = _of(plain, [t.detach().double().requires_grad_() for t in inputs])
        for row, found in zip(wrong, (_of(lambda *a: tiled(*a, side=32), inputs), _of(plain, inputs)), strict=True):
            row += torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)])
            assert found[1].dtype == torch.bfloat16
    assert (wrong[0] <= 1.05 * wrong[1] + 1e-6).all(), wrong


class Largest(TorchDispatchMode):
    """The most bytes that any tensor holds which an operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "distillation"])
def test_nothing_is_as_large_as_n_by_n(name):
    n, dim, side = 2048, 8, 256
    image, text, scale, bias = (t.detach().float().requires_grad_() for t in pairs(n, dim))
    ids = given_ids(n, n)
    tiled, plain = {
        "info_nce": (
            lambda: tiled_info_nce(image, text, scale, **ids, label_smoothing=0.1, side=side),
            lambda: info_nce(image, text, scale, **ids, label_smoothing=0.1),
        ),
        "sigmoid": (
            lambda: tiled_sigmoid_loss(image, text, scale, bias, **ids, side=side),
            lambda: sigmoid_loss(image, text, scale, bias, **ids),
        ),
        "distillation": (
            lambda: tiled_distillation_loss(image, text, scale, *teachers(n), 20.0, side=side),
            lambda: distillation_loss(image, text, scale, *teachers(n), 20.0),
        ),
    }[name]
    with Largest() as seen:
        tiled().backward()
    assert seen.size <= 8 * max(n * dim, side * side)
    with Largest() as seen:
        plain().backward()
    assert seen.size >= 4 * n * n


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def test_one_process_computes_the_similarities_once():
    with Products() as seen:
        info_nce(*pairs(33, 6)[:3])
    assert seen.count == 1


def test_only_what_is_asked_for_gets_a_gradient():
    everything = pairs(17, 4)
    for wanted in ([0], [1], [2], [0, 2], [1, 2], [0, 1], [3], [1, 3]):
        inputs = [t.detach().requires_grad_(at in wanted) for at, t in enumerate(everything)]
        asked = [inputs[at] for at in wanted]
        ours = tiled_sigmoid_loss(*inputs, side=5)
        assert_equal_with_gradients(ours, sigmoid_loss(*inputs), asked)
        if 3 not in wanted:
            assert_equal_with_gradients(tiled_info_nce(*inputs[:3], side=5), info_nce(*inputs[:3]), asked)
    with torch.no_grad():
        assert not tiled_sigmoid_loss(*everything).requires_grad
        assert torch.allclose(tiled_sigmoid_loss(*everything, side=5), sigmoid_loss(*everything), rtol=1e-12)
        assert torch.allclose(tiled_info_nce(*everything[:3], side=5), info_nce(*everything[:3]), rtol=1e-12)


def test_the_gradient_from_above_is_passed_on():
    image, text, scale, bias = inputs = pairs(17, 4)
    assert_equal_with_gradients(
        3 * tiled_info_nce(image, text, scale, side=5) + 5 * tiled_sigmoid_loss(image, text, scale, bias, side=5),
        3 * info_nce(image, text, scale) + 5 * sigmoid_loss(image, text, scale, bias),
        inputs,
    )


def test_autocast_changes_nothing():
    image, text, scale, bias = inputs = [t.detach().float().requires_grad_() for t in pairs(33, 16)]
    teacher = teachers(33)

    def losses():
        yield tiled_info_nce(image, text, scale, side=8)
        yield tiled_sigmoid_loss(image, text, scale, bias, side=8)
        yield tiled_distillation_loss(image, text, scale, *teacher, 20.0, side=8)
        yield info_nce(image, text, scale)
        yield sigmoid_loss(image, text, scale, bias)
        yield distillation_loss(image, text, scale, *teacher, 20.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = list(losses())
    for loss, wanted in zip(under_autocast, losses(), strict=True):
        assert torch.equal(loss, wanted)
        gradients = (torch.autograd.grad(each, inputs, allow_unused=True) for each in (loss, wanted))
        for mine, other in zip(*gradients, strict=True):
            assert (mine is None and other is None) or torch.equal(mine, other)


def _losses(mine, n, forms):
    """Every objective over the rows `mine` of n pairs."""
    image, text, scale, bias = inputs = pairs(n, 6)
    ids = {k: v[mine] for k, v in given_ids(n, 5).items()}
    teacher = (*(t[mine] for t in teachers(n)), 20.0)
    nce, sigmoid, distillation, how = forms
    image_here, text_here = image[mine], text[mine]
    return inputs, {
        "infonce": nce(image_here, text_here, scale, **how),
        "smoothed": nce(image_here, text_here, scale, **how, label_smoothing=0.2),
        "multi": nce(image_here, text_here, scale, **how, **ids, label_smoothing=0.2),
        "sigmoid": sigmoid(image_here, text_here, scale, bias, **how),
        "sigmoid multi": sigmoid(image_here, text_here, scale, bias, **how, **ids),
        "distillation": distillation(image_here, text_here, scale, *teacher, **how),
        "locked": nce(image_here.detach(), text_here, scale, **how),
        "low": nce(image_here.bfloat16(), text_here.bfloat16(), scale, **how).double(),
    }


PLAIN = (info_nce, sigmoid_loss, distillation_loss, {})
TILED = (tiled_info_nce, tiled_sigmoid_loss, tiled_distillation_loss)
FORMS = {
    "plain": PLAIN,
    "gather": (*TILED, {"side": 4}),
    "ring": (*TILED, {"side": 4, "ring": True}),
    "ring in one tile": (*TILED, {"ring": True}),
}


def _two_ranks(rank, world_size):
    shown = {}
    for form, forms in FORMS.items():
        inputs, losses = _losses(slice(rank * 9, rank * 9 + 9), 18, forms)
        for name, loss in losses.items():
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            shown[form, name] = (
                loss.detach(),
                [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)],
            )
    return shown


def test_two_ranks_have_the_joint_batchs_loss_and_gradients():
    results = run_two_ranks(_two_ranks)
    inputs, joint = _losses(slice(None), 18, PLAIN)
    for name, whole in joint.items():
        wanted = torch.autograd.grad(whole, inputs, allow_unused=True)
        close = {"rtol": 1e-2, "atol": 1e-4} if name == "low" else {"rtol": 1e-10, "atol": 1e-14}
        for form in FORMS:
            losses = torch.stack([result[form, name][0] for result in results])
            assert torch.allclose(losses.mean(), whole, rtol=close["rtol"]), (form, name)
            for at, gradient in enumerate(wanted):
                # What DistributedDataParallel does with the ranks' gradients of a shared parameter.
                averaged = sum(result[form, name][1][at] for result in results) / 2
                gradient = torch.zeros_like(averaged) if gradient is None else gradient
                assert torch.allclose(averaged, gradient, **close), (form, name, at)
