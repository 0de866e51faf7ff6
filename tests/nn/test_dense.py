"""Dense maps: their targets against a loop over pixels, their loss, and what a model makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from fastris import ModelConfig, RecurrentInstanceSegmenter, RISLoss
from fastris.nn.dense import DenseHead, DenseMaps, dense_loss, dense_targets

TINY = {"feature_channels": 8, "backbone_channels": (8, 8, 8, 8), "hidden_channels": 8}


def make_labels():
    labels = torch.zeros(2, 9, 12, dtype=torch.int64)
    labels[0, 1:4, 2:7], labels[0, 5:9, 5:12], labels[0, 8, 0] = 1, 2, 3
    labels[1, :, 6:], labels[1, 0] = 1, -1
    return labels


def test_targets_are_those_of_a_loop_over_pixels():
    labels = make_labels()
    target = dense_targets(labels, 4, 32.0)
    for b in range(2):
        for k in range(1, int(labels[b].max()) + 1):
            pixels = (labels[b] == k).nonzero().double()
            middle, radius = pixels.mean(0), math.sqrt(len(pixels) / math.pi)
            for y, x in pixels.long().tolist():
                away = middle - torch.tensor([y, x])
                assert target.foreground[b, y, x] == 1
                torch.testing.assert_close(target.offset[b, :, y, x], (away.flip(0) / 32).float())
                expected = math.exp(-away.square().sum().item() / (2 * (radius / 3) ** 2))
                assert target.centre[b, y, x].item() == pytest.approx(expected, rel=1e-4)
        nothing = labels[b] <= 0
        assert target.foreground[b][nothing].abs().sum() == 0 and target.centre[b][nothing].abs().sum() == 0


def test_the_loss_is_the_smallest_where_the_maps_show_the_target():
    labels = make_labels()
    target, known = dense_targets(labels, 3, 32.0), labels >= 0
    right = DenseMaps((target.foreground - 0.5) * 40, torch.logit(target.centre, 1e-6), target.offset)
    least = dense_loss(right, target, known)
    entropy = -(torch.xlogy(target.centre, target.centre) + torch.xlogy(1 - target.centre, 1 - target.centre))
    means = torch.stack([entropy[b][known[b]].mean() for b in range(2)])  # what no prediction of a share can avoid
    torch.testing.assert_close(least, means, rtol=0, atol=1e-4)
    for wrong in (
        right._replace(foreground=right.foreground * 0),
        right._replace(centre=right.centre + 1),
        right._replace(offset=right.offset + 0.1),
    ):
        assert (dense_loss(wrong, target, known) > least + 0.01).all()


def test_void_and_background_do_not_count_where_they_should_not():
    labels = make_labels()
    target, known = dense_targets(labels, 3, 32.0), labels >= 0
    maps = DenseHead(5)(torch.randn(2, 5, 9, 12))
    loss = dense_loss(maps, target, known)
    void = (labels < 0).float() * 100
    background = (labels == 0).float() * 100
    moved = DenseMaps(maps.foreground + void, maps.centre - void, maps.offset + (void + background).unsqueeze(1))
    torch.testing.assert_close(dense_loss(moved, target, known), loss)


@pytest.mark.parametrize("labels", [torch.zeros(1, 8, 8).long(), torch.full((1, 8, 8), -1)], ids=["empty", "void"])
def test_an_image_without_objects_or_all_void_has_a_finite_loss(labels):
    maps = DenseHead(5)(torch.randn(1, 5, 8, 8))
    loss = dense_loss(maps, dense_targets(labels, 0, 32.0), labels >= 0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()


def test_targets_do_not_depend_on_the_default_dtype():
    expected = dense_targets(make_labels(), 3, 32.0)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(dense_targets(make_labels(), 3, 32.0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_image_has_the_same_loss_alone_and_in_a_batch():
    labels = make_labels()
    target, maps = dense_targets(labels, 3, 32.0), DenseHead(5)(torch.randn(2, 5, 9, 12))
    together = dense_loss(maps, target, labels >= 0)
    for b in range(2):
        alone = [DenseMaps(*(one[b : b + 1] for one in parts)) for parts in (maps, target)]
        torch.testing.assert_close(dense_loss(*alone, labels[b : b + 1] >= 0), together[b : b + 1])


def model_output(steps=3):
    torch.manual_seed(0)
    model = RecurrentInstanceSegmenter(ModelConfig(**TINY))
    return model(torch.rand(2, 3, 30, 41), steps)


def test_both_maps_cover_the_image_at_their_stride():
    output = model_output()
    features, detail = output.dense
    assert features.foreground.shape == output.log_place[:, 0].shape == (2, 8, 11)
    assert detail.foreground.shape == output.mask_logits[:, 0].shape == (2, 15, 21)
    assert features.offset.shape == (2, 2, 8, 11) and detail.centre.shape == (2, 15, 21)


def test_the_term_of_the_loss_and_its_weight():
    output = model_output()
    labels = torch.zeros(2, 30, 41, dtype=torch.int64)
    labels[0, 3:12, 5:20], labels[0, 15:25, 25:33], labels[1, 10:20, 10:20] = 1, 2, 1
    counts = torch.tensor([2, 1])
    terms, without = (
        RISLoss(dense_weight=0.5)(output, labels, counts),
        RISLoss(dense_weight=0.0)(output, labels, counts),
    )
    assert terms.dense > 0
    torch.testing.assert_close(terms.total, without.total + 0.5 * terms.dense)
    masks = torch.stack([labels == 1, labels == 2], 1)
    torch.testing.assert_close(RISLoss(dense_weight=0.5)(output, masks, counts), terms)
    assert RISLoss()(output._replace(dense=None), labels, counts).dense == 0


def test_the_maps_learn_what_the_target_is():
    torch.manual_seed(0)
    model = RecurrentInstanceSegmenter(ModelConfig(**TINY))
    images, labels = torch.rand(1, 3, 32, 32) * 0.1, torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[0, 4:14, 6:18], labels[0, 18:30, 16:28] = 1, 2
    images += (labels > 0).unsqueeze(1) * 0.8
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = RISLoss()(model(images, 1), labels, torch.tensor([2])).dense
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
