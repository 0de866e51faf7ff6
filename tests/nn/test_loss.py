"""The matching loss against exhaustive search over all matchings, and its gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastris import RISLoss, soft_iou, use_backend
from fastris.nn import RISOutput, loss, match
from fastris.nn.loss import place_on_target


def make_output(batch, steps, size=6, dtype=torch.float64):
    place = torch.randn(batch, steps, size, size, dtype=dtype)
    return RISOutput(
        mask_logits=torch.randn(batch, steps, size, size, dtype=dtype, requires_grad=True),
        score_logits=torch.randn(batch, steps, dtype=dtype, requires_grad=True),
        log_place=place.flatten(2).log_softmax(2).view_as(place).requires_grad_(),
        stride=1,
        place_stride=1,
    )


def moved(output, device):
    tensors = (tensor.detach().to(device).requires_grad_() for tensor in output[:3])
    return RISOutput(*tensors, stride=output.stride, place_stride=output.place_stride)


def labels_of(batch, size=6):
    """Images with 0, 1, 2, 3 … instances, a row of pixels each."""
    labels = torch.zeros(batch, size, size, dtype=torch.int64)
    for b in range(batch):
        for k in range(1, b + 1):
            labels[b, k - 1, : k + 2] = k
    return labels, torch.arange(batch)


def brute_force(output, labels, counts, variant):
    """Equation 6 by trying every one-to-one δ."""
    totals = []
    for b in range(labels.shape[0]):
        n, steps = int(counts[b]), output.score_logits.shape[1]
        usable = min(n, steps) if variant == "first_n" else steps
        masks = torch.stack([labels[b] == k for k in range(1, n + 1)]).double() if n else torch.zeros(0, 6, 6).double()
        iou = soft_iou(output.mask_logits[b : b + 1].sigmoid(), masks.unsqueeze(0))[0]
        pairs = min(usable, n)
        best = 0.0
        if pairs:
            best = max(
                sum(iou[r, c].item() for r, c in zip(rows, columns, strict=True))
                for rows in itertools.combinations(range(usable), pairs)
                for columns in itertools.permutations(range(n), pairs)
            )
        scores = output.score_logits[b].sigmoid().tolist()
        bce = sum(-math.log(s) if t < n else -math.log(1 - s) for t, s in enumerate(scores))
        totals.append(-best + bce)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("variant", ["all", "first_n"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_is_the_minimum_over_all_matchings(variant, steps):
    output, (labels, counts) = make_output(4, steps), labels_of(4)
    loss = RISLoss(variant)(output, labels, counts)
    assert loss.total.item() == pytest.approx(brute_force(output, labels, counts, variant), rel=1e-9)


def test_first_n_leaves_later_masks_without_gradient_and_all_does_not():
    output, (labels, counts) = make_output(2, 4), labels_of(2)
    with torch.no_grad():  # the last step finds the only instance of image 1 exactly
        output.mask_logits[1, 3] = torch.where(labels[1] == 1, 20.0, -20.0) + 0.1
        output.mask_logits[1, :3] = -3.0
    RISLoss("first_n")(output, labels, counts).mask.backward()
    assert output.mask_logits.grad[1, 0].abs().sum() > 0 and output.mask_logits.grad[1, 1:].abs().sum() == 0
    assert match(output.mask_logits.sigmoid(), labels, None, counts).target_of_pred[1].tolist() == [
        -1,
        -1,
        -1,
        0,
    ]


@pytest.mark.parametrize("variant", ["all", "first_n"])
@pytest.mark.parametrize("place_weight", [0.0, 0.5])
def test_gradients_through_the_whole_loss_in_fp64(variant, place_weight):
    output, (labels, counts) = make_output(3, 3), labels_of(3)
    criterion = RISLoss(variant, place_weight=place_weight)

    def total(*tensors):
        return criterion(RISOutput(*tensors, stride=1, place_stride=1), labels, counts).total

    assert torch.autograd.gradcheck(total, (output.mask_logits, output.score_logits, output.log_place))


def test_masks_at_a_stride_are_compared_at_full_resolution():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, :4] = 1
    output = make_output(1, 1, size=4)._replace(
        mask_logits=torch.where(torch.arange(4) < 2, 30.0, -30.0).double().expand(1, 1, 4, 4), stride=2
    )
    assert RISLoss()(output, labels, torch.tensor([1])).mask.item() == pytest.approx(-1.0, abs=0.07)


def test_maps_that_begin_outside_the_image_are_compared_at_their_place():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[:, :, 3:7] = 1  # cell 1 of the columns, in a map of stride 4 that begins one pixel left of the image
    inside = torch.tensor([False, True, False])
    output = make_output(1, 1, size=3)._replace(
        mask_logits=torch.where(inside, 30.0, -30.0).double().expand(1, 1, 3, 3),
        log_place=torch.where(inside, -math.log(3), -99.0).double().expand(1, 1, 3, 3),
        stride=4,
        place_stride=4,
        offset=1,
    )
    terms = RISLoss(place_weight=1.0)(output, labels, torch.tensor([1]))
    assert terms.mask.item() == pytest.approx(-1.0, abs=0.07)
    assert terms.place.item() == pytest.approx(0.0, abs=1e-4)


def test_at_the_resolution_of_the_map_a_target_is_read_at_the_centres_of_cells():
    labels = torch.zeros(1, 9, 10, dtype=torch.int64)
    labels[0, 2, 7] = 1  # the centre of cell (0, 1) of a map of stride 5
    labels[0, 3:, :2] = 2  # of no centre
    inside = torch.tensor([[False, True], [False, False]])
    output = make_output(1, 2, size=2)._replace(
        mask_logits=torch.where(inside, 30.0, -30.0).double().expand(1, 2, 2, 2), stride=5, place_stride=5
    )
    loss = RISLoss(resolution="map")
    assert loss(output, labels, torch.tensor([2])).mask.item() == pytest.approx(-1.0)
    masks = torch.stack([labels == 1, labels == 2], dim=1).double()
    assert loss(output, masks, torch.tensor([2])).mask.item() == pytest.approx(-1.0)
    assert RISLoss()(output, labels, torch.tensor([2])).mask.item() > -0.2
    moved = output._replace(offset=2)  # now row 0, column 5 is the centre
    assert loss(moved, labels, torch.tensor([2])).mask.item() == pytest.approx(0.0, abs=1e-9)
    assert loss(moved, labels.roll((-2, -2), (1, 2)), torch.tensor([2])).mask.item() == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="resolution must be 'image' or 'map', got 'pixel'"):
        RISLoss(resolution="pixel")


def test_place_mass_counts_every_cell_that_an_instance_touches():
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 0, 0], labels[0, 3, 1] = 1, 2
    log_place = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().view(1, 1, 2, 2)
    torch.testing.assert_close(
        place_on_target(log_place, labels, 2)[0, 0], torch.tensor([0.1, 0.3], dtype=torch.float64)
    )


def with_void(labels):
    """The last two columns and all of the last image void, over instances and background alike."""
    labels = labels.clone()
    labels[:, :, 4:] = labels[-1] = -1
    return labels, torch.stack([torch.tensor(len(one[one > 0].unique())) for one in labels])


@pytest.mark.parametrize("resolution", ["image", "map"])
@pytest.mark.parametrize("variant", ["all", "first_n"])
def test_void_pixels_neither_reward_nor_punish(variant, resolution):
    """The loss is that of the image without them, whatever is predicted there, and its gradient there is 0."""
    output, (labels, counts) = make_output(4, 3), with_void(labels_of(4)[0])
    criterion = RISLoss(variant, place_weight=0.5, resolution=resolution)
    loss = criterion(output, labels, counts)
    gradients = torch.autograd.grad(loss.total, (output.mask_logits, output.log_place))
    for gradient in gradients:
        assert (gradient[:, :, :, 4:] == 0).all() and (gradient[-1] == 0).all()
        assert gradient[1:-1, :, :, :4].abs().sum() > 0
    narrow = output._replace(
        mask_logits=output.mask_logits[..., :4],
        log_place=output.log_place[..., :4].flatten(2).log_softmax(2).view(4, 3, 6, 4),
    )
    torch.testing.assert_close(criterion(narrow, labels[:, :, :4], counts), loss)


def test_void_in_the_choice_of_a_place_has_no_gradient_through_the_softmax_either():
    logits = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    labels, _ = with_void(labels_of(3)[0])
    log_place = logits.flatten(2).log_softmax(2).view_as(logits)
    place_on_target(log_place, labels[1:2], 1).log().sum().backward()
    assert logits.grad[..., :4].abs().min() > 1e-4 and logits.grad[..., 4:].abs().max() < 1e-15


def test_a_place_far_out_in_void_has_a_finite_loss():
    logits = torch.zeros(1, 1, 6, 6)
    logits[..., 5] = 300.0
    logits.requires_grad_()
    labels, counts = with_void(labels_of(3)[0])
    place = logits.flatten(2).log_softmax(2).view_as(logits)
    output = RISOutput(logits, logits[:, :, 0, 0], place, stride=1, place_stride=1)
    loss = RISLoss(place_weight=1.0)(output, labels[1:2], counts[1:2])
    loss.total.backward()
    assert loss.place.item() == pytest.approx(math.log(24 / 3), rel=1e-5)  # 3 of 24 cells, all alike
    assert logits.grad.isfinite().all()


def test_match_leaves_void_out_of_the_overlap():
    pred = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]]]], requires_grad=True)
    matches = match(pred, torch.tensor([[[1, 0, -1, -1]]]), num_labels=1)
    assert matches.iou.item() == 0.5
    matches.iou.sum().backward()
    assert pred.grad[0, 0, 0].tolist() == [0.5, -0.25, 0, 0]


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 0, 6, 6)], ids=["labels", "masks"])
def test_no_instance_in_the_whole_batch(shape):
    output = make_output(2, 2)
    loss = RISLoss(place_weight=1.0)(output, torch.zeros(shape, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    loss.total.backward()
    assert loss.mask.item() == 0 and torch.isfinite(output.score_logits.grad).all()


@pytest.mark.parametrize("variant", ["all", "first_n"])
@pytest.mark.parametrize("place_weight", [0.0, 0.5])
def test_masks_and_a_label_map_give_the_same(variant, place_weight):
    output, (labels, counts) = make_output(3, 4), labels_of(3)
    masks = torch.stack([labels == k for k in (1, 2)], 1)
    criterion = RISLoss(variant, place_weight=place_weight)
    torch.testing.assert_close(criterion(output, masks, counts), criterion(output, labels, counts))


def values_and_gradients(criterion, output, *arguments):
    terms = criterion(output, *arguments)
    leaves = output.mask_logits, output.score_logits, output.log_place
    return terms, torch.autograd.grad(terms.total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("variant", "place_weight"), [("all", 0.5), ("first_n", 0.0)])
def test_the_loss_and_its_gradient_are_one_graph(variant, place_weight, backend):
    output, (labels, counts) = make_output(4, 3), labels_of(4)
    criterion = RISLoss(variant, place_weight=place_weight, per_instance=variant == "all")
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    for target in (labels, torch.stack([labels == k for k in (1, 2, 3)], 1)):
        found = values_and_gradients(compiled, output, target, counts, 3)
        torch.testing.assert_close(found, values_and_gradients(criterion, output, target, counts, 3))


@pytest.mark.parametrize("first_n", [False, True])
def test_match_and_its_gradient_are_one_graph(first_n):
    pred, (labels, counts) = torch.rand(4, 5, 6, 6, requires_grad=True), labels_of(4)
    num_pred = counts.clamp_max(5) if first_n else None
    found = torch.compile(match, fullgraph=True, backend="aot_eager")(pred, labels, num_pred, counts, 3)
    expected = match(pred, labels, num_pred, counts, 3)
    assert torch.equal(found.target_of_pred, expected.target_of_pred)
    torch.testing.assert_close(found.iou, expected.iou)
    grads = [torch.autograd.grad(matches.iou.square().sum(), pred)[0] for matches in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("variant", ["all", "first_n"])
def test_nothing_is_read_back(variant):
    """On tensors without data, whatever needs a value (.item, .cpu, nonzero, a boolean index) raises."""
    output = moved(make_output(4, 3), "meta")
    labels, counts = (tensor.to("meta") for tensor in labels_of(4))
    criterion = RISLoss(variant, place_weight=0.5)
    criterion(output, labels, counts, 3).total.backward()
    criterion(output, labels.unsqueeze(1) > 0, counts).total.backward()
    with pytest.raises(RuntimeError, match="meta"):  # the documented exception, and the proof that reading raises
        criterion(output, labels, counts)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["all", "first_n"])
def test_no_sync_on_cuda(variant, no_sync):
    output, (labels, counts) = make_output(4, 3), labels_of(4)
    criterion = RISLoss(variant, place_weight=0.5)
    expected = values_and_gradients(criterion, output, labels, counts, 3)
    output, labels, counts = moved(output, "cuda"), labels.cuda(), counts.cuda()
    values_and_gradients(criterion, output, labels, counts, 3)
    with no_sync():
        found = values_and_gradients(criterion, output, labels, counts, 3)
    torch.testing.assert_close(found, expected, check_device=False)


@pytest.mark.parametrize("counts", [torch.ones(3).long(), torch.ones(2), torch.ones(2).long().to("meta")])
def test_wrong_counts_are_named(counts):
    with pytest.raises(ValueError, match="RISLoss: counts must be integer"):
        RISLoss()(make_output(2, 2), labels_of(2)[0], counts)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant"):
        RISLoss("some")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(3, 20, 24, dtype=torch.long),  # of another batch
        torch.zeros(1, 20, 24, dtype=torch.long),
        torch.zeros(2, 20, 25, dtype=torch.long),  # larger than the maps
        torch.zeros(2, 3, 21, 24),
        torch.zeros(20, 24, dtype=torch.long),
    ],
)
def test_a_target_that_does_not_fit_is_named(target, backend):
    output = RISOutput(torch.zeros(2, 4, 5, 6), torch.zeros(2, 4), torch.zeros(2, 4, 5, 6), 4, 4)
    message = "RISLoss: target must be of 2 images of at most 20×24 pixels on cpu like output, got "
    with use_backend(backend):
        for resolution in ("image", "map") if target.shape[-2:] == (20, 24) else ("image",):
            with pytest.raises(ValueError, match=message):
                RISLoss(resolution=resolution)(output, target, torch.tensor([1, 2]))


def test_predictions_are_copied_only_where_there_is_void(monkeypatch):
    pred, labels, seen = torch.rand(2, 3, 6, 7), torch.randint(0, 3, (2, 6, 7)), []

    def spy(*args):
        seen.append(args[0])
        return soft_iou(*args)

    monkeypatch.setattr(loss, "soft_iou", spy)
    match(pred, labels, num_labels=2)
    labels[1, 2, 3] = -1
    match(pred, labels, num_labels=2)
    assert seen[0] is pred and seen[1] is not pred and not seen[1][1, :, 2, 3].any()
