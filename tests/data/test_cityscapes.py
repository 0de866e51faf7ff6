"""Cityscapes, on a folder in its format: 16-bit instance ids, by split and city."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastris.data import VOID, CityscapesDataset, open_dataset
from fastris.errors import InputError

ROAD, PERSON, CAR = 7, 24, 26
# two cars, a group of cars; a person, a group of persons; road, out of roi, unlabeled
IDS = np.repeat([[26000, 26001, CAR], [24000, PERSON, ROAD], [ROAD, 3, 0]], 2, axis=0)


@pytest.fixture
def root(tmp_path: Path, save_image, save_grey) -> Path:
    """One image of each of two cities to train on, one for validation."""
    for split, city, ids in (
        ("train", "aachen", IDS),
        ("train", "bochum", np.full((6, 3), ROAD)),
        ("val", "munster", np.full((6, 3), 33000)),
    ):
        name = f"{city}_000000_000019"
        save_image(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", 6, 3)
        save_grey(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png", ids)
        save_grey(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", ids)
    return tmp_path


def test_splits_are_the_folders(root):
    dataset = open_dataset(root)
    assert isinstance(dataset, CityscapesDataset)
    assert dataset.names == ["aachen_000000_000019", "bochum_000000_000019"]
    assert open_dataset(root, "validation").names == ["munster_000000_000019"]
    assert [sample.count for sample in open_dataset(root, "all")] == [3, 0, 1]


@pytest.mark.parametrize(
    ("data_class", "rows"),
    [
        (None, [[1, 2, VOID], [3, VOID, 0], [0, VOID, VOID]]),
        ("car", [[1, 2, VOID], [0, 0, 0], [0, VOID, VOID]]),
        ("person", [[0, 0, 0], [1, VOID, 0], [0, VOID, VOID]]),
        ("bus", [[0, 0, 0], [0, 0, 0], [0, VOID, VOID]]),
    ],
)
def test_instances_groups_and_the_rest(root, data_class, rows):
    sample = CityscapesDataset(root, data_class=data_class)[0]
    assert sample.labels.tolist() == np.repeat(rows, 2, axis=0).tolist()


def test_filters_count_the_class(root):
    assert CityscapesDataset(root, data_class="car", min_instances=1).names == ["aachen_000000_000019"]
    assert CityscapesDataset(root, "all", max_instances=2).names == ["bochum_000000_000019", "munster_000000_000019"]
    assert len(CityscapesDataset(root, size=(3, 6))) == 0


def test_an_unknown_class(root):
    with pytest.raises(InputError, match="data_class: expected one of person, rider, .*, got 'road'"):
        open_dataset(root, data_class="road")


def test_an_empty_split(root):
    for path in root.glob("leftImg8bit/val/*/*"):
        path.unlink()
    with pytest.raises(InputError, match="no images found in split 'validation'; expected leftImg8bit/<split>"):
        open_dataset(root, "validation")


def test_bad_files_are_named_and_the_others_load(root, save_grey):
    label = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
    image = root / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    dataset = CityscapesDataset(root, cache=False)
    label.unlink()
    with pytest.raises(InputError, match="aachen_000000_000019_gtFine_instanceIds.png: no such file"):
        dataset[0]
    save_grey(label, IDS.T)
    with pytest.raises(InputError, match="gtFine_instanceIds.png: label map is 6x3 pixels, its image 3x6"):
        dataset[0]
    save_grey(label, IDS)
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(InputError, match="aachen_000000_000019_leftImg8bit.png: "):
        dataset[0]
    assert dataset[1].count == 0
