"""Large images by overlapping tiles: where to cut, and how the instances of the tiles become those of the image.

N = instances, of all tiles before stitching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastris.crop import Box, Crop
from fastris.errors import InputError
from fastris.instances import Instances
from fastris.ops.assignment import assignment
from fastris.ops.soft_iou import soft_iou

MIN_IOU = 0.5  # of one object seen in two tiles, where both look; above one half no instance can have two such partners
MAX_COVERED = 0.5  # the share of an instance that better seen ones of other tiles may cover
MARGIN = 2  # pixels: an instance this near to where its tile was cut may go on beyond; masks are drawn at stride 2


def check_tiling(tile: int | None, overlap: int | None, max_side: int) -> int:
    """The overlap of tiles in pixels: a quarter of the tile where not given, 0 without tiles.

    Raises:
        InputError: a tile that is not 1 … `max_side`, an overlap that is not 0 … tile − 1, or an overlap of no tiles.
    """
    if tile is None:
        if overlap is not None:
            raise InputError("overlap: only tiles overlap; give tile as well")
        return 0
    if not 1 <= tile <= max_side:
        raise InputError(f"tile: expected 1 to {max_side} pixels (the model's max_side), got {tile}")
    if overlap is None:
        return tile // 4
    if not 0 <= overlap < tile:
        raise InputError(f"overlap: expected 0 to {tile - 1} pixels for tiles of {tile}, got {overlap}")
    return overlap


def tile_boxes(size: tuple[int, int], tile: int, overlap: int) -> list[Box]:
    """The tiles of an image, row by row, all of one size: `tile` × `tile` pixels, or the image's side if that is less.

    They are spread evenly from border to border, as few as leave at least `overlap` pixels between neighbours.

    Args:
        size: (H, W) of the image in pixels.
        tile, overlap: in pixels, of which :func:`check_tiling` approves.
    """
    rows, columns = (_spans(side, tile, overlap) for side in size)
    return [Box(top, left, bottom, right) for top, bottom in rows for left, right in columns]


def _spans(side: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of the tiles along one side."""
    if side <= tile:
        return [(0, side)]
    steps = -(-(side - tile) // (tile - overlap))
    return [((side - tile) * k // steps, (side - tile) * k // steps + tile) for k in range(steps + 1)]


def stitch(boxes: Sequence[Box], found: Sequence[Instances], size: tuple[int, int]) -> Instances:
    """The instances of an image from those of its tiles.

    - Two tiles that overlap are matched by the IoU of their instances *within the overlap*, and the pairs of at least
      ``MIN_IOU`` joined, the best first. Two instances of one tile are two objects and are never joined.
    - Of what is joined, the instance farthest from where its tile was cut stands for all; where every one is cut, the
      object is their union. Its score is the highest of theirs.
    - A cut instance of which another tile shows some, yet found nothing to join, is left out.
    - An instance more than half of which is covered by better ones of other tiles is a duplicate and is left out.

    If every tile is segmented perfectly, the objects are connected, and neighbours share a pixel or more, the result
    is perfect whatever the objects' size. An object of at most ``overlap − 2 · MARGIN + 1`` pixels in height and width
    is whole in some tile, and what that tile makes of it is kept even if the tiles that cut it show it only in part;
    the outline of a larger one may be pieced together.

    Args:
        boxes: the tiles, as of :func:`tile_boxes`.
        found: the instances of each tile, in its own coordinates.
        size: (H, W) of the image in pixels.
    """
    pieces = [
        _Piece(
            crop=crop.shifted(box.top, box.left),
            score=float(score),
            tile=tile,
            clearance=_clearance(crop.box.shifted(box.top, box.left), box, size),
        )
        for tile, (box, instances) in enumerate(zip(boxes, found, strict=True))
        for crop, score in zip(instances.crops, instances.scores, strict=True)
    ]
    group = [{k} for k in range(len(pieces))]  # of each piece; members share one set
    for _, first, second in sorted(_matches(boxes, pieces), key=lambda pair: -pair[0]):
        tiles = ({pieces[k].tile for k in group[at]} for at in (first, second))
        if set.isdisjoint(*tiles):
            group[first] |= group[second]
            for k in group[second]:
                group[k] = group[first]
    objects = [
        _merge([pieces[k] for k in sorted(members)])
        for k, members in enumerate(group)
        if k == min(members) and (len(members) > 1 or not _is_refuted(pieces[k], boxes))
    ]
    objects = _without_duplicates(objects)
    return Instances([one.crop for one in objects], np.array([one.score for one in objects]), size)


class _Piece(NamedTuple):
    """An instance of one tile, in the image's coordinates."""

    crop: Crop
    score: float
    tile: int
    clearance: float  # pixels between its box and the nearest edge at which its tile was cut

    @property
    def cut(self) -> bool:
        return self.clearance < MARGIN


class _Object(NamedTuple):
    """An instance of the image."""

    crop: Crop
    score: float
    tiles: set[int]  # where its pixels are from
    cut: bool


def _clearance(box: Box, tile: Box, size: tuple[int, int]) -> float:
    inner = []
    if tile.top > 0:
        inner.append(box.top - tile.top)
    if tile.left > 0:
        inner.append(box.left - tile.left)
    if tile.bottom < size[0]:
        inner.append(tile.bottom - box.bottom)
    if tile.right < size[1]:
        inner.append(tile.right - box.right)
    return min(inner, default=np.inf)


def _matches(boxes: Sequence[Box], pieces: Sequence[_Piece]) -> Iterator[tuple[float, int, int]]:
    """(IoU, piece, piece) of the pairs that are one object to two overlapping tiles; pieces go tile by tile."""
    places = _corners([piece.crop.box for piece in pieces])
    starts = np.searchsorted([piece.tile for piece in pieces], np.arange(len(boxes) + 1))
    edges = _corners(boxes)
    for first, box in enumerate(boxes):
        for second in first + 1 + _meeting(edges[first + 1 :], box):
            shared = box & boxes[second]
            ours, theirs = (
                starts[at] + _meeting(places[starts[at] : starts[at + 1]], shared) for at in (first, int(second))
            )
            if ours.size == 0 or theirs.size == 0:
                continue
            masks, targets = (
                torch.from_numpy(np.stack([pieces[k].crop.within(shared) for k in some])) for some in (ours, theirs)
            )
            iou = soft_iou(masks.float().unsqueeze(0), targets.unsqueeze(0))[0]
            iou = iou.where(iou >= MIN_IOU, 0.0)
            columns = assignment(iou.unsqueeze(0), maximize=True).col_of_row[0]
            for row in (columns >= 0).nonzero().flatten().tolist():
                column = int(columns[row])
                if iou[row, column] > 0:
                    yield float(iou[row, column]), int(ours[row]), int(theirs[column])


def _is_refuted(piece: _Piece, boxes: Sequence[Box]) -> bool:
    """Whether an instance that was joined with no other is cut, and another tile shows some of it."""
    if not piece.cut:
        return False
    others = [boxes[k] for k in _meeting(_corners(boxes), piece.crop.box) if k != piece.tile]
    return any(piece.crop.within(piece.crop.box & other).any() for other in others)


def _merge(pieces: list[_Piece]) -> _Object:
    """One object from the pieces that are it."""
    score = max(piece.score for piece in pieces)
    best = max(pieces, key=lambda piece: piece.clearance)
    if not best.cut or len(pieces) == 1:
        return _Object(best.crop, score, {best.tile}, best.cut)
    tops, lefts, bottoms, rights = zip(*(piece.crop.box for piece in pieces), strict=True)
    box = Box(min(tops), min(lefts), max(bottoms), max(rights))
    mask = np.zeros(box.size, bool)
    for piece in pieces:
        mask[piece.crop.box.shifted(-box.top, -box.left).slices] |= piece.crop.mask
    return _Object(Crop(box, mask), score, {piece.tile for piece in pieces}, True)


def _without_duplicates(objects: list[_Object]) -> list[_Object]:
    """Whole ones first, then the more confident ones: keep an object unless those kept before cover most of it."""
    boxes = _corners([one.crop.box for one in objects])
    kept = np.zeros(len(objects), bool)
    for k in sorted(range(len(objects)), key=lambda k: (objects[k].cut, -objects[k].score)):
        one = objects[k]
        box = one.crop.box
        covered = np.zeros(box.size, bool)
        for other in _meeting(boxes, box):
            if kept[other] and objects[other].tiles.isdisjoint(one.tiles):
                covered |= objects[other].crop.within(box)
        kept[k] = np.count_nonzero(covered & one.crop.mask) <= MAX_COVERED * one.crop.area
    return [one for one, keep in zip(objects, kept, strict=True) if keep]


def _corners(boxes: Sequence[Box]) -> np.ndarray:
    """int64 (K, 4)."""
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _meeting(corners: np.ndarray, box: Box) -> np.ndarray:
    """Which of K boxes share a pixel with `box`."""
    return np.flatnonzero((corners[:, :2] < box[2:]).all(axis=1) & (corners[:, 2:] > box[:2]).all(axis=1))
