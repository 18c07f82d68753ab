"""The objectives against their obvious twins, open_clip's, and themselves over two processes."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from clipkit.training.loss import info_nce, sigmoid_loss
from tests.distributed import run_two_ranks

SIZES = [(1, 3), (5, 7), (17, 4)]


def pairs(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(7.5, dtype=torch.float64)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    return [t.requires_grad_() for t in (F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale, bias)]


def slow_info_nce(image, text, scale, same, label_smoothing=0.0):
    """One row at a time, from the definition."""
    total = torch.zeros((), dtype=image.dtype)
    for a, b in ((image, text), (text, image)):
        for i in range(len(a)):
            kept = [j for j in range(len(b)) if j == i or not same[i, j]]
            powers = torch.stack([torch.exp(scale * (a[i] @ b[j])) for j in kept])
            for j, power in zip(kept, powers, strict=True):
                target = label_smoothing / len(kept) + (1 - label_smoothing if i == j else 0)
                total = total - target * torch.log(power / powers.sum())
    return total / (2 * len(image))


def slow_sigmoid(image, text, scale, bias, same):
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1 if i == j else -1
            if i == j or not same[i, j]:
                total = total - torch.log(1 / (1 + torch.exp(-sign * (scale * (image[i] @ text[j]) + bias))))
    return total / len(image)


def assert_equal_with_gradients(ours, theirs, inputs):
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_info_nce_is_open_clips_and_its_definition(n, dim):
    image, text, scale, _ = inputs = pairs(n, dim)
    assert_equal_with_gradients(info_nce(image, text, scale), ClipLoss()(image, text, scale), inputs[:3])
    nothing = torch.zeros(n, n, dtype=torch.bool)
    assert_equal_with_gradients(info_nce(image, text, scale), slow_info_nce(image, text, scale, nothing), inputs[:3])


@pytest.mark.parametrize(("n", "dim"), SIZES)
def test_sigmoid_is_open_clips_and_its_definition(n, dim):
    image, text, scale, bias = inputs = pairs(n, dim)
    ours = sigmoid_loss(image, text, scale, bias)
    assert_equal_with_gradients(ours, SigLipLoss()(image, text, scale, bias), inputs)
    nothing = torch.zeros(n, n, dtype=torch.bool)
    ours = sigmoid_loss(image, text, scale, bias)
    assert_equal_with_gradients(ours, slow_sigmoid(image, text, scale, bias, nothing), inputs)


def test_pairs_of_one_image_or_one_text_are_no_negatives():
    image, text, scale, bias = inputs = pairs(7, 5)
    image_ids, text_ids = torch.tensor([1, 1, 2, 3, 4, 5, 1]), torch.tensor([1, 2, 3, 3, 4, 5, 6])
    same = (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)
    ids = {"image_ids": image_ids, "text_ids": text_ids}
    ours = info_nce(image, text, scale, **ids)
    assert_equal_with_gradients(ours, slow_info_nce(image, text, scale, same), inputs[:3])
    ours = sigmoid_loss(image, text, scale, bias, **ids)
    assert_equal_with_gradients(ours, slow_sigmoid(image, text, scale, bias, same), inputs)
    assert info_nce(image, text, scale, **ids) < info_nce(image, text, scale)


def test_label_smoothing_is_pytorchs_and_its_definition():
    image, text, scale, _ = inputs = pairs(7, 5)
    logits, target = scale * image @ text.T, torch.arange(7)
    theirs = sum(F.cross_entropy(each, target, label_smoothing=0.2) for each in (logits, logits.T)) / 2
    assert_equal_with_gradients(info_nce(image, text, scale, label_smoothing=0.2), theirs, inputs[:3])
    ids = torch.tensor([1, 1, 2, 3, 3, 3, 4])
    ours = info_nce(image, text, scale, text_ids=ids, label_smoothing=0.2)
    theirs = slow_info_nce(image, text, scale, ids[:, None] == ids, label_smoothing=0.2)
    assert_equal_with_gradients(ours, theirs, inputs[:3])


def test_one_group_for_all_costs_nothing():
    image, text, scale, _ = pairs(4, 3)
    assert info_nce(image, text, scale, image_ids=torch.ones(4, dtype=torch.int64)) == 0


def test_bf16_features_are_compared_in_fp32():
    image, text, scale, _ = (t.detach() for t in pairs(64, 16))
    low = [image.bfloat16(), text.bfloat16(), scale.float() * 10]
    truth = info_nce(low[0].double(), low[1].double(), low[2].double())
    assert abs(info_nce(*low) - truth) < 1e-5
    assert abs(ClipLoss()(*low[:2], low[2].bfloat16()) - truth) > 1e-4


def _two_ranks(rank, world_size):
    image, text, scale, bias = pairs(10, 6)
    ids = {"image_ids": torch.tensor([1, 2, 3, 4, 5, 1, 7, 8, 9, 10]), "text_ids": torch.arange(10) // 2}
    mine = slice(rank * 5, rank * 5 + 5)
    shown = {}
    losses = {
        "infonce": info_nce(image[mine], text[mine], scale),
        "multi": info_nce(image[mine], text[mine], scale, **{k: v[mine] for k, v in ids.items()}),
        "sigmoid": sigmoid_loss(image[mine], text[mine], scale, bias),
    }
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, [image, text, scale, bias], allow_unused=True)
        shown[name] = (loss.detach(), [g if g is not None else torch.zeros(()) for g in gradients])
    return shown


def test_two_ranks_have_the_joint_batchs_loss_and_gradients():
    results = run_two_ranks(_two_ranks)
    image, text, scale, bias = inputs = pairs(10, 6)
    ids = {"image_ids": torch.tensor([1, 2, 3, 4, 5, 1, 7, 8, 9, 10]), "text_ids": torch.arange(10) // 2}
    joint = {
        "infonce": info_nce(image, text, scale),
        "multi": info_nce(image, text, scale, **ids),
        "sigmoid": sigmoid_loss(image, text, scale, bias),
    }
    for name, whole in joint.items():
        losses = torch.stack([result[name][0] for result in results])
        assert torch.allclose(losses.mean(), whole, rtol=1e-12), name
        wanted = torch.autograd.grad(whole, inputs, allow_unused=True)
        for at, gradient in enumerate(wanted):
            if gradient is not None:
                # What DistributedDataParallel does with the ranks' gradients of a shared parameter.
                averaged = sum(result[name][1][at] for result in results) / 2
                assert torch.allclose(averaged, gradient, rtol=1e-10, atol=1e-14), (name, at)
