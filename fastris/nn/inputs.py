"""Whatever a user calls an image, as a tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastris.errors import InputError


def as_images(image: Any) -> tuple[list[Tensor], list[str], bool]:
    """Whatever a user calls an image, or a list or batch of them, as (3, H, W) tensors in [0, 1].

    Args:
        image: a path; a PIL image of any mode; an array (H, W) or (H, W, C); a tensor (H, W), (C, H, W) or
            (B, C, H, W); or a list of these. C is 1, 3, or 4, of which the alpha is dropped. Values are uint8, floating
            in [0, 1], or other integers, which are stretched from their minimum … maximum as those of 16-bit files are.

    Returns:
        ``(images, names, single)``: fp32 tensors, a name for each (the path, or ""), and whether one image was given.

    Raises:
        InputError: another type, shape or dtype, or values that are not finite.
    """
    if isinstance(image, (list, tuple)):
        images, names = [], []
        for one in image:
            more, more_names, _ = as_images(one)
            images += more
            names += more_names
        return images, names, False
    if isinstance(image, Tensor) and image.dim() == 4:
        return [_from_tensor(one) for one in image], [""] * image.shape[0], False
    if isinstance(image, Tensor):
        return [_from_tensor(image)], [""], True
    if isinstance(image, (str, os.PathLike)):
        from fastris.imageio import read_image

        return [_from_array(read_image(Path(image)))], [str(image)], True
    if isinstance(image, np.ndarray):
        return [_from_array(image)], [""], True
    if hasattr(image, "convert"):  # a PIL image, without importing Pillow to find out
        from fastris.imageio import to_rgb

        return [_from_array(to_rgb(image))], [""], True
    raise InputError(
        f"image: expected a path, array, tensor or PIL image, or a list of them, got {type(image).__name__}"
    )


def _from_tensor(image: Tensor) -> Tensor:
    channels_first = image.unsqueeze(0) if image.dim() == 2 else image
    if channels_first.dim() != 3 or channels_first.shape[0] not in (1, 3, 4) or 0 in channels_first.shape:
        raise InputError(
            "image: expected a tensor (H, W), (C, H, W) or (B, C, H, W) with 1, 3 or 4 channels, "
            f"got shape {tuple(image.shape)}"
        )
    return _rgb(channels_first)


def _from_array(image: np.ndarray) -> Tensor:
    channels_last = image[:, :, None] if image.ndim == 2 else image
    if channels_last.ndim != 3 or channels_last.shape[2] not in (1, 3, 4) or 0 in channels_last.shape:
        raise InputError(
            f"image: expected an array (H, W) or (H, W, C) with 1, 3 or 4 channels, got shape {image.shape}"
        )
    if not (np.issubdtype(image.dtype, np.integer) or np.issubdtype(image.dtype, np.floating)):
        raise InputError(f"image: expected integers, or floating values in [0, 1], got {image.dtype}")
    # torch wants the machine's byte order, no long double, forward strides and memory that it may write
    dtype = np.dtype(np.float64) if image.dtype.itemsize > 8 else image.dtype.newbyteorder("=")
    return _rgb(torch.from_numpy(np.array(channels_last.transpose(2, 0, 1), dtype, order="C")))


def _rgb(image: Tensor) -> Tensor:
    """(C, H, W) of any dtype as fp32 (3, H, W) in [0, 1]."""
    colours = image[:3].expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return colours.float() / 255
    if image.dtype == torch.bool or image.is_complex():
        raise InputError(f"image: expected integers, or floating values in [0, 1], got {image.dtype}")
    if not image.is_floating_point():
        from fastris.imageio import stretch

        return torch.from_numpy(stretch(colours.cpu().numpy())).float() / 255
    colours = colours.float()
    if not colours.isfinite().all():
        raise InputError("image: expected finite values, got NaN or infinite ones")
    return colours
