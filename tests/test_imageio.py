"""Every kind of image file is read or refused with one line that names it; files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastris.errors import InputError
from fastris.imageio import (
    VOID,
    atomic_write,
    make_output_directory,
    read_image,
    read_indices,
    read_label_map,
    write_image,
    write_label_map,
)

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)
COLOUR = np.stack([GREY, GREY + 50, GREY + 100], axis=2)


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_colour_is_read_as_it_is(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOUR)), COLOUR)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", GREY))
    assert image.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(image[:, :, channel], GREY)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.dstack([COLOUR, np.zeros_like(GREY)])  # wholly transparent
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), COLOUR)
    grey_alpha = np.dstack([GREY, np.zeros_like(GREY)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", grey_alpha))[:, :, 1], GREY)


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 255, 128])])
def test_a_palette_becomes_its_colours(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.fromarray(GREY % 4, mode=None).convert("L")
    palette = Image.fromarray(np.asarray(image)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected[np.asarray(palette)])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_stretched_over_the_range_in_use(tmp_path: Path, name: str) -> None:
    image = read_image(save(tmp_path / name, 1000 + 10 * GREY.astype(np.uint16)))
    assert image.shape == (6, 8, 3)
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image[:, :, 0].ravel().astype(int)) > 0).all()


def test_floating_values_with_a_nan_and_a_constant_image_are_read(tmp_path: Path) -> None:
    values = GREY.astype(np.float32) / 47
    values[0, 0] = np.nan
    assert read_image(save(tmp_path / "a.tif", values)).max() == 255
    assert read_image(save(tmp_path / "b.png", np.full((2, 2), 700, np.uint16))).max() == 0


def test_one_pixel(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.png", COLOUR[:1, :1])).shape == (1, 1, 3)


@pytest.mark.parametrize("keep", [0, 4, 30, 0.5, 0.97])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = save(tmp_path / "whole.png", noise).read_bytes()
    cut = tmp_path / "cut.png"
    cut.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    for read in (read_image, read_label_map):
        with pytest.raises(InputError, match="cut.png") as caught:
            read(cut)
        assert "\n" not in str(caught.value)


def test_flipped_bytes_are_refused_by_name(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = bytearray(save(tmp_path / "bad.png", noise).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(InputError, match="bad.png"):
        read_image(tmp_path / "bad.png")


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for path in (tmp_path / "text.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            read_image(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_grey_label_maps_hold_the_ids(tmp_path: Path, dtype: type) -> None:
    ids = GREY.astype(dtype) * (1 if dtype is np.uint8 else 500)
    labels = read_label_map(save(tmp_path / "a.tif", ids))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, ids)


def test_palette_label_maps_hold_the_indices(tmp_path: Path) -> None:
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    indices = np.asarray(image)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), indices)


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_index_255_of_a_palette_is_void(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.array([[0, 1], [254, 255]], np.uint8), "P")
    image.putpalette(bytes(range(256)) * 3)
    image.convert(mode).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.tif"), [[0, 1], [254, VOID]])
    grey = save(tmp_path / "b.png", np.array([[0, 255]], np.uint8))
    np.testing.assert_array_equal(read_label_map(grey), [[0, 255]])


def test_indices_are_what_the_file_holds(tmp_path: Path) -> None:
    values = np.array([[0, 7], [24003, 65535]], np.uint16)
    np.testing.assert_array_equal(read_indices(save(tmp_path / "a.png", values)), values)
    palette = Image.fromarray(np.array([[0, 255]], np.uint8), "P")
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_indices(tmp_path / "b.png"), [[0, 255]])
    with pytest.raises(InputError, match=r"c\.png: expected a grey or palette image, got one of mode RGB"):
        read_indices(save(tmp_path / "c.png", np.zeros((2, 2, 3), np.uint8)))


def test_in_colour_label_maps_each_colour_is_an_instance(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 2], [2, 3, 0]])
    colours = np.array([[0, 0, 0], [0, 0, 200], [0, 9, 0], [255, 0, 0]], np.uint8)
    np.testing.assert_array_equal(read_label_map(save(tmp_path / "a.png", colours[ids])), ids)
    without_background = colours[np.array([[1, 3]])]
    np.testing.assert_array_equal(read_label_map(save(tmp_path / "b.png", without_background)), [[1, 2]])


def test_fractions_and_negative_ids_are_refused(tmp_path: Path) -> None:
    for name, values in (("f.tif", np.float32([[0.5]])), ("n.tif", np.int32([[-1]]))):
        with pytest.raises(InputError, match=name):
            read_label_map(save(tmp_path / name, values))


def test_label_maps_come_back(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [300, 65535]], np.int32)
    write_label_map(tmp_path / "a.png", labels)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I;16")
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png"), labels)
    with pytest.raises(InputError, match="65536"):
        write_label_map(tmp_path / "a.png", labels + 1)
    with pytest.raises(InputError, match="float"):
        write_label_map(tmp_path / "a.png", labels / 2)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="file"):
        write_image(blocked / "a.png", COLOUR)
    with pytest.raises(InputError, match="sub"):
        make_output_directory(blocked / "sub")
    (tmp_path / "directory.png").mkdir()
    with pytest.raises(InputError, match="directory.png"):
        write_image(tmp_path / "directory.png", COLOUR)


def test_a_photograph_is_turned_as_its_exif_data_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise to see it upright
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(COLOUR, -1))
