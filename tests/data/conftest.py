"""Writers of small image files in the formats of the data sets, by Pillow alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def voc_palette() -> bytes:
    """VOC's 256 colours: bits 0, 1, 2 of the index to red, green, blue from the top bit down, then bits 3, 4, 5 …"""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colours[index, channel] |= (index >> 3 * bit + channel & 1) << 7 - bit if 3 * bit + channel < 8 else 0
    return colours.tobytes()


@pytest.fixture
def save_image() -> Callable[..., np.ndarray]:
    """Write a random RGB image of (H, W) in the format of the suffix; returns its pixels."""

    def save(path: Path, height: int, width: int) -> np.ndarray:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return pixels

    return save


@pytest.fixture
def save_palette() -> Callable[..., Path]:
    """Write indices (H, W) as a palette PNG in VOC's colours."""

    def save(path: Path, indices: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(indices, np.uint8), "P")
        image.putpalette(voc_palette())
        image.save(path)
        return path

    return save


@pytest.fixture
def save_grey() -> Callable[..., Path]:
    """Write values (H, W) as a 16-bit grey PNG."""

    def save(path: Path, values: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(values, np.uint16)).save(path)
        return path

    return save
