"""Each metric against hand-computed values and against one mask after the other."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fastris.errors import InputError
from fastris.metrics import (
    THRESHOLDS,
    InstanceMetrics,
    absolute_difference_in_count,
    average_precision,
    best_dice,
    difference_in_count,
    foreground_background_dice,
    mean_average_precision,
    overlap,
    symmetric_best_dice,
)

# Two targets of 4 pixels; one prediction covers the first and 2 pixels more, one shares 1 pixel with the
# second, one hits nothing.
TARGET = np.array([[1, 1, 0, 2, 2], [1, 1, 0, 2, 2], [0, 0, 0, 0, 0]], np.int32)
PRED = np.array([[7, 7, 7, 0, 3], [7, 7, 7, 0, 0], [5, 0, 0, 0, 0]], np.int32)


def masks_of(labels: np.ndarray) -> list[np.ndarray]:
    return [labels == label for label in np.unique(labels) if label != 0]


def brute_best_dice(a: np.ndarray, b: np.ndarray) -> float:
    ours, theirs = masks_of(a), masks_of(b)
    if not ours or not theirs:
        return 1.0 if not ours and not theirs else 0.0
    return sum(max(2 * (m & t).sum() / (m.sum() + t.sum()) for t in theirs) for m in ours) / len(ours)


def brute_average_precision(pred: np.ndarray, target: np.ndarray, threshold: float) -> float:
    ours, theirs = masks_of(pred), masks_of(target)
    if not ours and not theirs:
        return 1.0
    used: set[int] = set()
    for mask in ours:
        for index, other in enumerate(theirs):
            if index not in used and (mask & other).sum() / (mask | other).sum() > threshold:
                used.add(index)
                break
    hits = len(used)
    return hits / (hits + (len(ours) - hits) + (len(theirs) - hits))


label_pairs = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9).flatmap(
    lambda shape: st.tuples(*[arrays(np.int32, shape, elements=st.integers(0, 5)) for _ in range(2)])
)


class TestByHand:
    def test_best_dice_is_the_mean_of_the_best(self):
        assert best_dice(PRED, TARGET) == pytest.approx((2 * 4 / 10 + 2 * 1 / 5 + 0) / 3)
        assert best_dice(TARGET, PRED) == pytest.approx((2 * 4 / 10 + 2 * 1 / 5) / 2)

    def test_symmetric_best_dice_is_the_smaller(self):
        assert symmetric_best_dice(PRED, TARGET) == pytest.approx((0.8 + 0.4) / 3)

    def test_counts(self):
        assert difference_in_count(PRED, TARGET) == 1
        assert difference_in_count(TARGET, PRED) == -1
        assert absolute_difference_in_count(TARGET, PRED) == 1

    def test_average_precision(self):
        # IoU 4/6 passes 0.5, 0.55, 0.6, 0.65; 1/4 passes none: 1 TP, 2 FP, 1 FN, then 0 TP.
        expected = [1 / 4] * 4 + [0] * 6
        assert average_precision(PRED, TARGET) == pytest.approx(expected)
        assert mean_average_precision(PRED, TARGET) == pytest.approx(0.1)

    def test_an_overlap_of_exactly_the_threshold_is_a_miss(self):
        target, pred = np.array([[1, 1]]), np.array([[1, 0]])
        assert average_precision(pred, target, [0.5]) == pytest.approx([0])

    def test_foreground_background_dice(self):
        assert foreground_background_dice(PRED, TARGET) == pytest.approx(2 * 5 / (8 + 8))


@pytest.mark.parametrize("metric", [symmetric_best_dice, best_dice, mean_average_precision, foreground_background_dice])
class TestEmpty:
    def test_nothing_found_where_nothing_is(self, metric):
        assert metric(np.zeros((4, 5), np.int32), np.zeros((4, 5), np.int32)) == 1

    def test_no_pixels_at_all(self, metric):
        assert metric(np.zeros((0, 5), np.int32), np.zeros((0, 5), np.int32)) == 1

    def test_only_one_is_empty(self, metric):
        assert metric(np.zeros_like(TARGET), TARGET) == 0
        assert metric(TARGET, np.zeros_like(TARGET)) == 0

    def test_perfect(self, metric):
        assert metric(TARGET, TARGET) == 1


class TestAgainstBruteForce:
    @settings(deadline=None, max_examples=200)
    @given(label_pairs)
    def test_small_maps(self, pair):
        pred, target = pair
        assert best_dice(pred, target) == pytest.approx(brute_best_dice(pred, target))
        assert symmetric_best_dice(pred, target) == pytest.approx(
            min(brute_best_dice(pred, target), brute_best_dice(target, pred))
        )
        assert difference_in_count(pred, target) == len(masks_of(pred)) - len(masks_of(target))
        assert average_precision(pred, target) == pytest.approx(
            [brute_average_precision(pred, target, threshold) for threshold in THRESHOLDS]
        )
        total = (pred > 0).sum() + (target > 0).sum()
        both = ((pred > 0) & (target > 0)).sum()
        assert foreground_background_dice(pred, target) == pytest.approx(2 * both / total if total else 1)

    @settings(deadline=None, max_examples=50)
    @given(label_pairs, st.permutations(range(1, 6)))
    def test_names_of_instances_do_not_matter(self, pair, order):
        pred, target = pair
        renamed = np.array([0, *(1000 * label for label in order)])[pred]
        assert symmetric_best_dice(renamed, target) == pytest.approx(symmetric_best_dice(pred, target))
        assert average_precision(renamed, target).tolist() == average_precision(pred, target).tolist()

    def test_near_misses_of_real_shapes(self):
        random = np.random.default_rng(0)
        target = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((8, 8), int))
        target[random.random(target.shape) < 0.1] = 0
        pred = np.roll(target, (1, 1), (0, 1))
        pred[pred % 7 == 0] = 0
        assert average_precision(pred, target) == pytest.approx(
            [brute_average_precision(pred, target, threshold) for threshold in THRESHOLDS]
        )
        assert best_dice(pred, target) == pytest.approx(brute_best_dice(pred, target))


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_torch_is_numpy(self, dtype):
        pred, target = torch.from_numpy(PRED).to(dtype), torch.from_numpy(TARGET).to(dtype)
        assert symmetric_best_dice(pred, target) == symmetric_best_dice(PRED, TARGET)

    def test_non_contiguous(self):
        assert symmetric_best_dice(PRED.T, TARGET.T) == symmetric_best_dice(PRED, TARGET)

    def test_ids_far_apart(self):
        far = np.where(PRED == 7, 2**40, PRED.astype(np.int64))
        assert symmetric_best_dice(far, TARGET) == symmetric_best_dice(PRED, TARGET)
        everywhere = np.full((2, 2), 2**40)
        assert overlap(everywhere, everywhere).intersection.tolist() == [[4]]

    @pytest.mark.parametrize(
        ("pred", "target", "message"),
        [
            (PRED, TARGET[:2], "same shape"),
            (PRED.astype(float), TARGET, "pred must be an integer"),
            (PRED, TARGET[None], "target must be an integer"),
            (-PRED, TARGET, "negative"),
        ],
    )
    def test_unusable_maps_are_named(self, pred, target, message):
        with pytest.raises(InputError, match=message):
            symmetric_best_dice(pred, target)

    @pytest.mark.parametrize("threshold", [0.3, 1.0])
    def test_thresholds_where_matches_are_not_unique(self, threshold):
        with pytest.raises(InputError, match="thresholds"):
            average_precision(PRED, TARGET, [threshold])


class TestInstanceMetrics:
    def test_means_over_images_and_rows(self):
        metrics = InstanceMetrics()
        metrics.update(PRED, TARGET, name="plant")
        metrics.update(np.zeros_like(TARGET), TARGET)
        result = metrics.compute()
        assert result["images"] == 2
        assert result["sbd"] == pytest.approx(0.4 / 2)
        assert result["dic"] == pytest.approx((1 + 2) / 2)  # |1| and |-2|
        assert result["map"] == pytest.approx(0.05)
        assert result["ap50"] == pytest.approx(0.125)
        assert result["fbd"] == pytest.approx(0.625 / 2)
        assert [row["name"] for row in metrics.rows] == ["plant", "1"]
        assert [row["dic"] for row in metrics.rows] == [1, -2]
        assert [(row["count"], row["target_count"]) for row in metrics.rows] == [(3, 2), (0, 2)]
        json.dumps([result, metrics.rows])

    def test_reset_and_no_images(self):
        metrics = InstanceMetrics()
        metrics.update(PRED, TARGET)
        metrics.reset()
        assert metrics.rows == []
        result = metrics.compute()
        assert result["images"] == 0
        assert math.isnan(result["sbd"])

    def test_hundreds_of_instances_in_a_second(self):
        target = np.kron(np.arange(1, 401).reshape(20, 20), np.ones((50, 50), np.int64))
        pred = np.roll(target, 5, 0)
        start = time.perf_counter()
        row = InstanceMetrics().update(pred, target)
        assert time.perf_counter() - start < 1  # 1000 x 1000 pixels, 400 instances: 0.05 s; masks would take 100
        assert row["count"] == row["target_count"] == 400
