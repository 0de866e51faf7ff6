"""Each metric against hand-computed values and against one mask after the other."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fastris import Instances
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
from fastris.metrics.coco import KEYS as COCO_KEYS

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

    def test_scikit_image_counts_the_same_pixels(self):
        contingency_table = pytest.importorskip("skimage.metrics").contingency_table
        random = np.random.default_rng(0)
        pred, target = random.integers(0, 9, (2, 40, 50))
        table = contingency_table(pred, target, ignore_labels=[]).toarray()
        counts = overlap(pred, target)
        assert counts.intersection.tolist() == table[1:, 1:].tolist()
        assert counts.pred_areas.tolist() == table.sum(1)[1:].tolist()
        assert counts.target_areas.tolist() == table.sum(0)[1:].tolist()

    def test_pycocotools_has_the_same_iou(self):
        mask = pytest.importorskip("pycocotools.mask")
        random = np.random.default_rng(0)
        pair = random.integers(0, 9, (2, 40, 50))
        a, b = ([one["segmentation"] for one in Instances.from_label_map(labels).to_coco()] for labels in pair)
        assert overlap(*pair).iou == pytest.approx(mask.iou(a, b, [0] * len(b)))

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


class TestVoid:
    VOID = np.array([[1, 1, -1, 2, 2], [1, 1, -1, -1, 2], [0, 0, 0, 0, -1]])

    def test_by_hand(self):
        # What is left: 4 and 3 pixels there; 4, 1 and 1 found, of which 4 and 1 are on the targets.
        assert best_dice(PRED, self.VOID) == pytest.approx((1 + 2 * 1 / 4 + 0) / 3)
        assert symmetric_best_dice(PRED, self.VOID) == pytest.approx((1 + 1 / 2) / 3)
        assert foreground_background_dice(PRED, self.VOID) == pytest.approx(2 * 5 / (7 + 6))
        assert average_precision(PRED, self.VOID) == pytest.approx([1 / 4] * 10)

    def test_an_instance_in_void_is_none(self):
        pred = np.where(self.VOID == -1, 9, self.VOID)
        assert difference_in_count(pred, self.VOID) == 0
        for metric in (symmetric_best_dice, mean_average_precision, foreground_background_dice):
            assert metric(pred, self.VOID) == 1

    def test_all_void(self):
        nowhere = np.full_like(TARGET, -1)
        for metric in (symmetric_best_dice, mean_average_precision, foreground_background_dice):
            assert metric(PRED, nowhere) == metric(nowhere, PRED) == 1
        assert overlap(PRED, nowhere).iou.shape == (0, 0)

    def test_the_pixels_of_void_predictions_are_counted(self):
        counts = overlap(PRED, self.VOID)
        assert counts.void_areas.tolist() == [0, 0, 2]  # in order of id: 3, 5, 7
        assert counts.pred_areas.tolist() == [1, 1, 4]

    @settings(deadline=None, max_examples=100)
    @given(label_pairs, st.data())
    def test_is_cutting_those_pixels_out(self, pair, data):
        pred, target = pair
        void = data.draw(arrays(bool, pred.shape))
        kept = pred[~void][None], target[~void][None]
        for one, other in ((np.where(void, -1, pred), target), (pred, np.where(void, -1, target))):
            ours, expected = overlap(one, other), overlap(*kept)
            for name in ("intersection", "pred_areas", "target_areas"):
                assert getattr(ours, name).tolist() == getattr(expected, name).tolist()

    def test_ids_far_apart(self):
        far = np.where(self.VOID > 0, self.VOID * 2**40, self.VOID)
        assert overlap(PRED, far).intersection.tolist() == overlap(PRED, self.VOID).intersection.tolist()


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
        assert result["signed_dic"] == pytest.approx((1 - 2) / 2)
        assert result["apr60"] == pytest.approx(1 / 3 * 1 / 4)  # one of three right, one of four found
        assert result["apr"] == pytest.approx(2 / 5 * 1 / 12)
        assert result["apr_vol"] == pytest.approx((2 * 2 / 3 * 2 / 4 + 4 * 1 / 12) / 9)  # both IoUs pass 0.1 and 0.2
        assert [row["name"] for row in metrics.rows] == ["plant", "1"]
        assert [row["dic"] for row in metrics.rows] == [1, -2]
        assert [(row["count"], row["target_count"]) for row in metrics.rows] == [(3, 2), (0, 2)]
        json.dumps([result, metrics.rows])

    def test_masks_and_scores_make_the_ranking(self):
        both = np.stack([PRED == 7, TARGET == 1])  # that overlap: the second is all but hidden in the label map
        metrics = InstanceMetrics()
        row = metrics.update(Instances(both, np.array([0.5, 0.9]), TARGET.shape), TARGET)
        assert row["count"] == 1
        assert metrics.compute()["apr90"] == pytest.approx(1 / 2)  # the better mask goes first
        metrics.reset()
        metrics.update(Instances(both, np.array([0.9, 0.5]), TARGET.shape), TARGET)
        assert metrics.compute()["apr90"] == pytest.approx(1 / 2 * 1 / 2)

    def test_the_order_of_images_does_not_show(self):
        random = np.random.default_rng(0)
        pairs = [random.integers(-1, 6, (2, 9, 9)) for _ in range(20)]
        values = []
        for order in (range(20), random.permutation(20)):
            metrics = InstanceMetrics()
            for index in order:
                metrics.update(*pairs[index])
            values.append(metrics.compute())
        assert values[0] == values[1]

    def test_every_key_is_documented(self):
        text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
        computed = set(InstanceMetrics().compute()) - {"images", "apr60", "apr70", "apr80"}  # "`apr50` … `apr90`"
        assert [key for key in (*computed, *COCO_KEYS) if f"`{key}`" not in text] == []

    def test_reset_and_no_images(self):
        metrics = InstanceMetrics()
        metrics.update(PRED, TARGET)
        metrics.reset()
        assert metrics.rows == []
        result = metrics.compute()
        assert result["images"] == 0
        assert math.isnan(result["sbd"])

    def test_hundreds_of_instances_well_under_a_second(self):
        target = np.kron(np.arange(1, 501).reshape(20, 25), np.ones((50, 40), np.int64))
        pred = np.roll(target, 9, 0)  # IoU 41 / 59 of all, as the last row of blocks comes in on top
        metrics = InstanceMetrics()
        start = time.process_time()
        row = metrics.update(pred, target)
        assert time.process_time() - start < 0.7  # 1000 x 1000 pixels, 500 instances: 0.07 s; masks would take minutes
        assert row["count"] == row["target_count"] == 500
        values = metrics.compute()
        assert (values["apr60"], values["apr70"]) == (1, 0)
