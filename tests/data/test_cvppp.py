"""CVPPP's folders of plants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastris.data import CvpppDataset, FolderDataset, open_dataset
from fastris.errors import InputError


@pytest.fixture
def root(tmp_path: Path, save_image, save_palette) -> Path:
    """Four plants in each of A1, A2 and A4, with the files that the challenge has beside them; none in A3."""
    for subset in ("A1", "A2", "A4"):
        for number in range(1, 5):
            leaves = np.zeros((12, 10), np.uint8)
            leaves[0, : number + 1] = np.arange(1, number + 2)
            save_image(tmp_path / subset / f"plant{number:03d}_rgb.png", 12, 10)
            save_palette(tmp_path / subset / f"plant{number:03d}_label.png", leaves)
            save_palette(tmp_path / subset / f"plant{number:03d}_fg.png", leaves > 0)
        (tmp_path / subset / f"{subset}.csv").write_text("plant001_label.png,2\n")
    return tmp_path


def test_the_subsets_are_one_data_set(root):
    dataset = open_dataset(root, "all")
    assert isinstance(dataset, CvpppDataset)
    assert dataset.names == [f"{subset}/plant00{number}" for subset in ("A1", "A2", "A4") for number in (1, 2, 3, 4)]
    assert [sample.count for sample in dataset] == [2, 3, 4, 5] * 3
    assert dataset[1].labels[0, :4].tolist() == [1, 2, 3, 0]


def test_an_image_is_in_the_same_split_alone_and_with_the_others(root, monkeypatch):
    alone = open_dataset(root / "A1", "all")
    assert isinstance(alone, CvpppDataset)
    assert alone.names == [f"A1/plant00{number}" for number in (1, 2, 3, 4)]
    monkeypatch.chdir(root / "A1")
    assert open_dataset(".", "all").names == alone.names
    assert type(open_dataset(root.parent / root.name / "A1" / ".." / "A2", "all")) is CvpppDataset


def test_the_split_is_by_hash(root):
    train, validation = CvpppDataset(root, "train").names, CvpppDataset(root, "validation").names
    assert validation and sorted(train + validation) == CvpppDataset(root, "all").names


def test_filters(root):
    assert len(CvpppDataset(root, max_instances=3)) == 6
    assert len(CvpppDataset(root, size=(12, 10))) == 12 and len(CvpppDataset(root, size=(10, 12))) == 0


def test_any_other_folder_of_pairs_is_a_plain_one(root):
    (root / "A1").rename(root / "plants")
    assert type(open_dataset(root / "plants")) is FolderDataset


def test_bad_files_are_named(root, save_palette):
    (root / "A1/plant001_label.png").unlink()
    save_palette(root / "A2/plant001_label.png", np.ones((10, 12)))
    (root / "A4/plant001_rgb.png").write_bytes(b"\x89PNG")
    dataset = CvpppDataset(root)
    for index, message in (
        (0, "A1/plant001_rgb.png: image without masks"),
        (4, "A2/plant001_label.png: label map is 12x10 pixels, its image 10x12"),
        (8, "A4/plant001_rgb.png: not an image"),
    ):
        with pytest.raises(InputError, match=message):
            dataset[index]
    assert dataset[1].count == 3


def test_nothing_there(tmp_path):
    (tmp_path / "A1").mkdir()
    with pytest.raises(InputError, match="no images found"):
        open_dataset(tmp_path)


def test_leaves_have_no_classes(root):
    with pytest.raises(InputError, match="data_class: .* has no classes to choose 'person' from"):
        open_dataset(root, data_class="person")
