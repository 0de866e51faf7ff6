"""Whatever a user calls an image becomes the same tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastris import InputError
from fastris.nn.inputs import as_images

GREY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7 + 3
RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = np.dstack([RGB, GREY])


def one(image: Any) -> np.ndarray:
    """The tensor as (H, W, 3)."""
    (tensor,), (name,), single = as_images(image)
    assert single and tensor.dtype == torch.float32 and tensor.shape[0] == 3
    assert name == (str(image) if isinstance(image, (str, Path)) else "")
    return tensor.detach().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        ALPHA,
        RGB[::-1, ::-1][::-1, ::-1],
        np.asfortranarray(RGB),
        (RGB / 255).astype(np.float32),
        RGB / 255,
        (RGB / 255).astype(np.longdouble),
        (RGB / 255).astype(">f4"),
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(ALPHA).permute(2, 0, 1),
        torch.from_numpy(RGB / 255).permute(2, 0, 1).requires_grad_(),
        Image.fromarray(RGB),
        Image.fromarray(ALPHA),
    ],
)
def test_colour_images(image: Any) -> None:
    np.testing.assert_allclose(one(image), RGB / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "image",
    [GREY, GREY[:, :, None], GREY / 255, torch.from_numpy(GREY), torch.from_numpy(GREY)[None], Image.fromarray(GREY)],
)
def test_grey_images_have_three_equal_channels(image: Any) -> None:
    np.testing.assert_allclose(one(image), np.dstack([GREY / 255] * 3), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_other_integers_are_stretched_over_the_whole_range(dtype: Any, channels: int) -> None:
    values = np.arange(4 * 6 * channels).reshape(4, 6, channels).astype(dtype) * 300
    kept = values[:, :, :3].astype(np.int64)
    expected = np.broadcast_to(np.round((kept - kept.min()) * 255 / np.ptp(kept)), (4, 6, 3)) / 255
    np.testing.assert_allclose(one(values), expected, rtol=1e-6)
    native = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    np.testing.assert_allclose(one(native.permute(2, 0, 1)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors(dtype: torch.dtype) -> None:
    image = (torch.from_numpy(RGB).permute(2, 0, 1) / 256).to(dtype)
    np.testing.assert_array_equal(one(image), image.float().permute(1, 2, 0))


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
DEEP_MODES = ["I", "F", "I;16", "I;16B", "I;16L"]
VIA = {"La": "LA", "RGBa": "RGBA", "HSV": "RGB"}  # where Pillow has no direct way from grey


@pytest.mark.parametrize("mode", MODES + DEEP_MODES)
def test_pil_images_of_every_mode(tmp_path: Path, mode: str) -> None:
    grey = np.zeros((5, 7), np.uint8)
    grey[1, 2] = 255
    image = Image.fromarray(grey).convert(VIA.get(mode, "L")).convert(mode)
    assert image.mode == mode
    level = 1.01 / 255 if mode == "LAB" else 1e-6  # LAB in 8 bits has no black and white of its own
    np.testing.assert_allclose(one(image), np.dstack([grey / 255] * 3), atol=level)
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):  # those that PNG has
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(one(tmp_path / "a.png"), one(image))
        np.testing.assert_array_equal(one(str(tmp_path / "a.png")), one(image))


def test_lists_and_batches_give_lists() -> None:
    images, names, single = as_images([RGB, Image.fromarray(GREY), (torch.from_numpy(GREY),)])
    assert len(images) == len(names) == 3 and not single
    images, names, single = as_images(torch.zeros(2, 1, 5, 7))
    assert [image.shape for image in images] == [(3, 5, 7)] * 2 and names == ["", ""] and not single
    assert as_images([]) == ([], [], False)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "expected a path, array, tensor or PIL image, or a list of them, got NoneType"),
        (3, "got int"),
        ([RGB, 0.5], "got float"),
        (b"a.png", "got bytes"),
        (RGB > 3, "got bool"),
        (torch.from_numpy(RGB > 3).permute(2, 0, 1), "got torch.bool"),
        (RGB.astype(np.complex64), "got complex64"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "got torch.complex64"),
        (np.array([["a"]]), "got <U1"),
        (np.zeros(4), r"an array \(H, W\) or \(H, W, C\) .* got shape \(4,\)"),
        (np.zeros((3, 8, 9)), r"got shape \(3, 8, 9\)"),
        (np.zeros((2, 8, 9, 3)), r"got shape \(2, 8, 9, 3\)"),
        (np.zeros((0, 9, 3)), r"got shape \(0, 9, 3\)"),
        (torch.zeros(8, 9, 3), r"a tensor .* got shape \(8, 9, 3\)"),
        (torch.zeros(1, 2, 8, 9), r"got shape \(2, 8, 9\)"),
        (torch.zeros(3, 0, 9), r"got shape \(3, 0, 9\)"),
        (np.full((4, 4), np.nan), "finite"),
        (torch.full((3, 4, 4), torch.inf), "finite"),
        (np.full((4, 4), 1e300), "finite"),
    ],
)
def test_anything_else_is_named(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"image: .*{message}"):
        as_images(image)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing.png: no such file"):
        as_images(tmp_path / "nothing.png")
