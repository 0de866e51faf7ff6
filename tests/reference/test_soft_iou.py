"""Soft IoU by hand, by loop and by both forms of target."""

from __future__ import annotations

import pytest
import torch

from fastris import soft_iou


def test_two_pixels_by_hand():
    pred = torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)
    target = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    assert soft_iou(pred, target).item() == pytest.approx(0.5 / (1.5 + 1.0 - 0.5))


def test_every_pair_equals_a_loop():
    pred, target = torch.rand(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 4, 5, 7, dtype=torch.float64)
    iou = soft_iou(pred, target)
    for b in range(2):
        for p in range(3):
            for g in range(4):
                inter = (pred[b, p] * target[b, g]).sum()
                union = pred[b, p].sum() + target[b, g].sum() - inter
                assert iou[b, p, g].item() == pytest.approx((inter / union).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_label_map_equals_its_masks(dtype):
    labels = torch.randint(0, 4, (2, 6, 5)).to(dtype)
    masks = torch.stack([labels == k for k in (1, 2, 3)], 1).double()
    pred = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(soft_iou(pred, labels, num_labels=3), soft_iou(pred, masks))


def test_counts_empty_masks_and_empty_sides_give_zero():
    pred, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, :2] = 1
    iou = soft_iou(pred, labels, torch.tensor([2, 3]), torch.tensor([1, 2]), num_labels=2)
    assert iou[0, 2].eq(0).all() and iou[0, :, 1].eq(0).all() and iou[1].eq(0).all() and iou[0, :2, 0].gt(0).all()
    assert soft_iou(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 0
    assert soft_iou(pred, labels, num_labels=0).shape == (2, 3, 0)
    assert soft_iou(pred[:, :0], labels, num_labels=2).shape == (2, 0, 2)


def test_gradients_in_fp64():
    pred = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 3, 3))
    assert torch.autograd.gradcheck(lambda p: soft_iou(p, labels, num_labels=2), (pred,))


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        (
            torch.zeros(2, 1, 64, 64),
            torch.zeros(2, 64, 64),
            r"target labels must be integer \(B,H,W\), got float32 \(2,64,64\)",
        ),
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), "pred must be floating"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 3, dtype=torch.int64), "target must match pred"),
        (torch.zeros(1, 1, 2, 2), torch.zeros(2), "target must be masks"),
    ],
)
def test_a_wrong_argument_is_named(pred, target, message):
    with pytest.raises(ValueError, match=message):
        soft_iou(pred, target)
