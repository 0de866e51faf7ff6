"""COCO's numbers by hand, and the files that give them to anybody else."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from fastris import Instances
from fastris.errors import InputError
from fastris.metrics import CocoMetrics

SIZE = (12, 12)


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("pycocotools")


def block(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[rows, columns] = True
    return mask


FIRST = block(slice(0, 3), slice(0, 3))
SECOND = block(slice(5, 10), slice(5, 10))
PART = SECOND & block(slice(0, 12), slice(0, 9)) & ~block(slice(9, 10), slice(5, 7))  # 18 of 25: IoU 0.72
ELSEWHERE = block(slice(0, 3), slice(8, 12))
TARGET = FIRST + 2 * SECOND.astype(np.int32)
FOUND = Instances(np.stack([FIRST, ELSEWHERE, PART]), np.array([0.9, 0.8, 0.7]), SIZE)
NOTHING = Instances(np.zeros((0, *SIZE), bool), np.zeros(0), SIZE)


def computed(*images: tuple[Instances, np.ndarray]) -> dict[str, float]:
    metric = CocoMetrics()
    for pred, target in images:
        metric.update(pred, target)
    return metric.compute()


class TestByHand:
    def test_right_wrong_and_right_up_to_an_iou_of_0_72(self):
        values = computed((FOUND, TARGET))
        # Of the recalls 0, 0.01 … 1, 51 are reached at precision 1; up to IoU 0.7, the other 50 at 2/3.
        low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
        assert values["ap50"] == pytest.approx(low)
        assert values["ap75"] == pytest.approx(high)
        assert values["ap"] == values["ap_small"] == pytest.approx((low + high) / 2)
        assert values["ar1"] == pytest.approx(1 / 2)
        assert values["ar10"] == values["ar100"] == values["ar_small"] == pytest.approx((1 + 1 / 2) / 2)
        assert all(math.isnan(values[f"{kind}_{size}"]) for kind in ("ap", "ar") for size in ("medium", "large"))

    def test_scores_make_the_ranking(self):
        last = Instances(FOUND.masks, np.array([0.9, 0.1, 0.7]), SIZE)
        assert computed((last, TARGET))["ap50"] == pytest.approx(1)

    def test_masks_may_overlap(self):
        both = Instances(np.stack([FIRST | SECOND, SECOND, FIRST]), np.array([0.1, 0.9, 0.8]), SIZE)
        assert computed((both, TARGET))["ap"] == pytest.approx(1)

    def test_sizes_are_those_of_the_targets(self):
        big = np.zeros((120, 120), np.int32)
        big[:40, :40], big[50:60, 50:60] = 1, 2
        values = computed((Instances.from_label_map(big == 1), big))
        assert (values["ap_medium"], values["ap_small"]) == (pytest.approx(1), 0)
        assert math.isnan(values["ap_large"])

    def test_a_false_positive_on_another_image(self):
        values = computed((FOUND, TARGET), (Instances(FIRST[None], np.array([0.95]), SIZE), np.zeros(SIZE, int)))
        assert values["ap50"] == pytest.approx((51 * 1 / 2 + 50 * 1 / 2) / 101)  # wrong, right, wrong, right


class TestVoid:
    def test_a_detection_in_void_is_ignored(self):
        void = np.where(ELSEWHERE, -1, TARGET)
        values = computed((FOUND, void))
        assert values["ap50"] == pytest.approx(1)
        assert computed((FOUND, TARGET))["ap50"] < 0.9

    def test_void_is_nothing_to_find(self):
        void = np.where(ELSEWHERE, -1, TARGET)
        perfect = Instances.from_label_map(TARGET)
        assert computed((perfect, void))["ar100"] == pytest.approx(1)
        annotations = filled(void).ground_truth()["annotations"]
        assert [one["iscrowd"] for one in annotations] == [0, 0, 1] * 2
        assert annotations[2]["area"] == np.count_nonzero(ELSEWHERE)


class TestEmpty:
    def test_nothing_found(self):
        values = computed((NOTHING, TARGET))
        assert values["ap"] == values["ar100"] == 0

    def test_nothing_there(self):
        for pred in (FOUND, NOTHING):
            assert all(map(math.isnan, computed((pred, np.zeros(SIZE, int))).values()))

    def test_no_image(self):
        assert all(map(math.isnan, computed().values()))

    def test_an_empty_mask_is_wrong(self):
        pred = Instances(np.stack([FIRST & False, FIRST, SECOND]), np.array([0.9, 0.8, 0.7]), SIZE)
        assert computed((pred, TARGET))["ap50"] == pytest.approx(2 / 3)


def filled(target: np.ndarray = TARGET) -> CocoMetrics:
    metric = CocoMetrics()
    metric.update(FOUND, target, name="b.png")
    metric.update(NOTHING, torch.from_numpy(target), name="a.png")
    return metric


class TestFiles:
    def test_pycocotools_finds_the_same_in_them(self, tmp_path, capsys):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        metric = filled(np.where(ELSEWHERE, -1, TARGET))
        paths = tmp_path / "truth.json", tmp_path / "results.json"
        for path, content in zip(paths, (metric.ground_truth(), metric.results()), strict=True):
            path.write_text(json.dumps(content))
        truth = COCO(str(paths[0]))
        evaluation = COCOeval(truth, truth.loadRes(str(paths[1])), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        capsys.readouterr()
        values = metric.compute()
        assert [value if value >= 0 else None for value in evaluation.stats] == [
            None if math.isnan(value) else value for value in values.values()
        ]
        assert values["ar100"] == pytest.approx((2 + 1) / 2 / 4)  # nothing was found in the second image
        assert capsys.readouterr().out == ""  # pycocotools's progress is not ours

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools's decode
    def test_masks_survive_and_images_are_ordered_by_name(self):
        from pycocotools import mask

        truth, results = filled().ground_truth(), filled().results()
        assert [image["file_name"] for image in truth["images"]] == ["a.png", "b.png"]
        assert [(one["image_id"], one["score"]) for one in results] == [
            (2, pytest.approx(score)) for score in (0.9, 0.8, 0.7)
        ]
        for one, expected in zip(results, FOUND.masks, strict=True):
            assert (mask.decode(one["segmentation"]) == expected).all()
        assert [one["image_id"] for one in truth["annotations"]] == [1, 1, 2, 2]
        for one, expected in zip(truth["annotations"], (FIRST, SECOND) * 2, strict=True):
            assert (mask.decode(one["segmentation"]) == expected).all()
            assert one["area"] == expected.sum()


class TestInputs:
    def test_another_size(self):
        with pytest.raises(InputError, match=r"same shape, got \(12, 12\) and \(12, 11\)"):
            CocoMetrics().update(FOUND, TARGET[:, :11])

    @pytest.mark.parametrize(
        ("target", "message"), [(TARGET.astype(float), "target must be an integer"), (-2 * TARGET, "negative ids")]
    )
    def test_unusable_targets_are_named(self, target, message):
        with pytest.raises(InputError, match=message):
            CocoMetrics().update(FOUND, target)

    def test_without_pycocotools(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        with pytest.raises(InputError, match=r"fastris\[coco\]"):
            CocoMetrics()
