"""Instances: boxes, areas, the overlap rule and COCO."""

from __future__ import annotations

import importlib.util
import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch

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


def test_shapes_are_checked(overlapping: Instances) -> None:
    for masks in (np.zeros((2, 4, 5), bool), np.zeros((3, 5, 4), bool), np.zeros((4, 5), bool)):
        with pytest.raises(InputError, match="mask"):
            Instances(masks, np.zeros(3), (4, 5))
    with pytest.raises(InputError, match="a mask for each of 2 scores, got 3"):
        Instances(overlapping.crops, np.zeros(2), (6, 8))


def test_masks_are_what_went_in(overlapping: Instances) -> None:
    masks = np.random.default_rng(0).random((5, 9, 7)) < 0.2
    masks[2] = False
    masks[3, 1:] = False
    np.testing.assert_array_equal(Instances(masks, np.ones(5), (9, 7)).masks, masks)
    np.testing.assert_array_equal(Instances(torch.from_numpy(masks), np.ones(5), (9, 7)).masks, masks)
    again = Instances(overlapping.crops, overlapping.scores, overlapping.size)
    np.testing.assert_array_equal(again.masks, overlapping.masks)


def test_memory_follows_the_objects_not_the_image() -> None:
    """400 objects of 20² pixels on 1000², whose masks as one array would be 400 MB."""
    labels = np.kron(np.arange(400).reshape(20, 20) + 1, np.pad(np.ones((20, 20), np.int32), 15))
    Instances.from_label_map(labels[:100, :100])  # imports SciPy
    tracemalloc.start()
    instances = Instances.from_label_map(labels)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    instances.resize((500, 500)).label_map()
    instances.to_coco() if importlib.util.find_spec("pycocotools") else None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(instances) == 400 and (instances.areas == 400).all()
    assert held < 1e6
    assert peak < 8 * labels.size  # a few maps of the image at a time


def test_some_of_the_instances(overlapping: Instances) -> None:
    sure = overlapping[overlapping.scores > 0.75]
    np.testing.assert_array_equal(sure.masks, overlapping.masks[:2])
    np.testing.assert_array_equal(sure.scores, overlapping.scores[:2])
    assert (sure.size, sure.name) == (overlapping.size, "cell.png")
    np.testing.assert_array_equal(overlapping[::-1].areas, [0, 12, 9])
    np.testing.assert_array_equal(overlapping[[1, 0]].areas, [12, 9])
    assert [one.areas.tolist() for one in overlapping] == [[9], [12], [0]]
    assert len(overlapping[-1]) == 1 and overlapping[-1].areas == 0
    assert len(overlapping[np.zeros(3, bool)]) == 0
    with pytest.raises(IndexError):
        overlapping[3]


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
    assert instances.name == "a" and instances.scores.tolist() == [1, 1]
    sparse = Instances.from_label_map(np.array([[-3, 2**40], [-3, 7]]))
    np.testing.assert_array_equal(sparse.label_map(), [[0, 2], [0, 1]])
    for nothing in (np.zeros((3, 4), np.uint8), np.zeros((0, 4), np.int64)):
        assert len(Instances.from_label_map(nothing)) == 0


def test_resize_doubles_every_pixel(overlapping: Instances) -> None:
    large = overlapping.resize((12, 16))
    np.testing.assert_array_equal(large.areas, overlapping.areas * 4)
    np.testing.assert_array_equal(large.boxes, overlapping.boxes * 2)


@pytest.mark.parametrize("size", [(7, 3), (1, 1), (12, 40), (5, 9)])
def test_resize_takes_the_nearest_pixel_of_every_mask(size: tuple[int, int]) -> None:
    masks = np.random.default_rng(0).random((6, 9, 11)) < 0.1
    rows, columns = np.arange(size[0]) * 9 // size[0], np.arange(size[1]) * 11 // size[1]
    resized = Instances(masks, np.ones(6), (9, 11)).resize(size)
    np.testing.assert_array_equal(resized.masks, masks[:, rows][:, :, columns])
    np.testing.assert_array_equal(resized.boxes, Instances(resized.masks, np.ones(6), size).boxes)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pycocotools_loads_the_results() -> None:
    coco_api = pytest.importorskip("pycocotools.coco")
    masks = np.random.default_rng(0).random((3, 17, 23)) < 0.4
    truth = coco_api.COCO()
    truth.dataset = {"images": [{"id": 7, "height": 17, "width": 23}], "categories": [{"id": 3}], "annotations": []}
    truth.createIndex()
    results = truth.loadRes(Instances(masks, np.linspace(0.5, 1, 3), (17, 23)).to_coco(image_id=7, category_id=3))
    annotations = results.loadAnns(results.getAnnIds(imgIds=[7], catIds=[3]))
    assert [one["score"] for one in annotations] == [0.5, 0.75, 1.0]
    for mask, annotation in zip(masks, annotations, strict=True):
        np.testing.assert_array_equal(results.annToMask(annotation), mask)


def test_coco_without_pycocotools_says_what_to_install(monkeypatch: pytest.MonkeyPatch, overlapping: Instances) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r"fastris\[coco\]"):
        overlapping.to_coco()
