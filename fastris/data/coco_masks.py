"""COCO's three ways to write a mask: polygons, run lengths, and run lengths as a string."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask, bool (H, W), of an annotation's ``segmentation``.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, …], or a dict with ``size`` (H, W) and ``counts``, run
            lengths of 0 and 1 in turn down the columns, as a list or compressed to a string.
        height, width: of the image.

    Raises:
        ValueError: nothing of the kind, or not of this size; the message says what is wrong.
        InputError: polygons, and pycocotools is not installed.
    """
    if isinstance(segmentation, list):
        return _fill_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("a segmentation must be polygons or run lengths with 'counts'")
    if list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"run lengths of size {segmentation.get('size')} for an image of {[height, width]}")
    counts = segmentation["counts"]
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths must be whole numbers from 0")
    if sum(runs) != height * width:  # pycocotools leaves what the runs do not reach to chance
        raise ValueError(f"run lengths of {sum(runs)} pixels for an image of {height * width}")
    return _expand(runs, height, width)


def _expand(runs: list[int], height: int, width: int) -> np.ndarray:
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """Run lengths from COCO's string: 5 bits a character from "0", bit 5 for more to come; the fourth and later runs
    are differences from the run two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths with the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths that are cut short")
    return runs


def _fill_polygons(polygons: list[Any], height: int, width: int) -> np.ndarray:
    from fastris.instances import require_pycocotools

    coder = require_pycocotools()
    outlines = []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon must be a list of three or more pairs of numbers")
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        side = max(height, width)
        if not (np.abs(points) <= 2 * side).all():  # pycocotools walks along every edge, wherever it leads
            raise ValueError(f"a polygon far outside the image of {height}x{width}")
        outlines.append(points.reshape(-1).tolist())
    if not outlines:
        raise ValueError("a segmentation without polygons")
    union = coder.merge(coder.frPyObjects(outlines, height, width))
    return _expand(_decompress(union["counts"].decode("ascii")), height, width)
