"""Instances: boxes, areas, the overlap rule and COCO."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from fastris.errors import InputError
from fastris.instances import Instances


@pytest.fixture
def overlapping() -> Instances:
    masks = np.zeros((3, 6, 8), bool)
    masks[0, 1:4, 2:5] = True
    masks[1, 3:6, 4:8] = True  # shares the pixel (3, 4) with the first
    return Instances(masks, np.array([0.9, 0.8, 0.7]), (6, 8), "cell.png")  # the third is empty


def test_boxes_and_areas(overlapping: Instances) -> None:
    assert len(overlapping) == 3
    np.testing.assert_array_equal(overlapping.boxes, [[2, 1, 5, 4], [4, 3, 8, 6], [0, 0, 0, 0]])
    assert overlapping.boxes.dtype == np.float32
    np.testing.assert_array_equal(overlapping.areas, [9, 12, 0])


def test_where_two_overlap_the_earlier_wins(overlapping: Instances) -> None:
    labels = overlapping.label_map()
    assert labels.dtype == np.int32
    assert labels[3, 4] == 1
    assert np.bincount(labels.ravel()).tolist() == [48 - 20, 9, 11]


def test_no_instances() -> None:
    nothing = Instances(np.zeros((0, 4, 5), bool), np.zeros(0), (4, 5))
    assert len(nothing) == 0
    assert nothing.boxes.shape == (0, 4)
    assert nothing.label_map().shape == (4, 5)
    assert nothing.to_coco() == []
    assert nothing.summary()["count"] == 0
    assert nothing.resize((2, 3)).size == (2, 3)
    assert nothing.plot().size[0] >= 5


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="masks"):
        Instances(np.zeros((2, 4, 5), bool), np.zeros(3), (4, 5))


def test_rows_are_json_in_order_of_finding(overlapping: Instances) -> None:
    summary = json.loads(json.dumps(overlapping.summary()))
    assert summary["file"] == "cell.png"
    assert (summary["height"], summary["width"], summary["count"]) == (6, 8, 3)
    assert [row["index"] for row in summary["instances"]] == [1, 2, 3]
    assert summary["instances"][1] == {"index": 2, "score": 0.8, "area": 12, "box": [4, 3, 8, 6]}


def test_label_map_round_trip() -> None:
    labels = np.array([[0, 2, 2], [5, 0, 2]], np.int32)
    instances = Instances.from_label_map(labels, "a")
    np.testing.assert_array_equal(instances.label_map(), [[0, 1, 1], [2, 0, 1]])


def test_resize_doubles_every_pixel(overlapping: Instances) -> None:
    large = overlapping.resize((12, 16))
    np.testing.assert_array_equal(large.areas, overlapping.areas * 4)
    np.testing.assert_array_equal(large.boxes, overlapping.boxes * 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_coco_round_trip() -> None:
    mask_api = pytest.importorskip("pycocotools.mask")
    masks = np.random.default_rng(0).random((4, 17, 23)) < 0.4
    instances = Instances(masks, np.linspace(0.5, 1, 4), (17, 23))
    results = json.loads(json.dumps(instances.to_coco(image_id=7, category_id=3)))
    assert len(results) == 4
    for mask, result in zip(masks, results, strict=True):
        assert (result["image_id"], result["category_id"]) == (7, 3)
        rle = {"size": result["segmentation"]["size"], "counts": result["segmentation"]["counts"].encode()}
        np.testing.assert_array_equal(mask_api.decode(rle), mask)
        assert result["area"] == mask.sum() == mask_api.area(rle)
        np.testing.assert_array_equal(result["bbox"], mask_api.toBbox(rle))


def test_coco_without_pycocotools_says_what_to_install(monkeypatch: pytest.MonkeyPatch, overlapping: Instances) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r"fastris\[coco\]"):
        overlapping.to_coco()
