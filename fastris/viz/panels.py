"""Pictures beside each other, with captions: images, what was found, the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastris.errors import InputError
from fastris.instances import Instances
from fastris.metrics.overlap import overlap
from fastris.ops.assignment import linear_sum_assignment
from fastris.viz.drawing import FAINT, INK, PAGE, PALETTE, count_of, draw_instances, fit, pixels_and_labels, wrap, write

if TYPE_CHECKING:
    from torch import Tensor

    Found = Instances | np.ndarray | Tensor

PANEL = 400  # pixels: the longer side of each picture of a panel
FIGURE = 256  # and of a figure
NARROWEST = 176  # pixels of a column, so that captions fit
UNMATCHED = np.array((255, 255, 255), np.uint8)  # found, but assigned to no object of the ground truth
LEGEND = (
    "An object found has the colour of the ground truth object that is assigned to it, one to one, for the largest sum "
    "of IoU; white where none is."
)


def panel(
    image: Any,
    prediction: Found,
    ground_truth: Found | None = None,
    title: str = "",
    side: int = PANEL,
) -> Image.Image:
    """One row of pictures: the image, the instances in order of finding with their count, the ground truth with its.

    Args:
        image: as for :func:`overlay`.
        prediction: as for :func:`overlay`.
        ground_truth: an integer label map (H, W) or :class:`~fastris.Instances`; no third picture where None.
        title: a line above the pictures.
        side: pixels of each picture's longer side.
    """
    pixels, labels = pixels_and_labels(image, prediction)
    scale = side / max(labels.shape)
    pictures = [
        draw_instances(pixels, np.zeros_like(labels), scale),
        draw_instances(pixels, labels, scale, numbers=True),
    ]
    captions = ["image", f"found {count_of(prediction)}, in order of finding"]
    if ground_truth is not None:
        _, true_labels = pixels_and_labels(image, ground_truth)
        pictures.append(draw_instances(pixels, true_labels, scale))
        captions.append(f"ground truth {count_of(ground_truth)}")

    gap, line = 8, 20
    top = line + gap if title else gap // 2
    width = max(picture.width for picture in pictures)
    column = max(width, 160)
    height = pictures[0].height
    page = Image.new("RGB", (gap + len(pictures) * (column + gap), top + height + line + gap), PAGE)
    draw = ImageDraw.Draw(page)
    if title:
        write(draw, (gap, gap // 2), fit(title, page.width - 2 * gap, 15), 15, INK)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = gap + k * (column + gap)
        page.paste(picture, (left, top))
        write(draw, (left, top + height + 3), caption, 14, FAINT)
    return page


def contact_sheet(panels: Sequence[Image.Image], columns: int | None = None, title: str = "") -> Image.Image:
    """Panels on one page, row by row.

    Args:
        panels: pictures of any sizes, for instance from :func:`panel`.
        columns: how many beside each other; as the page comes out least oblong where None.
        title: a line above them.
    """
    if not panels:
        raise InputError("contact_sheet: expected at least one panel")
    width, height = max(one.width for one in panels), max(one.height for one in panels)
    if columns is None:
        columns = min(
            range(1, len(panels) + 1), key=lambda n: abs(np.log(n * width / (-(-len(panels) // n) * height) / 1.4))
        )
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(one.height for one in row) for row in rows]
    gap, top = 12, 44 if title else 12
    page = Image.new("RGB", (gap + columns * (width + gap), top + sum(heights) + gap * len(rows)), PAGE)
    if title:
        write(ImageDraw.Draw(page), (gap + 8, 12), fit(title, page.width - 2 * gap, 20), 20, INK)
    for row, row_height in zip(rows, heights, strict=True):
        for k, one in enumerate(row):
            page.paste(one, (gap + k * (width + gap), top))
        top += row_height + gap
    return page


class FigureRow(NamedTuple):
    """One image of a figure.

    Attributes:
        image: as for :func:`overlay`.
        network: what the network found, as for :func:`overlay`.
        ground_truth: an integer label map (H, W) or :class:`~fastris.Instances`.
        refined: what a CRF made of it, if it was asked.
        title: a line below the image.
    """

    image: Any
    network: Found
    ground_truth: Found
    refined: Found | None = None
    title: str = ""


def figure_panel(rows: Sequence[FigureRow], side: int = FIGURE) -> Image.Image:
    """The paper's Figure 4: image, network, network + CRF (where a row has it) and ground truth, an image a row.

    What was found has the colour of the ground truth instance that it is assigned to, one to one for the largest sum of
    IoU (:func:`fastris.linear_sum_assignment`), and is white where that is none, or one that it does not overlap. Near
    instances of the ground truth differ in colour. Captions count the instances, and those found with an IoU over 0.5.

    Args:
        rows: the images.
        side: pixels of each picture's longer side.

    Raises:
        InputError: no rows; an image that cannot be used, or has another size than its instances.
    """
    if not rows:
        raise InputError("figure_panel: expected at least one row")
    headings = ["image", "network", "ground truth"]
    if any(row.refined is not None for row in rows):
        headings.insert(2, "network + CRF")
    cells = [_cells(row, headings, side) for row in rows]

    gap, line = 8, 20
    column = max(NARROWEST, *(picture.width for row in cells for picture, _ in row if picture))
    width = gap + len(headings) * (column + gap)
    legend = wrap(LEGEND, width - 2 * gap, 13)
    heights = [max(picture.height for picture, _ in row if picture) + line + gap for row in cells]
    page = Image.new("RGB", (width, gap + line + sum(heights) + gap + 17 * len(legend)), PAGE)
    draw = ImageDraw.Draw(page)
    top = gap + line
    for k, heading in enumerate(headings):
        write(draw, (gap + k * (column + gap), gap - 2), heading, 15)
    for row, height in zip(cells, heights, strict=True):
        for k, (picture, caption) in enumerate(row):
            if picture:
                left = gap + k * (column + gap)
                page.paste(picture, (left, top))
                write(draw, (left, top + picture.height + 3), fit(caption, column, 13), 13, FAINT)
        top += height
    for text in legend:
        write(draw, (gap, top), text, 13, FAINT)
        top += 17
    return page


def _cells(row: FigureRow, headings: Sequence[str], side: int) -> list[tuple[Image.Image | None, str]]:
    """The picture and the caption of each column; no picture where the row has none for it."""
    pixels, true_labels = pixels_and_labels(row.image, row.ground_truth)
    scale = side / max(true_labels.shape)
    colours = spread_colours(true_labels)
    cells: list[tuple[Image.Image | None, str]] = [
        (draw_instances(pixels, np.zeros_like(true_labels), scale), row.title)
    ]
    for found in (row.network, row.refined)[: len(headings) - 2]:
        if found is None:
            cells.append((None, ""))
            continue
        _, labels = pixels_and_labels(row.image, found)
        matched, right = colours_of_matches(labels, true_labels, colours)
        cells.append((draw_instances(pixels, labels, scale, matched), f"{count_of(found)} found, {right} at IoU > 0.5"))
    cells.append((draw_instances(pixels, true_labels, scale, colours), str(count_of(row.ground_truth))))
    return cells


def spread_colours(labels: np.ndarray) -> np.ndarray:
    """A colour of the palette for each label, uint8 (labels.max() + 1, 3), such that near instances differ.

    In order of label, each takes the colour whose instances so far are the furthest, by the sum of 1 / distance².
    """
    ids, positions = np.unique(labels[labels > 0], return_inverse=True)
    rows, columns = np.nonzero(labels > 0)
    areas = np.bincount(positions)
    centres = np.stack([np.bincount(positions, axis) / areas for axis in (rows, columns)], 1)
    colours = np.zeros((int(labels.max(initial=0)) + 1, 3), np.uint8)
    chosen = np.zeros(len(ids), np.int64)
    for k, label in enumerate(ids):
        nearness = 1 / np.maximum(np.square(centres[:k] - centres[k]).sum(1), 1e-6)
        chosen[k] = np.bincount(chosen[:k], nearness, len(PALETTE)).argmin()
        colours[label] = PALETTE[chosen[k]]
    return colours


def colours_of_matches(labels: np.ndarray, true_labels: np.ndarray, true_colours: np.ndarray) -> tuple[np.ndarray, int]:
    """Colours for the labels found, each that of the true label assigned to it, and how many have an IoU over 0.5.

    Pixels that are negative in the ground truth are void and count for neither.
    """
    colours = np.tile(UNMATCHED, (int(labels.max(initial=0)) + 1, 1))
    labels, true_labels = np.where(true_labels < 0, 0, labels), np.maximum(true_labels, 0)
    iou = overlap(labels, true_labels).iou
    found, true = (np.unique(one[one > 0]) for one in (labels, true_labels))
    for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
        if iou[row, column] > 0:
            colours[found[row]] = true_colours[true[column]]
    return colours, int((iou > 0.5).sum())
