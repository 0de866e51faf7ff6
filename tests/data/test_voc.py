"""Pascal VOC, on a folder in its format: palette PNGs with VOC's colours, JPEGs and lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastris.data import VOID, VocDataset, open_dataset
from fastris.errors import InputError

PERSON, DOG, BORDER = 15, 12, 255


def outlined(*objects: tuple[int, int]) -> np.ndarray:
    """Objects (index, first column) of 8x4 pixels with a void border of one pixel, (10, 20)."""
    indices = np.zeros((10, 20), np.uint8)
    for index, left in objects:
        indices[:, left - 1 : left + 5] = BORDER
        indices[1:9, left : left + 4] = index
    return indices


@pytest.fixture
def root(tmp_path: Path, save_image, save_palette) -> Path:
    """Two images to train on, a person with a dog and nothing; one for validation with two persons."""
    objects = {"2007_000001": [(1, 2), (2, 9)], "2007_000002": [], "2007_000003": [(1, 2), (2, 14)]}
    classes = {"2007_000001": [(PERSON, 2), (DOG, 9)], "2007_000002": [], "2007_000003": [(PERSON, 2), (PERSON, 14)]}
    root = tmp_path / "VOC2012"
    for name in objects:
        save_image(root / f"JPEGImages/{name}.jpg", 10, 20)
        save_palette(root / f"SegmentationObject/{name}.png", outlined(*objects[name]))
        save_palette(root / f"SegmentationClass/{name}.png", outlined(*classes[name]))
    save_image(root / "JPEGImages/2008_000009.jpg", 10, 20)  # one of the many without a segmentation
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000001\n2007_000002\n")
    (lists / "val.txt").write_text("2007_000003\n")
    return root


def test_splits_are_the_lists(root):
    names = ["2007_000001", "2007_000002", "2007_000003"]
    dataset = open_dataset(root)
    assert isinstance(dataset, VocDataset) and dataset.names == names[:2]
    assert open_dataset(root, "validation").names == names[2:]
    assert open_dataset(root, "all").names == names


def test_without_a_class_every_object_is_an_instance(root):
    sample = VocDataset(root)[0]
    expected = outlined((1, 2), (2, 9)).astype(int)
    expected[expected == BORDER] = VOID
    assert sample.labels.tolist() == expected.tolist()
    assert sample.image.shape == (3, 10, 20)


def test_of_other_classes_only_the_border_is_left(root):
    sample = VocDataset(root, data_class="dog")[0]
    expected = outlined((0, 2), (1, 9)).astype(int)
    expected[expected == BORDER] = VOID
    assert sample.labels.tolist() == expected.tolist()
    assert [one.count for one in VocDataset(root, "all", data_class="person")] == [1, 0, 2]


def test_the_class_of_an_object_is_that_of_most_of_its_pixels(root, save_palette):
    classes = outlined((PERSON, 2), (DOG, 9))
    classes[1:9, 2:4] = BORDER  # half of the person
    classes[1:4, 4:6] = DOG  # 6 of its other 16 pixels
    save_palette(root / "SegmentationClass/2007_000001.png", classes)
    assert VocDataset(root, data_class="person")[0].count == 1
    classes[4:6, 4:6] = DOG  # 10 of them
    save_palette(root / "SegmentationClass/2007_000001.png", classes)
    assert VocDataset(root, data_class="person")[0].count == 0
    assert VocDataset(root, data_class="dog")[0].count == 2


def test_filters_count_the_class(root):
    assert VocDataset(root, "all", "person", min_instances=1).names == ["2007_000001", "2007_000003"]
    assert VocDataset(root, "all", "person", max_instances=1).names == ["2007_000001", "2007_000002"]
    assert len(VocDataset(root, "all", size=(10, 20))) == 3 and len(VocDataset(root, "all", size=(20, 10))) == 0


def test_an_unknown_class(root):
    with pytest.raises(InputError, match="data_class: expected one of aeroplane, .*, got 'leaf'"):
        open_dataset(root, data_class="leaf")


def test_lists_that_are_empty_or_missing(root):
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    (root / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(InputError, match=r"train\.txt: no images in this list"):
        VocDataset(root)
    with pytest.raises(InputError, match=r"val\.txt: cannot read this list of images: No such file"):
        VocDataset(root, "validation")


def remove(path: Path) -> None:
    path.unlink()


def spoil(path: Path) -> None:
    path.write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("file", "break_it", "message"),
    [
        ("JPEGImages/2007_000001.jpg", remove, "no such file"),
        ("JPEGImages/2007_000001.jpg", spoil, "not an image"),
        ("SegmentationObject/2007_000001.png", remove, "no such file"),
        ("SegmentationClass/2007_000001.png", remove, "no such file"),
        ("SegmentationClass/2007_000001.png", spoil, "not an image"),
    ],
)
def test_bad_files_are_named_and_the_others_load(root, file, break_it, message):
    break_it(root / file)
    for dataset in (VocDataset(root, data_class="person"), VocDataset(root, data_class="person", max_instances=5)):
        with pytest.raises(InputError, match=f"{file}: {message}"):
            dataset[0]
        assert dataset[1].count == 0


def test_sizes_that_differ(root, save_image, save_palette):
    save_palette(root / "SegmentationClass/2007_000001.png", np.zeros((20, 10)))
    with pytest.raises(InputError, match=r"Class/2007_000001\.png: label map is 10x20 pixels, that of the objects 20x"):
        VocDataset(root, data_class="person")[0]
    save_image(root / "JPEGImages/2007_000001.jpg", 10, 21)
    with pytest.raises(InputError, match=r"Object/2007_000001\.png: label map is 20x10 pixels, its image 21x10"):
        VocDataset(root)[0]


def test_colours_instead_of_indices(root, save_image):
    save_image(root / "SegmentationObject/2007_000001.png", 10, 20)
    with pytest.raises(InputError, match=r"2007_000001\.png: expected a grey or palette image, got one of mode RGB"):
        VocDataset(root)[0]


def test_indices_past_a_byte(root, save_grey):
    save_grey(root / "SegmentationObject/2007_000001.png", np.full((10, 20), 256))
    with pytest.raises(InputError, match=r"2007_000001\.png: expected indices to 255, got 256"):
        VocDataset(root)[0]
