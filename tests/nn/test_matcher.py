"""The matchers against plain twins of DETR's, RT-DETR's and Mask2Former's equations, index for index."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import fastris
from fastris.nn import QueryMatches

NAN, INF = float("nan"), float("inf")


# The twins: every query of the batch against every target of the batch, SciPy image by image


def xyxy(boxes):
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], -1)


def giou(a, b):
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    inner = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0)
    inter = inner[:, :, 0] * inner[:, :, 1]
    union = area_a[:, None] + area_b - inter
    outer = (torch.max(a[:, None, 2:], b[:, 2:]) - torch.min(a[:, None, :2], b[:, :2])).clamp(min=0)
    hull = outer[:, :, 0] * outer[:, :, 1]
    return inter / union - (hull - union) / hull


def box_twin(outputs, targets, weights, focal=False, alpha=0.25, gamma=2.0):
    batch, queries = outputs["pred_logits"].shape[:2]
    labels = torch.cat([target["labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets])
    logits, pred = outputs["pred_logits"].flatten(0, 1), outputs["pred_boxes"].flatten(0, 1)
    if focal:
        p = logits.sigmoid()[:, labels]
        by_class = alpha * (1 - p) ** gamma * -(p + 1e-8).log() - (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    else:
        by_class = -logits.softmax(-1)[:, labels]
    cost = weights[1] * torch.cdist(pred, boxes, p=1) + weights[0] * by_class
    cost = (cost + weights[2] * -giou(xyxy(pred), xyxy(boxes))).view(batch, queries, -1)
    sizes = [len(target["labels"]) for target in targets]
    return [linear_sum_assignment(part[b]) for b, part in enumerate(cost.split(sizes, -1))]


def point_sample(masks, points):
    grid = (2.0 * points - 1.0).repeat(masks.shape[0], 1, 1).unsqueeze(2)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0, :, 0]


def mask_twin(outputs, targets, weights, num_points):
    pairs = []
    for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
        points = torch.rand(1, num_points, 2)
        if not len(target["labels"]) or not len(logits):
            pairs.append(([], []))
            continue
        by_class = -logits.softmax(-1)[:, target["labels"]]
        y = point_sample(target["masks"].to(masks), points)
        x = point_sample(masks, points)
        is_on = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
        is_off = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
        by_mask = (torch.einsum("nc,mc->nm", is_on, y) + torch.einsum("nc,mc->nm", is_off, 1 - y)) / num_points
        p = x.sigmoid()
        dice = 1 - (2 * torch.einsum("nc,mc->nm", p, y) + 1) / (p.sum(-1)[:, None] + y.sum(-1)[None] + 1)
        pairs.append(linear_sum_assignment(weights[1] * by_mask + weights[0] * by_class + weights[2] * dice))
    return pairs


def as_lists(pairs):
    return [([int(i) for i in rows], [int(j) for j in cols]) for rows, cols in pairs]


# Problems


def random_boxes(*shape):
    return torch.cat([torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.5 + 0.01], -1)


def box_problem(queries, lengths, classes=4):
    outputs = {
        "pred_logits": 3 * torch.randn(len(lengths), queries, classes),
        "pred_boxes": random_boxes(len(lengths), queries),
    }
    return outputs, [{"labels": torch.randint(classes, (n,)), "boxes": random_boxes(n)} for n in lengths]


def mask_problem(queries, lengths, classes=4):
    outputs = {
        "pred_logits": 3 * torch.randn(len(lengths), queries, classes),
        "pred_masks": 4 * torch.randn(len(lengths), queries, 6, 7),
    }
    targets = [{"labels": torch.randint(classes, (n,)), "masks": torch.rand(n, 13, 12 + n) > 0.6} for n in lengths]
    return outputs, targets


def box_matcher(**options):
    return fastris.HungarianMatcher(1, 5, 2, **options)


def mask_matcher(**options):
    return fastris.MaskHungarianMatcher(2, 5, 5, num_points=50, **options)


BOTH = pytest.mark.parametrize(
    ("matcher", "problem", "key"),
    [(box_matcher, box_problem, "boxes"), (mask_matcher, mask_problem, "masks")],
    ids=["boxes", "masks"],
)

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)
weights = st.sampled_from([(1, 1, 1), (1, 5, 2), (2.0, 5.0, 2.0), (0, 1, 0), (1, 0, 0), (0.5, 0, 3)])
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 12), lengths, weights, seeds, st.booleans())
def test_indices_of_detr_and_rt_detr(queries, lengths, weights, seed, focal):
    torch.manual_seed(seed)
    outputs, targets = box_problem(queries, lengths)
    found = fastris.HungarianMatcher(*weights, use_focal_loss=focal)(outputs, targets)
    assert as_lists(found) == as_lists(box_twin(outputs, targets, weights, focal))


@pytest.mark.parametrize("queries", [100, 300])
@pytest.mark.parametrize("focal", [False, True])
def test_indices_at_the_models_own_sizes(queries, focal):
    outputs, targets = box_problem(queries, [63, 0, 7, 20], classes=91)
    found = fastris.HungarianMatcher(2, 5, 2, use_focal_loss=focal, alpha=0.3, gamma=1.5)(outputs, targets)
    assert as_lists(found) == as_lists(box_twin(outputs, targets, (2, 5, 2), focal, 0.3, 1.5))


def test_equal_queries_and_equal_targets_are_told_apart_as_detr_does():
    outputs, targets = box_problem(8, [5, 3])
    outputs = {key: value[:, torch.tensor([0, 1, 0, 1, 2, 2, 0, 3])] for key, value in outputs.items()}
    targets = [{key: value[[0, 1, 0, 1, 0][: len(value)]] for key, value in target.items()} for target in targets]
    assert as_lists(box_matcher()(outputs, targets)) == as_lists(box_twin(outputs, targets, (1, 5, 2)))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), lengths, weights, seeds, st.sampled_from([1, 7, 112]))
def test_indices_of_mask2former_with_the_same_seed(queries, lengths, weights, seed, num_points):
    torch.manual_seed(seed)
    outputs, targets = mask_problem(queries, lengths)
    torch.manual_seed(seed)
    found = fastris.MaskHungarianMatcher(*weights, num_points=num_points)(outputs, targets)
    after = torch.rand(1)
    torch.manual_seed(seed)
    assert as_lists(found) == as_lists(mask_twin(outputs, targets, weights, num_points))
    assert torch.equal(after, torch.rand(1))


def test_masks_that_no_point_hits_are_told_apart_as_mask2former_does():
    outputs, targets = mask_problem(20, [6, 4])
    for target in targets:
        target["masks"][1:] = False
        target["labels"][:] = 1
    torch.manual_seed(5)
    found = mask_matcher()(outputs, targets)
    torch.manual_seed(5)
    assert as_lists(found) == as_lists(mask_twin(outputs, targets, (2, 5, 5), 50))


@BOTH
def test_the_list_is_int64_on_the_cpu_with_queries_ascending(matcher, problem, key):
    for queries, target in matcher()(*problem(6, [4, 9, 0])):
        assert queries.dtype == target.dtype == torch.int64
        assert queries.device.type == target.device.type == "cpu"
        assert queries.tolist() == sorted(queries.tolist())


@BOTH
@pytest.mark.parametrize("lengths", [[3, 2], [0, 4], [0, 0], [9, 1], []])
@pytest.mark.parametrize("queries", [6, 0])
def test_the_forms_agree_whatever_is_empty(matcher, problem, key, lengths, queries):
    outputs, targets = problem(queries, lengths)
    torch.manual_seed(1)
    listed = matcher()(outputs, targets)
    torch.manual_seed(1)
    batched = matcher(batched=True)(outputs, targets)
    assert isinstance(batched, QueryMatches)
    assert batched.target_of_query.shape == (len(lengths), queries) and batched.target_of_query.dtype == torch.int64
    assert batched.status.tolist() == [0] * len(lengths)
    assert as_lists(batched.pairs()) == as_lists(listed)
    assert [len(rows) for rows, _ in listed] == [min(queries, n) for n in lengths]


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["pred_logits", "pred", "target", "everything"])
def test_nothing_that_is_not_finite_raises(matcher, problem, key, bad, where):
    outputs, targets = problem(5, [3, 7, 2])
    if where in ("pred_logits", "everything"):
        outputs["pred_logits"][0, 1] = bad
    if where in ("pred", "everything"):
        outputs[f"pred_{key}"][0, 2] = bad
    if where in ("target", "everything"):
        targets[0][key] = targets[0][key].float()
        targets[0][key][1] = bad
    if where == "everything":
        outputs = {name: torch.full_like(value, bad) for name, value in outputs.items()}
    for (queries, target), n in zip(matcher()(outputs, targets), [3, 7, 2], strict=True):
        assert len(queries) == len(target) <= min(5, n)
        assert len(set(target.tolist())) == len(target)


@BOTH
def test_a_nan_query_is_left_over_and_the_status_says_so(matcher, problem, key):
    outputs, targets = problem(5, [3, 3])
    outputs["pred_logits"][1, 2] = NAN
    matches = matcher(batched=True)(outputs, targets)
    assert matches.target_of_query[1, 2] == -1 and matches.status.tolist() == [0, fastris.ops.assignment.INVALID]
    assert [len(rows) for rows, _ in matches.pairs()] == [3, 3]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_costs_of_other_dtypes_are_computed_in_at_least_fp32(matcher, problem, key, dtype):
    outputs, targets = problem(7, [4, 2])
    outputs = {name: value.to(dtype) for name, value in outputs.items()}
    wide = {name: value.float() if dtype.itemsize == 2 else value for name, value in outputs.items()}
    torch.manual_seed(2)
    found = matcher()(outputs, targets)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_lists(matcher()(wide, targets)) == as_lists(found)


@BOTH
def test_other_integer_labels_and_mask_dtypes(matcher, problem, key):
    outputs, targets = problem(7, [4, 2])
    torch.manual_seed(2)
    expected = as_lists(matcher()(outputs, targets))
    for target in targets:
        target["labels"] = target["labels"].to(torch.uint8)
        target[key] = target[key].double()
    torch.manual_seed(2)
    assert as_lists(matcher()(outputs, targets)) == expected


@BOTH
def test_a_batch_matches_each_image_as_if_alone(matcher, problem, key):
    outputs, targets = problem(7, [4, 9, 2])
    torch.manual_seed(3)
    together = as_lists(matcher()(outputs, targets))
    torch.manual_seed(3)
    alone = [matcher()({k: v[b : b + 1] for k, v in outputs.items()}, targets[b : b + 1])[0] for b in range(3)]
    assert as_lists(alone) == together


@BOTH
@pytest.mark.parametrize("lengths", [[3, 5], [0, 0]])
def test_the_batched_form_is_one_graph(matcher, problem, key, lengths):
    outputs, targets = problem(6, lengths)
    eager = matcher(batched=True)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = eager(outputs, targets)
    torch.manual_seed(4)
    found = compiled(outputs, targets)
    assert torch.equal(found.target_of_query, expected.target_of_query) and torch.equal(found.status, expected.status)
    longer_outputs, longer_targets = problem(6, [n + 1 for n in lengths])
    assert len(compiled(longer_outputs, longer_targets).pairs()[0][0]) == lengths[0] + 1


@BOTH
def test_the_batched_form_reads_nothing_back(matcher, problem, key, monkeypatch):
    """On tensors without data, whatever needs a value (.item, .cpu, nonzero, a boolean index) raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # refuses the meta device
    outputs, targets = problem(6, [3, 0, 5])
    outputs = {name: value.to("meta") for name, value in outputs.items()}
    targets = [{name: value.to("meta") for name, value in target.items()} for target in targets]
    assert matcher(batched=True)(outputs, targets).target_of_query.shape == (3, 6)
    with pytest.raises(NotImplementedError, match="no data"):
        matcher()(outputs, targets)


@pytest.mark.gpu
@BOTH
def test_no_sync_on_cuda(matcher, problem, key, no_sync):
    outputs, targets = problem(20, [3, 0, 25])
    if key == "boxes":
        expected = as_lists(matcher()(outputs, targets))
    outputs = {name: value.cuda() for name, value in outputs.items()}
    targets = [{name: value.cuda() for name, value in target.items()} for target in targets]
    batched = matcher(batched=True)
    batched(outputs, targets)
    with no_sync():
        matches = batched(outputs, targets)
    if key == "boxes":
        assert as_lists(matches.pairs()) == expected


@pytest.mark.parametrize("make", [fastris.HungarianMatcher, fastris.MaskHungarianMatcher])
def test_all_weights_zero_is_an_assertion_error_as_in_the_originals(make):
    with pytest.raises(AssertionError, match="all costs cant be 0"):
        make(0, 0, 0)


def test_no_points_is_named():
    with pytest.raises(ValueError, match="num_points"):
        fastris.MaskHungarianMatcher(num_points=0)


@BOTH
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda o, t, key: o.pop("pred_logits"), r"outputs\['pred_logits'\] must be a tensor.*NoneType"),
        (lambda o, t, key: o.update(pred_logits=o["pred_logits"][0]), r"outputs\['pred_logits'\] must be floating"),
        (lambda o, t, key: o.update({f"pred_{key}": o[f"pred_{key}"][:, 1:]}), r"outputs\['pred_.*B and Q"),
        (lambda o, t, key: o.update({f"pred_{key}": o[f"pred_{key}"].to("meta")}), r"outputs\['pred_.*device"),
        (lambda o, t, key: t.pop(), "targets must have one entry per image, 2, got 1"),
        (lambda o, t, key: t[1].pop("labels"), r"targets\[1\]\['labels'\] must be a tensor"),
        (lambda o, t, key: t[1].update(labels=t[1]["labels"] > 1), r"targets\[1\]\['labels'\] must be integer \(n,\)"),
        (
            lambda o, t, key: t[1].update({key: t[1][key][1:]}),
            r"targets\[1\]\['(boxes|masks)'\] must be .* n of labels",
        ),
        (lambda o, t, key: t[0].update({key: t[0][key][0]}), r"targets\[0\]\['(boxes|masks)'\] must be \(n,"),
        (lambda o, t, key: t[1].update(labels=t[1]["labels"].to("meta")), r"targets\[1\]\['labels'\] .* device .*meta"),
        (lambda o, t, key: t[0].update({key: t[0][key].to("meta")}), r"targets\[0\]\['(boxes|masks)'\] .* device"),
    ],
)
def test_wrong_arguments_are_named(matcher, problem, key, break_it, message):
    outputs, targets = problem(5, [2, 3])
    break_it(outputs, targets, key)
    with pytest.raises(ValueError, match=message):
        matcher()(outputs, targets)


def test_boxes_need_four_numbers():
    outputs, targets = box_problem(5, [2])
    targets[0]["boxes"] = targets[0]["boxes"][:, :3]
    with pytest.raises(ValueError, match=r"targets\[0\]\['boxes'\] must be \(n,4\)"):
        box_matcher()(outputs, targets)


@pytest.mark.parametrize("lengths", [[3, 0], [0, 0]])
def test_the_documented_swaps_run(lengths):
    text = (Path(__file__).parents[2] / "docs" / "matchers.md").read_text()
    outputs, targets = box_problem(6, lengths)
    outputs["pred_masks"] = torch.randn(2, 6, 4, 4)
    targets = [{**target, "masks": torch.ones(len(target["labels"]), 8, 8)} for target in targets]
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 4
    for block in blocks:
        names = {"criterion": SimpleNamespace(), "outputs": outputs, "targets": targets}
        exec(block, names)
        if "indices" in names:
            assert [len(rows) for rows, _ in names["indices"]] == lengths
        else:
            assert (names["classes"] != names["no_object"]).sum() <= sum(lengths) and names["loss"].isfinite()


def test_repr_shows_the_options():
    assert "cost_bbox=5, cost_giou=2, batched=True" in repr(box_matcher(batched=True))
    assert "alpha=0.25, gamma=2.0" in repr(box_matcher(use_focal_loss=True))
    assert "cost_dice=5, num_points=50" in repr(mask_matcher())
