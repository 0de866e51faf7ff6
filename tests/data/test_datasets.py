"""Data sets, on small files written here; and on the real zip where there is one."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastris.data import (
    VOID,
    FolderDataset,
    LeavesDataset,
    NucleiDataset,
    in_validation,
    open_dataset,
)
from fastris.errors import InputError

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("FASTRIS_DSB2018", ROOT.parent / "shared/data/dsb2018/stage1_train.zip"))
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"DSB2018 not at {REAL}; set FASTRIS_DSB2018")


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(height: int = 16, width: int = 20, channels: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def mask(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (16, 20)) -> np.ndarray:
    """255 inside the boxes (top, bottom, left, right)."""
    out = np.zeros(shape, np.uint8)
    for top, bottom, left, right in boxes:
        out[top:bottom, left:right] = 255
    return out


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    """Three images in Kaggle's layout: two nuclei that overlap and an empty mask; one; one in 24x24."""
    root = tmp_path / "nuclei"
    save(root / "a/images/a.png", noise(seed=1))
    save(root / "a/masks/m1.png", mask((2, 8, 2, 8)))
    save(root / "a/masks/m2.png", mask((5, 12, 5, 12)))
    save(root / "a/masks/m3.png", mask())
    save(root / "b/images/b.png", noise(seed=2))
    save(root / "b/masks/m.png", mask((0, 16, 0, 20)))
    save(root / "c/images/c.png", noise(24, 24))
    save(root / "c/masks/m.png", mask((3, 4, 5, 6), shape=(24, 24)))
    return root


def zipped(root: Path, prefix: str = "") -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve images and label maps as CVPPP names them, with 0 to 11 instances."""
    root = tmp_path / "pairs"
    for index in range(12):
        labels = np.zeros((16, 20), np.uint8)
        labels[0, :index] = np.arange(index) + 1
        save(root / f"plant{index:03d}_rgb.png", noise(channels=3, seed=index))
        save(root / f"plant{index:03d}_label.png", labels)
    return root


class TestSplit:
    def test_is_the_hash_of_the_id(self):
        for name in ("a", "b", "00071198d059ba7f5914a526d124d28e6d010c92466da21d4a04cd5413362552"):
            share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
            assert in_validation(name, 0.1) == (share < 0.1)
            assert in_validation(name, share + 1e-6)
            assert not in_validation(name, share)

    def test_holds_out_about_a_tenth(self):
        assert 0.08 < np.mean([in_validation(str(index)) for index in range(5000)]) < 0.12

    @pytest.mark.parametrize("count", [2, 3, 12, 100])
    def test_parts_are_disjoint_complete_and_not_empty(self, tmp_path, count):
        for index in range(count):
            save(tmp_path / f"x{index}_rgb.png", noise(2, 2, 3))
            save(tmp_path / f"x{index}_label.png", np.ones((2, 2), np.uint8))
        train, validation, everything = (
            FolderDataset(tmp_path, split).names for split in ("train", "validation", "all")
        )
        assert train
        assert validation
        assert sorted(train + validation) == everything

    def test_of_one_image_is_one_part(self, tmp_path):
        save(tmp_path / "x_rgb.png", noise(2, 2, 3))
        assert len(FolderDataset(tmp_path, "train")) + len(FolderDataset(tmp_path, "validation")) == 1

    @pytest.mark.parametrize("dataset", [NucleiDataset, FolderDataset])
    def test_unknown(self, dataset, tmp_path):
        with pytest.raises(InputError, match="split: expected one of train, validation, all, got 'test'"):
            dataset(tmp_path, "test")


class TestNuclei:
    @pytest.mark.parametrize("form", ["directory", "zip", "zip with a folder"])
    @pytest.mark.parametrize("cache", [True, False])
    def test_masks_become_one_label_map(self, nuclei, form, cache):
        root = {"directory": nuclei}.get(form) or zipped(nuclei, "" if form == "zip" else "stage1_train/")
        dataset = NucleiDataset(root, "all", cache=cache)
        assert dataset.names == ["a", "b", "c"]
        for _ in range(2):  # the second time from the cache
            sample = dataset[0]
            assert sample.name == "a"
            assert sample.image.dtype == torch.uint8
            assert sample.labels.dtype == torch.int32
            assert np.array_equal(sample.image.numpy().transpose(1, 2, 0), noise(seed=1)[..., :3])
            expected = np.zeros((16, 20), np.int32)
            expected[5:12, 5:12] = 2
            expected[2:8, 2:8] = 1  # the first keeps the overlap; the empty third is dropped
            assert np.array_equal(sample.labels.numpy(), expected)
        assert [sample.count for sample in dataset] == [2, 1, 1]
        assert dataset[-1].name == "c"
        with pytest.raises(IndexError):
            dataset[3]

    def test_filters(self, nuclei):
        assert NucleiDataset(nuclei, "all", max_instances=1).names == ["b", "c"]
        assert NucleiDataset(nuclei, "all", size=(16, 20)).names == ["a", "b"]

    def test_grey_images_come_back_from_the_cache(self, nuclei):
        grey = np.repeat(noise(channels=1), 3, axis=2)
        save(nuclei / "a/images/a.png", grey)
        dataset = NucleiDataset(nuclei, "all")
        dataset.preload()
        assert np.array_equal(dataset[0].image.numpy().transpose(1, 2, 0), grey)
        dataset[0].image.zero_()  # a caller's change stays the caller's
        assert np.array_equal(dataset[0].image.numpy().transpose(1, 2, 0), grey)

    def test_a_callers_change_stays_the_callers(self, nuclei):
        dataset = NucleiDataset(nuclei, "all")
        for _ in range(3):  # decoded, then from the cache
            sample = dataset[0]
            assert np.array_equal(sample.image.numpy().transpose(1, 2, 0), noise(seed=1)[..., :3])
            assert sample.count == 2
            sample.image.zero_()
            sample.labels.zero_()

    def test_the_cache_has_a_limit(self, pairs, monkeypatch):
        decoded = []
        read = FolderDataset._read
        monkeypatch.setattr(FolderDataset, "_read", lambda self, index: decoded.append(index) or read(self, index))
        of_one = 16 * 20 * 4  # bytes: three colours and a label
        for cache, kept in ((False, 0), (of_one - 1, 0), (of_one, 1), (5 * of_one + 3, 5), (True, 12)):
            dataset = FolderDataset(pairs, cache=cache)
            for _ in range(2):
                assert [sample.count for sample in dataset] == list(range(12))
            assert decoded == [*range(12), *range(kept, 12)]
            decoded.clear()

    def test_preload_stops_where_the_cache_is_full(self, pairs):
        of_one = 16 * 20 * 4
        (pairs / "plant004_rgb.png").write_bytes(b"x")
        FolderDataset(pairs, cache=False).preload()
        FolderDataset(pairs, cache=3 * of_one).preload()  # looks at the fourth, to see that it is too large
        with pytest.raises(InputError, match="plant004_rgb"):
            FolderDataset(pairs, cache=4 * of_one + 1).preload()

    def test_void_comes_back_from_the_cache(self, tmp_path):
        labels = np.tile(np.arange(256, dtype=np.uint8), (2, 1))  # 254 instances, background and void
        image = Image.fromarray(labels, "P")
        image.putpalette(bytes(range(256)) * 3)
        image.save(tmp_path / "x_label.png")
        save(tmp_path / "x_rgb.png", noise(2, 256, 3))
        dataset = FolderDataset(tmp_path)
        first, second = dataset[0], dataset[0]
        assert first.labels[0].tolist() == [*range(255), VOID]
        assert torch.equal(first.labels, second.labels)

    def test_pickles_for_workers(self, nuclei):
        dataset = pickle.loads(pickle.dumps(NucleiDataset(zipped(nuclei), "all")))
        assert dataset[0].count == 2

    def test_hidden_files_and_resource_forks_are_ignored(self, nuclei):
        save(nuclei / "__MACOSX/a/images/x.png", noise())
        (nuclei / "a/images/.DS_Store").write_bytes(b"x")
        assert NucleiDataset(zipped(nuclei), "all").names == ["a", "b", "c"]
        assert NucleiDataset(nuclei, "all").names == ["a", "b", "c"]

    def test_preload_reads_all(self, nuclei):
        dataset = NucleiDataset(nuclei, "all")
        dataset.preload()
        (nuclei / "a/images/a.png").unlink()
        assert dataset[0].count == 2


@pytest.mark.parametrize("pack", [lambda root: root, zipped], ids=["directory", "zip"])
class TestNucleiBadInput:
    """Each broken file is named, in one line, when it is asked for; the others still load."""

    def expect(self, root: Path, file: str, message: str) -> None:
        dataset = NucleiDataset(root, "all")
        with pytest.raises(InputError, match=message) as caught:
            dataset[0]
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
        assert dataset[1].count == 1
        with pytest.raises(InputError, match=message):
            dataset.preload()

    def test_truncated_image(self, nuclei, pack):
        path = nuclei / "a/images/a.png"
        path.write_bytes(path.read_bytes()[:200])
        self.expect(pack(nuclei), "a/images/a.png", "cannot read|truncated")

    def test_corrupt_mask(self, nuclei, pack):
        (nuclei / "a/masks/m2.png").write_bytes(b"not a png")
        self.expect(pack(nuclei), "a/masks/m2.png", "cannot|not an image")

    def test_empty_mask_file(self, nuclei, pack):
        (nuclei / "a/masks/m2.png").write_bytes(b"")
        self.expect(pack(nuclei), "a/masks/m2.png", "cannot|not an image")

    def test_mask_of_another_size(self, nuclei, pack):
        save(nuclei / "a/masks/m2.png", mask(shape=(16, 21)))
        self.expect(pack(nuclei), "a/masks/m2.png", "21x16 pixels for an image of 20x16")

    def test_image_without_masks(self, nuclei, pack):
        for path in (nuclei / "a/masks").iterdir():
            path.unlink()
        self.expect(pack(nuclei), "a/images/a.png", "image without masks")

    def test_empty(self, tmp_path, pack):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"empty.*no images found; expected <id>/images/<id>\.png"):
            NucleiDataset(pack(tmp_path / "empty"))


class TestNucleiFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"nowhere\.zip: no such file"):
            NucleiDataset(tmp_path / "nowhere.zip")

    def test_damaged_zip(self, nuclei):
        path = zipped(nuclei)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(InputError, match=r"nuclei\.zip: cannot open zip"):
            NucleiDataset(path)

    def test_damaged_member(self, nuclei):
        path = zipped(nuclei)
        content = bytearray(path.read_bytes())
        start = content.index((nuclei / "a/images/a.png").read_bytes())
        content[start + 100] ^= 255
        path.write_bytes(content)
        dataset = NucleiDataset(path, "all")
        with pytest.raises(InputError, match=r"nuclei\.zip:a/images/a\.png: cannot read"):
            dataset[0]
        assert dataset[1].count == 1

    @pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGBA", "P"])
    def test_mask_modes(self, nuclei, mode):
        pixels = mask((1, 5, 1, 5))
        if mode == "I;16":
            Image.fromarray((pixels > 0).astype(np.uint16) * 300).save(nuclei / "b/masks/m.png")
        else:
            Image.fromarray(pixels).convert(mode).save(nuclei / "b/masks/m.png")
        assert np.array_equal(NucleiDataset(nuclei, "all")[1].labels.numpy() > 0, pixels > 0)

    def test_sixteen_bit_image(self, nuclei):
        deep = np.linspace(1000, 3000, 320).reshape(16, 20).astype(np.uint16)
        save(nuclei / "a/images/a.png", deep)
        image = NucleiDataset(nuclei, "all")[0].image
        assert (int(image.min()), int(image.max())) == (0, 255)
        with pytest.raises(InputError, match=r"a\.png: expected 8 bits a channel"):
            NucleiDataset(zipped(nuclei), "all")[0]


class TestFolder:
    def test_pairs(self, pairs):
        dataset = FolderDataset(pairs)
        assert dataset.names == [f"plant{index:03d}" for index in range(12)]
        assert [sample.count for sample in dataset] == list(range(12))
        assert np.array_equal(dataset[3].image.numpy().transpose(1, 2, 0), noise(channels=3, seed=3))

    def test_subfolders(self, tmp_path):
        save(tmp_path / "images/one.tif", noise(channels=3))
        save(tmp_path / "labels/one.png", np.full((16, 20), 9, np.uint8))
        save(tmp_path / "images/two.PNG", noise(channels=3))
        save(tmp_path / "labels/two.tif", np.full((16, 20), 900, np.uint16))
        dataset = FolderDataset(tmp_path)
        assert dataset.names == ["one", "two"]
        assert [sample.count for sample in dataset] == [1, 1]

    def test_filters(self, pairs):
        save(pairs / "plant001_rgb.png", noise(8, 8, 3))
        save(pairs / "plant001_label.png", np.ones((8, 8), np.uint8))
        assert FolderDataset(pairs, max_instances=2).names == ["plant000", "plant001", "plant002"]
        small = FolderDataset(pairs, size=(8, 8))
        assert small.names == ["plant001"]
        assert small[0].size == (8, 8)

    def test_gaps_in_ids_are_closed(self, tmp_path):
        save(tmp_path / "x_rgb.png", noise(2, 2, 3))
        save(tmp_path / "x_label.png", np.array([[0, 200], [7, 200]], np.uint8))
        assert FolderDataset(tmp_path)[0].labels.tolist() == [[0, 1], [2, 1]]

    def test_colour_labels(self, tmp_path):
        save(tmp_path / "x_rgb.png", noise(1, 3, 3))
        save(tmp_path / "x_label.png", np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0]]], np.uint8))
        assert FolderDataset(tmp_path)[0].labels.tolist() == [[0, 1, 2]]

    @pytest.mark.parametrize(
        "image",
        [
            noise(channels=1)[..., 0],
            noise(channels=3),
            noise(channels=4),
            noise(channels=1)[..., 0].astype(np.uint16) * 256,
        ],
        ids=["grey", "RGB", "RGBA", "16-bit"],
    )
    def test_kinds_of_image(self, tmp_path, image):
        save(tmp_path / "x_rgb.png", image)
        save(tmp_path / "x_label.png", np.ones((16, 20), np.uint8))
        sample = FolderDataset(tmp_path)[0]
        assert sample.image.shape == (3, 16, 20)
        assert sample.image.dtype == torch.uint8

    @pytest.mark.filterwarnings("error")
    def test_one_pixel(self, tmp_path):
        save(tmp_path / "x_rgb.png", noise(1, 1, 3))
        save(tmp_path / "x_label.png", np.ones((1, 1), np.uint8))
        assert FolderDataset(tmp_path)[0].labels.tolist() == [[1]]

    @pytest.mark.parametrize(
        ("break_it", "file", "message"),
        [
            (lambda root: (root / "plant000_label.png").unlink(), "plant000_rgb.png", "without masks"),
            (
                lambda root: save(root / "plant000_label.png", np.zeros((4, 4), np.uint8)),
                "plant000_label.png",
                "4x4 pixels, its image 20x16",
            ),
            (lambda root: (root / "plant000_rgb.png").write_bytes(b"x"), "plant000_rgb.png", "not an image"),
            (
                lambda root: (root / "plant000_rgb.png").write_bytes((root / "plant000_rgb.png").read_bytes()[:300]),
                "plant000_rgb.png",
                "cannot read",
            ),
        ],
        ids=["no label map", "another size", "corrupt", "truncated"],
    )
    def test_bad_files_are_named_and_the_others_load(self, pairs, break_it, file, message):
        break_it(pairs)
        for dataset in (FolderDataset(pairs), FolderDataset(pairs, max_instances=3)):
            with pytest.raises(InputError, match=message) as caught:
                dataset[0]
            assert file in str(caught.value)
            assert "\n" not in str(caught.value)
            assert dataset[1].count == 1

    def test_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"no images found; expected <name>_rgb\.png"):
            FolderDataset(tmp_path)

    def test_missing_folder_and_file(self, tmp_path):
        with pytest.raises(InputError, match="nowhere: no such folder"):
            FolderDataset(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="file: not a folder"):
            FolderDataset(tmp_path / "file")


class TestLeaves:
    def test_depend_on_seed_and_index_only(self):
        short, long = LeavesDataset(3), LeavesDataset(10)
        list(long)
        for index in (2, 0, 1):
            assert torch.equal(short[index].image, long[index].image)
            assert torch.equal(short[index].labels, long[index].labels)
        assert not torch.equal(LeavesDataset(1, seed=1)[0].image, short[0].image)
        assert not torch.equal(LeavesDataset(1, split="validation")[0].image, short[0].image)
        assert not torch.equal(short[0].image, short[1].image)

    def test_counts_span_the_range_and_masks_are_exact(self):
        dataset = LeavesDataset(60, size=64, num_leaves=(2, 6))
        assert {sample.count for sample in dataset} == {2, 3, 4, 5, 6}
        for sample in dataset:
            areas = np.bincount(sample.labels.numpy().ravel(), minlength=sample.count + 1)
            assert (areas[1:] >= 8).all()
            leaves, soil = (sample.image[1][sample.labels.bool() == inside].float() for inside in (True, False))
            assert leaves.mean() > soil.mean() + 20  # green there and only there

    def test_leaves_overlap(self):
        touching = 0
        for sample in LeavesDataset(20):
            left, right = sample.labels[:, :-1], sample.labels[:, 1:]
            touching += int(((left != right) & (left > 0) & (right > 0)).any())
        assert touching > 15

    def test_max_instances(self):
        assert max(sample.count for sample in LeavesDataset(20, max_instances=4)) <= 4
        assert {sample.count for sample in LeavesDataset(5, max_instances=1)} == {1}

    @pytest.mark.parametrize(
        "arguments",
        [{"length": 0}, {"size": 8}, {"num_leaves": (5, 3)}, {"num_leaves": (0, 3)}, {"size": (64, 32)}],
    )
    def test_wrong_arguments(self, arguments):
        with pytest.raises(InputError, match="LeavesDataset"):
            LeavesDataset(**arguments)


class TestOpen:
    def test_each_kind(self, nuclei, pairs):
        assert isinstance(open_dataset(nuclei, "all"), NucleiDataset)
        assert isinstance(open_dataset(str(zipped(nuclei)), "all"), NucleiDataset)
        assert isinstance(open_dataset(pairs, "all"), FolderDataset)
        assert len(open_dataset(pairs, "all", max_instances=3, size=None, cache=False)) == 4
        assert len(open_dataset("leaves")) == 100
        assert len(open_dataset("leaves:7", split="validation", max_instances=3, size=None)) == 7
        assert open_dataset("leaves:2", size=32, seed=4)[0].size == (32, 32)

    def test_a_class_of_data_without_classes(self, nuclei, pairs):
        for path in (nuclei, pairs, "leaves"):
            with pytest.raises(InputError, match="data_class: .* has no classes to choose 'person' from"):
                open_dataset(path, data_class="person")

    @pytest.mark.parametrize("name", ["leaves:x", "leaves:0", "leaves:-1", "trees", "no/such.zip"])
    def test_unknown_names_say_what_is_expected(self, name):
        with pytest.raises(InputError, match="expected 'leaves' or 'leaves:N'") as caught:
            open_dataset(name)
        assert str(caught.value).startswith(name)

    def test_other_files(self, tmp_path):
        save(tmp_path / "image.png", noise())
        with pytest.raises(InputError, match=r"image\.png: not a data set"):
            open_dataset(tmp_path / "image.png")

    def test_split(self, tmp_path):
        with pytest.raises(InputError, match="split"):
            open_dataset("leaves", split="test")


@pytest.mark.data
@needs_real
class TestRealNuclei:
    def test_images_and_splits(self):
        everything = NucleiDataset(REAL, "all")
        train, validation = NucleiDataset(REAL, "train"), NucleiDataset(REAL, "validation")
        assert len(everything) == 664
        assert set(train.names) | set(validation.names) == set(everything.names)
        assert not set(train.names) & set(validation.names)
        assert all(in_validation(name) for name in validation.names)
        assert len(NucleiDataset(REAL, "all", max_instances=20)) == 236
        assert len(NucleiDataset(REAL, "all", max_instances=20, size=(256, 256))) == 157

    def test_labels_are_the_masks(self):
        dataset = NucleiDataset(REAL, "validation", max_instances=20)
        assert len(dataset) > 10
        for sample in list(dataset)[:10]:
            assert 1 <= sample.count <= 20
            files = [path for path in dataset.files.list() if f"{sample.name}/masks/" in path]
            assert sample.count <= len(files)


class TestShippedSamples:
    samples = ROOT / "fastris/samples"

    def test_are_held_out_small_and_readable(self):
        dataset = FolderDataset(self.samples, "all", max_instances=20)
        assert len(dataset) == 6
        assert all(4 <= sample.count <= 20 for sample in dataset)
        assert sum(path.stat().st_size for path in self.samples.iterdir()) < 600_000
        ids = [line.split("`")[1] for line in (self.samples / "README.md").read_text("utf-8").splitlines()[-6:]]
        assert all(in_validation(name) for name in ids)
        assert sorted(name[:8] for name in ids) == dataset.names

    @pytest.mark.data
    @needs_real
    def test_are_what_the_zip_holds(self):
        real = NucleiDataset(REAL, "validation")
        names = [name[:8] for name in real.names]
        for sample in FolderDataset(self.samples):
            original = real[names.index(sample.name)]
            assert torch.equal(sample.image, original.image)
            assert torch.equal(sample.labels, original.labels)
