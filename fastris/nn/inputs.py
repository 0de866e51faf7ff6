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
    """A path, array, tensor, PIL image, or a list or batch of them, as (3, H, W) tensors in [0, 1].

    Returns:
        ``(images, names, single)``: fp32 tensors, a name for each (the path, or ""), and whether one image was given.
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
        return [_from_array(np.asarray(image.convert("RGB")))], [""], True
    raise InputError(f"image: expected a path, array, tensor or PIL image, got {type(image).__name__}")


def _from_tensor(image: Tensor) -> Tensor:
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise InputError(f"image: expected a (3, H, W) or (B, 3, H, W) tensor, got shape {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise InputError(f"image: expected uint8 or floating values in [0, 1], got {image.dtype}")
    return image.float()


def _from_array(image: np.ndarray) -> Tensor:
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        raise InputError(f"image: expected an (H, W), (H, W, 3) or (H, W, 4) array, got shape {image.shape}")
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"image: expected uint8 or floating values in [0, 1], got {image.dtype}")
    return _from_tensor(torch.from_numpy(np.ascontiguousarray(image[:, :, :3].transpose(2, 0, 1))))
