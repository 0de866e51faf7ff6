"""Pictures of instances: outlines, translucent fills and numbers in order of finding. Needs Pillow only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastris.errors import InputError
from fastris.instances import Instances

if TYPE_CHECKING:
    from torch import Tensor

# Okabe & Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
PALETTE = np.array(
    [
        (230, 159, 0),  # orange
        (86, 180, 233),  # sky blue
        (0, 158, 115),  # bluish green
        (240, 228, 66),  # yellow
        (213, 94, 0),  # vermilion
        (204, 121, 167),  # reddish purple
        (0, 114, 178),  # blue
    ],
    np.uint8,
)

SMALL = 512  # pixels: an overlay's longer side is brought to at least this, by a whole factor
LARGE = 2048  # and to at most this
PANEL = 400  # pixels: the longer side of each picture of a panel
FILL = 0.3  # opacity
PAGE, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)


def overlay(image: Any, instances: Instances | np.ndarray | Tensor, numbers: bool = True) -> Image.Image:
    """The image with every instance outlined, tinted and, if wanted, numbered in order of finding.

    A small image is enlarged by a whole factor so that numbers can be read, a very large one is reduced to 2048 pixels.

    Args:
        image: (H, W, 3) or (H, W) uint8 array, (3, H, W) tensor, PIL image or path.
        instances: :class:`~fastris.Instances`, or an integer label map (H, W) whose ids give the order.
        numbers: draw them.

    Raises:
        InputError: the image cannot be used, or has another size than the instances.
    """
    pixels, labels = _pixels_and_labels(image, instances)
    longer = max(labels.shape)
    return _draw(pixels, labels, max(1, SMALL // longer) if longer <= LARGE else LARGE / longer, numbers)


def panel(
    image: Any,
    prediction: Instances | np.ndarray | Tensor,
    ground_truth: Instances | np.ndarray | Tensor | None = None,
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
    pixels, labels = _pixels_and_labels(image, prediction)
    scale = side / max(labels.shape)
    count = len(prediction) if isinstance(prediction, Instances) else _count(labels)
    pictures = [_draw(pixels, np.zeros_like(labels), scale, False), _draw(pixels, labels, scale, True)]
    captions = ["image", f"found {count}, in order of finding"]
    if ground_truth is not None:
        _, true_labels = _pixels_and_labels(image, ground_truth)
        true_count = len(ground_truth) if isinstance(ground_truth, Instances) else _count(true_labels)
        pictures.append(_draw(pixels, true_labels, scale, False))
        captions.append(f"ground truth {true_count}")

    gap, line = 8, 20
    top = line + gap if title else gap // 2
    width = max(picture.width for picture in pictures)
    column = max(width, 160)
    height = pictures[0].height
    page = Image.new("RGB", (gap + len(pictures) * (column + gap), top + height + line + gap), PAGE)
    draw = ImageDraw.Draw(page)
    if title:
        _text(draw, (gap, gap // 2), _fit(title, page.width - 2 * gap, 15), 15, INK)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = gap + k * (column + gap)
        page.paste(picture, (left, top))
        _text(draw, (left, top + height + 3), caption, 14, FAINT)
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
        _text(ImageDraw.Draw(page), (gap + 8, 12), _fit(title, page.width - 2 * gap, 20), 20, INK)
    for row, row_height in zip(rows, heights, strict=True):
        for k, one in enumerate(row):
            page.paste(one, (gap + k * (width + gap), top))
        top += row_height + gap
    return page


def _pixels_and_labels(image: Any, instances: Any) -> tuple[np.ndarray, np.ndarray]:
    """The image as uint8 (H, W, 3) and the instances as int32 (H, W), of the same size."""
    pixels = _pixels(image)
    if isinstance(instances, Instances):
        labels = instances.label_map()
    else:
        labels = np.asarray(instances)
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"overlay: expected integer labels (H, W), got {labels.dtype} {labels.shape}")
    if labels.shape != pixels.shape[:2]:
        raise InputError(f"overlay: the image is {pixels.shape[:2]} pixels (H, W), the instances {labels.shape}")
    return pixels, labels.astype(np.int32)


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        from fastris.imageio import read_image

        return read_image(image)
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    channels_first = not isinstance(image, np.ndarray)  # a tensor
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if channels_first and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InputError(f"overlay: expected an image (H, W, 3), got shape {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.round(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise InputError(f"overlay: expected uint8 or floating values in [0, 1], got {pixels.dtype}")
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]


def _count(labels: np.ndarray) -> int:
    return np.setdiff1d(labels, 0).size


def _draw(pixels: np.ndarray, labels: np.ndarray, scale: float, numbers: bool) -> Image.Image:
    height, width = (max(1, round(side * scale)) for side in labels.shape)
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.size != (width, height):
        picture = picture.resize((width, height), method)
    canvas = np.array(picture)
    rows = (np.arange(height) * labels.shape[0]) // height
    columns = (np.arange(width) * labels.shape[1]) // width
    labels = labels[rows][:, columns]

    colours = PALETTE[(labels - 1) % len(PALETTE)]
    inside = labels > 0
    canvas[inside] = np.round((1 - FILL) * canvas[inside] + FILL * colours[inside]).astype(np.uint8)
    outline = _outline(labels, 2 if min(height, width) >= 200 else 1)
    canvas[outline] = colours[outline]
    picture = Image.fromarray(canvas)
    if numbers:
        draw = ImageDraw.Draw(picture)
        for one in _places(labels):
            size = int(np.clip(0.45 * one.area**0.5, 13, 22))
            font, text, stroke = _font(size), str(one.label), 1 + size // 14
            half_width, half_height = draw.textlength(text, font=font) / 2 + stroke, size / 2
            x, y = float(one.column), float(one.row)
            if one.area**0.5 < 1.6 * max(half_width, half_height):  # it would hide the object: beside it, then
                x, y = one.right + half_width, one.top - 0.3 * half_height
                if x > width - half_width:
                    x = one.left - half_width
            # kept whole at the borders of the picture
            x = min(max(x, half_width), max(width - half_width, half_width))
            y = min(max(y, half_height), max(height - half_height, half_height))
            draw.text((x, y), text, fill="white", font=font, anchor="mm", stroke_width=stroke, stroke_fill="black")
    return picture


def _outline(labels: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of instances within `thickness` of another instance or the background; the picture's edge is none."""
    edge = np.zeros(labels.shape, bool)
    for shift in range(1, thickness + 1):
        down = labels[shift:] != labels[:-shift]
        edge[shift:] |= down
        edge[:-shift] |= down
        right = labels[:, shift:] != labels[:, :-shift]
        edge[:, shift:] |= right
        edge[:, :-shift] |= right
    return edge & (labels > 0)


class _Place(NamedTuple):
    """Where an instance is: its pixel nearest to its centre of mass, and its edges."""

    label: int
    row: int
    column: int
    top: int
    left: int
    right: int
    area: int


def _places(labels: np.ndarray) -> list[_Place]:
    """The place of each label; one pass over the pixels."""
    rows, columns = np.nonzero(labels)
    ids = labels[rows, columns]
    order = np.argsort(ids, kind="stable")
    ids, rows, columns = ids[order], rows[order], columns[order]
    starts = np.flatnonzero(np.diff(ids, prepend=0))
    places = []
    for start, end in zip(starts, np.append(starts, ids.size)[1:], strict=True):
        own_rows, own_columns = rows[start:end], columns[start:end]
        distance = (own_rows - own_rows.mean()) ** 2 + (own_columns - own_columns.mean()) ** 2
        nearest = int(distance.argmin())
        numbers = (
            ids[start],
            own_rows[nearest],
            own_columns[nearest],
            own_rows.min(),
            own_columns.min(),
            own_columns.max() + 1,
            end - start,
        )
        places.append(_Place(*(int(number) for number in numbers)))
    return places


@lru_cache(maxsize=64)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int]) -> None:
    draw.text(at, text, fill=colour, font=_font(size))


def _fit(text: str, width: int, size: int) -> str:
    """The text, or as much of it as fits before an ellipsis."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
