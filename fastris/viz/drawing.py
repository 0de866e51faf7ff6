"""Instances drawn over an image: outlines, translucent fills and numbers in order of finding."""

from __future__ import annotations

import os
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
    pixels, labels = pixels_and_labels(image, instances)
    longer = max(labels.shape)
    scale = max(1, SMALL // longer) if longer <= LARGE else LARGE / longer
    return draw_instances(pixels, labels, scale, numbers=numbers)


def pixels_and_labels(image: Any, instances: Any) -> tuple[np.ndarray, np.ndarray]:
    """The image as uint8 (H, W, 3) and the instances as int32 (H, W), of the same size."""
    pixels = as_pixels(image)
    if isinstance(instances, Instances):
        labels = instances.label_map()
    else:
        labels = np.asarray(instances)
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"overlay: expected integer labels (H, W), got {labels.dtype} {labels.shape}")
    if labels.shape != pixels.shape[:2]:
        raise InputError(f"overlay: the image is {pixels.shape[:2]} pixels (H, W), the instances {labels.shape}")
    return pixels, labels.astype(np.int32)


def as_pixels(image: Any) -> np.ndarray:
    """What :func:`overlay` takes as an image, as uint8 (H, W, 3)."""
    if isinstance(image, (str, os.PathLike)):
        from fastris.imageio import read_image

        return read_image(image)
    if isinstance(image, Image.Image):
        from fastris.imageio import to_rgb

        return to_rgb(image)
    channels_first = not isinstance(image, np.ndarray)  # a tensor
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16
    pixels = np.asarray(image)
    if channels_first and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InputError(f"overlay: expected an image (H, W, 3), got shape {pixels.shape}")
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.round(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    if not np.issubdtype(pixels.dtype, np.integer):
        raise InputError(f"overlay: expected integers, or floating values in [0, 1], got {pixels.dtype}")
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    if pixels.dtype != np.uint8:
        from fastris.imageio import stretch

        pixels = stretch(pixels)
    return pixels


def count_of(instances: Any) -> int:
    """How many instances there are: all of :class:`~fastris.Instances`, the distinct positive ids of a label map."""
    return len(instances) if isinstance(instances, Instances) else int(np.count_nonzero(np.unique(instances) > 0))


def draw_instances(
    pixels: np.ndarray,
    labels: np.ndarray,
    scale: float,
    colours: np.ndarray | None = None,
    numbers: bool = False,
) -> Image.Image:
    """The picture of an image and its instances, ``scale`` times as large.

    ``colours`` is uint8 (labels.max() + 1, 3), the colour of each label; the palette over and over where not given.
    """
    canvas, labels = enlarge(pixels, labels, scale)
    by_pixel = PALETTE[(labels - 1) % len(PALETTE)] if colours is None else colours[labels]
    tint(canvas, labels > 0, by_pixel)
    edge = outline(labels)
    canvas[edge] = by_pixel[edge]
    picture = Image.fromarray(canvas)
    if numbers:
        _number(picture, labels)
    return picture


def enlarge(pixels: np.ndarray, labels: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels ``scale`` times as large: new arrays, the labels by nearest neighbour."""
    height, width = (max(1, round(side * scale)) for side in labels.shape)
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.size != (width, height):
        picture = picture.resize((width, height), method)
    rows = (np.arange(height) * labels.shape[0]) // height
    columns = (np.arange(width) * labels.shape[1]) // width
    return np.array(picture), labels[rows][:, columns]


def tint(canvas: np.ndarray, where: np.ndarray, colours: np.ndarray, opacity: float = FILL) -> None:
    """Mix the colours, (H, W, 3) or one, into the canvas where the mask is true."""
    mixed = colours[where] if colours.ndim == 3 else colours
    canvas[where] = np.round((1 - opacity) * canvas[where] + opacity * mixed).astype(np.uint8)


def outline(labels: np.ndarray) -> np.ndarray:
    """Pixels of instances within one or, in a larger picture, two of another instance or the background.

    The picture's edge is no outline.
    """
    edge = np.zeros(labels.shape, bool)
    for shift in range(1, 3 if min(labels.shape) >= 200 else 2):
        down = labels[shift:] != labels[:-shift]
        edge[shift:] |= down
        edge[:-shift] |= down
        right = labels[:, shift:] != labels[:, :-shift]
        edge[:, shift:] |= right
        edge[:, :-shift] |= right
    return edge & (labels > 0)


def _number(picture: Image.Image, labels: np.ndarray) -> None:
    """Write every label on its instance, or beside a small one, whole within the picture."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    for one in _places(labels):
        size = int(np.clip(0.45 * one.area**0.5, 13, 22))
        font, text, stroke = font_of(size), str(one.label), 1 + size // 14
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
def font_of(size: int) -> Any:
    """Pillow's own font at this size in pixels."""
    return ImageFont.load_default(size=size)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    """A line of text; the anchor is Pillow's, left and top where not given."""
    draw.text(at, text, fill=colour, font=font_of(size), anchor=anchor)


def fit(text: str, width: int, size: int) -> str:
    """The text, or as much of it as fits before an ellipsis."""
    font = font_of(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def wrap(text: str, width: int, size: int) -> list[str]:
    """The text as lines that fit, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font_of(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
