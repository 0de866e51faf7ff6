"""COCO, on files whose masks pycocotools encoded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastris.data import VOID, CocoDataset, open_dataset
from fastris.data.coco_masks import decode_segmentation
from fastris.errors import InputError

mask_coder = pytest.importorskip("pycocotools.mask")

PERSON, BALL = 1, 37


def rectangle(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((12, 20), bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(top: int, bottom: int, left: int, right: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_coder.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, starting with those of 0."""
    pixels = np.concatenate([[False], mask.T.reshape(-1)])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def annotation(number: int, image: int, category: int, segmentation: Any, iscrowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": iscrowd}


def content(*annotations: dict[str, Any], images: int = 1, first: int = 1) -> dict[str, Any]:
    numbers = range(first, first + images)
    return {
        "info": {"year": 2017},
        "images": [{"id": k, "file_name": f"{k:012d}.jpg", "height": 12, "width": 20} for k in numbers],
        "annotations": list(annotations),
        "categories": [{"id": PERSON, "name": "person"}, {"id": BALL, "name": "sports ball"}],
    }


TRAIN = content(
    annotation(1, 1, PERSON, [polygon(1, 9, 2, 8), polygon(9, 11, 2, 4)]),
    annotation(2, 1, BALL, compressed(rectangle(3, 5, 3, 5))),
    annotation(3, 1, PERSON, uncompressed(rectangle(0, 6, 6, 20)), iscrowd=1),
    annotation(4, 2, PERSON, compressed(rectangle(0, 12, 0, 20))),
    images=3,
)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def root(tmp_path: Path, save_image) -> Path:
    """COCO's own layout: three images to train on, one for validation, other annotation files beside."""
    write(tmp_path / "annotations/instances_train2017.json", TRAIN)
    write(tmp_path / "annotations/instances_val2017.json", content(first=9))
    write(tmp_path / "annotations/captions_train2017.json", {})
    for folder, number in (("train2017", 1), ("train2017", 2), ("train2017", 3), ("val2017", 9)):
        save_image(tmp_path / folder / f"{number:012d}.jpg", 12, 20)
    return tmp_path


def test_splits_are_the_files(root):
    dataset = open_dataset(root)
    assert isinstance(dataset, CocoDataset)
    assert dataset.names == ["000000000001.jpg", "000000000002.jpg", "000000000003.jpg"]
    assert open_dataset(root, "validation").names == ["000000000009.jpg"]
    assert [sample.count for sample in open_dataset(root, "all")] == [2, 1, 0, 0]


def test_polygons_run_lengths_and_crowds(root):
    person = rectangle(1, 9, 2, 8) | rectangle(9, 11, 2, 4)
    ball, crowd = rectangle(3, 5, 3, 5), rectangle(0, 6, 6, 20)
    expected = np.where(ball, 2, np.where(person, 1, np.where(crowd, VOID, 0)))
    assert CocoDataset(root)[0].labels.tolist() == expected.tolist()
    expected = np.where(person, 1, np.where(crowd, VOID, 0))
    assert CocoDataset(root, data_class="person")[0].labels.tolist() == expected.tolist()
    assert CocoDataset(root, data_class="sports ball")[0].labels.tolist() == ball.astype(int).tolist()


def test_the_smaller_mask_keeps_the_pixel(root):
    small = annotation(1, 1, PERSON, compressed(rectangle(2, 4, 2, 4)))
    large = annotation(2, 1, PERSON, compressed(rectangle(0, 9, 0, 9)))
    for order in ((small, large), (large, small)):
        write(root / "annotations/instances_train2017.json", content(*order))
        labels = CocoDataset(root)[0].labels.numpy()
        assert (labels == 2).tolist() == rectangle(2, 4, 2, 4).tolist()
        assert (labels > 0).tolist() == rectangle(0, 9, 0, 9).tolist()


def test_filters_count_the_class_without_the_crowd(root):
    assert CocoDataset(root, data_class="person", min_instances=1).names == ["000000000001.jpg", "000000000002.jpg"]
    assert CocoDataset(root, max_instances=1).names == ["000000000002.jpg", "000000000003.jpg"]
    assert len(CocoDataset(root, size=(12, 20))) == 3 and len(CocoDataset(root, size=(20, 12))) == 0


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("labels.json", "."),
        ("labels.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/labels.json", "images"),
    ],
)
def test_a_single_file_finds_its_images_and_is_split_by_hash(tmp_path, save_image, file, folder):
    path = write(tmp_path / file, {**TRAIN, **{"images": content(images=30)["images"]}})
    for number in range(1, 31):
        save_image(tmp_path / folder / f"{number:012d}.jpg", 12, 20)
    train, validation = open_dataset(path, "train"), open_dataset(str(path), "validation")
    assert validation.names and sorted(train.names + validation.names) == open_dataset(path, "all").names
    assert open_dataset(path, "all")[0].count == 2


def test_what_predict_writes_can_be_read(tmp_path, save_image):
    from fastris.commands.predict import Coco
    from fastris.instances import Instances

    save_image(tmp_path / "a.png", 12, 20)
    masks = np.stack([rectangle(0, 3, 0, 3), rectangle(5, 9, 5, 12)])
    coco = Coco()
    coco.add(Instances(masks, np.array([0.9, 0.8]), (12, 20), "a.png"))
    coco.write(tmp_path / "coco.json")
    assert open_dataset(tmp_path / "coco.json", "all")[0].labels.tolist() == (masks[0] + 2 * masks[1]).tolist()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_are_what_pycocotools_encodes(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    assert decode_segmentation(compressed(mask), height, width).tolist() == mask.tolist()
    assert decode_segmentation(uncompressed(mask), height, width).tolist() == mask.tolist()


def test_long_run_lengths_are_what_pycocotools_encodes():
    mask = np.zeros((700, 900), bool)
    mask[3:650, 100:800] = np.random.default_rng(0).random((647, 700)) < 0.3
    mask[:, 850:] = True
    assert (decode_segmentation(compressed(mask), 700, 900) == mask).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' own decoder
def test_polygons_are_what_pycocotools_fills():
    random = np.random.default_rng(0)
    for _ in range(50):
        polygons = [random.uniform(-10, 60, (corners, 2)).ravel().tolist() for corners in random.integers(3, 9, 2)]
        expected = mask_coder.decode(mask_coder.merge(mask_coder.frPyObjects(polygons, 40, 50)))
        assert (decode_segmentation(polygons, 40, 50) == expected).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "must be polygons or run lengths"),
        ({"size": [12, 20]}, "must be polygons or run lengths"),
        ({"size": [20, 12], "counts": [240]}, r"run lengths of size \[20, 12\] for an image of \[12, 20\]"),
        ({"size": [12, 20], "counts": [100, 4]}, "run lengths of 104 pixels for an image of 240"),
        ({"size": [12, 20], "counts": compressed(np.zeros((5, 5), bool))["counts"]}, "run lengths of 25 pixels"),
        ({"size": [12, 20], "counts": [250, -10]}, "whole numbers from 0"),
        ({"size": [12, 20], "counts": [0.5, 239.5]}, "whole numbers from 0"),
        ({"size": [12, 20], "counts": "~"}, "the character '~'"),
        ({"size": [12, 20], "counts": "`"}, "cut short"),
        ([], "without polygons"),
        ([[1, 2, 3, 4]], "three or more pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three or more pairs"),
        ([[1, 2, 3, 4, 5, "x"]], "could not convert"),
        ([[1, 2, 3, 4, 5, 1e9]], "far outside the image of 12x20"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside the image of 12x20"),
    ],
)
def test_a_segmentation_that_cannot_be_decoded_is_named(root, segmentation, message):
    path = write(root / "annotations/instances_train2017.json", content(annotation(77, 1, PERSON, segmentation)))
    with pytest.raises(InputError, match=f"annotation 77 of 000000000001.jpg: .*{message}") as caught:
        CocoDataset(root)[0]
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in TRAIN.items() if name != key}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (without("images"), "not in COCO's format of images, annotations and categories: KeyError.'images'"),
        (without("annotations"), "not in COCO's format"),
        ([1], "not in COCO's format"),
        ({**TRAIN, "images": [{"id": 1}]}, "not in COCO's format"),
        (content(images=0), "no images in this file"),
        (content(annotation(1, 5, PERSON, [])), "annotation 1 is of image 5, which is not there"),
        ({**TRAIN, "images": TRAIN["images"] * 2}, None),
        (
            {**TRAIN, "images": [*TRAIN["images"], {**TRAIN["images"][0], "id": 8}]},
            "two images with the same file_name",
        ),
    ],
)
def test_a_file_of_another_format(root, value, message):
    path = write(root / "annotations/instances_train2017.json", value)
    if message is None:  # the same entry twice is one image
        assert len(CocoDataset(root)) == 3
        return
    with pytest.raises(InputError, match=message) as caught:
        CocoDataset(root)
    assert str(caught.value).startswith(str(path))


def test_no_json(root):
    path = root / "annotations/instances_train2017.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"instances_train2017\.json: not a JSON file"):
        CocoDataset(root)
    path.unlink()
    with pytest.raises(InputError, match=r"annotations: no instances_train\*\.json"):
        CocoDataset(root)
    for year in (2014, 2017):
        write(root / f"annotations/instances_train{year}.json", TRAIN)
    with pytest.raises(InputError, match=r"annotations: more than one instances_train\*\.json"):
        CocoDataset(root)


def test_a_file_name_in_both_splits(root):
    write(root / "annotations/instances_val2017.json", TRAIN)
    (root / "train2017").rename(root / "images")
    with pytest.raises(InputError, match=r"val2017\.json: has an image with the file_name of one in .*train2017\.json"):
        CocoDataset(root, "all")


def test_an_unknown_class(root):
    with pytest.raises(InputError, match="json: data_class: expected one of person, sports ball, got 'leaf'"):
        open_dataset(root, data_class="leaf")


def test_images_that_are_missing_broken_or_of_another_size(root, save_image):
    folder = root / "train2017"
    dataset = CocoDataset(root)
    save_image(folder / "000000000001.jpg", 20, 12)
    with pytest.raises(InputError, match=r"train2017\.json: label map is 20x12 pixels, its image 12x20"):
        dataset[0]
    (folder / "000000000002.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"000000000002\.jpg: not an image"):
        dataset[1]
    (folder / "000000000003.jpg").unlink()
    with pytest.raises(InputError, match=r"000000000003\.jpg: no such file"):
        dataset[2]
    (folder / "000000000001.jpg").unlink()
    with pytest.raises(InputError, match=r"cannot find its images: no 000000000001\.jpg in .*annotations.*train2017"):
        CocoDataset(root)


def test_without_pycocotools_polygons_say_what_to_install_and_run_lengths_work(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    dataset = CocoDataset(root)
    with pytest.raises(InputError, match="pycocotools, which is not installed: pip install 'fastris.coco.'"):
        dataset[0]
    assert dataset[1].count == 1
