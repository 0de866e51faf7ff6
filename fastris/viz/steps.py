"""A prediction step by step: where the network looks, what it draws, how sure it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from fastris.instances import Instances
from fastris.viz.drawing import FAINT, INK, PAGE, PALETTE, as_pixels, enlarge, fit, font_of, outline, tint, wrap, write

if TYPE_CHECKING:
    from fastris.nn.model import RecurrentInstanceSegmenter, Trace

TILE = 192  # pixels: the side of a step's two pictures where the image is square; others have the same area
WIDEST, TALLEST = 620, 400  # but at most these sides
NARROWEST = 152  # pixels of a step, so that its caption fits
PAGE_WIDTH = 1290
DECADES = 3.0  # of probability that the heat spans
DIM = 0.45  # brightness of the image below it
GOING, STOP, TRACK = (0, 158, 115), (213, 94, 0), (222, 222, 222)
# Dark to light like matplotlib's inferno, at equal distances.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def step_strip(
    model: RecurrentInstanceSegmenter,
    image: Any,
    max_steps: int | None = None,
    threshold: float = 0.5,
    title: str = "",
) -> Image.Image:
    """Every step of a prediction, the one at which it stops included.

    A step has two pictures and a bar. The first picture is where it looks: the spatial softmax as heat over the dimmed
    image, its maximum ringed. The second is the mask it draws, earlier ones outlined, in the colours of
    :func:`overlay`. The bar is its confidence.

    Args:
        model: a model in evaluation mode.
        image: (H, W, 3) or (H, W) uint8 array, (3, H, W) tensor, PIL image or path.
        max_steps, threshold: as for :meth:`~fastris.RecurrentInstanceSegmenter.predict`.
        title: a line above.

    Raises:
        InputError: the image cannot be used.
    """
    pixels = as_pixels(image)
    trace = model.trace(image, max_steps, threshold)
    height, width = pixels.shape[:2]
    scale = min(TILE / (height * width) ** 0.5, WIDEST / width, TALLEST / height)
    tiles = [_tile(pixels, trace, step, scale, threshold) for step in range(len(trace.scores))]

    gap, head = 10, 26
    width, height = tiles[0].size
    rows = -(-len(tiles) // max(1, PAGE_WIDTH // (width + gap)))
    columns = -(-len(tiles) // rows)
    page_width = max(gap + columns * (width + gap), PAGE_WIDTH // 2)
    ended = f"stopped at step {len(tiles)}" if trace.stopped else f"ended by the limit of {len(tiles)} steps"
    summary = f"{trace.found.sum()} found, {ended}"
    if title:
        room = page_width - 2 * gap - round(font_of(15).getlength(f": {summary}"))
        summary = f"{fit(title, room, 15)}: {summary}"
    meaning = (
        f"First: where the step looks (the spatial softmax, from 1/{10**DECADES:.0f} of its maximum, which is ringed). "
        f"Second: the mask it draws, and outlines of those found before. Bar: confidence; it stops below {threshold:g}."
    )
    legend = wrap(meaning, page_width - 2 * gap, 13)
    page = Image.new("RGB", (page_width, head + rows * (height + gap) + gap + 17 * len(legend)), PAGE)
    draw = ImageDraw.Draw(page)
    write(draw, (gap, 5), summary, 15)
    for k, tile in enumerate(tiles):
        page.paste(tile, (gap + k % columns * (width + gap), head + k // columns * (height + gap)))
    for k, text in enumerate(legend):
        write(draw, (gap, head + rows * (height + gap) + 17 * k), text, 13, FAINT)
    return page


def heat_over(pixels: np.ndarray, log_place: np.ndarray, cell: tuple[float, float], scale: float) -> np.ndarray:
    """The dimmed image under the log-probabilities (h, w) as heat, uint8 (scale · H, scale · W, 3).

    The heat is linear in the logarithm: nothing at 1/1000 of the maximum, full at the maximum.
    """
    height, width = pixels.shape[:2]
    canvas, _ = enlarge(pixels, np.zeros((height, width), np.int32), scale)
    values = np.clip(1 + (log_place - log_place.max()) / (DECADES * np.log(10)), 0, 1).astype(np.float32)
    box = (0, 0, min(width / cell[1], values.shape[1]), min(height / cell[0], values.shape[0]))
    size = canvas.shape[1], canvas.shape[0]
    heat = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST, box))
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, stops, channel) for channel in HEAT.T], axis=2)
    opacity = np.minimum(1, 1.5 * heat)[:, :, None]
    return np.round((1 - opacity) * DIM * canvas + opacity * colours).astype(np.uint8)


def _tile(pixels: np.ndarray, trace: Trace, step: int, scale: float, threshold: float) -> Image.Image:
    """One step: two pictures, one below the other or, of a tall image, side by side; a caption, a bar."""
    looks, draws = _looks(pixels, trace, step, scale), _draws(pixels, trace, step, scale)
    width, height = looks.size
    second = (width + 2, 0) if height > 1.5 * width else (0, height + 2)
    stops = trace.stopped and step == len(trace.scores) - 1
    border, line = 5, 20
    inner = max(second[0] + width, NARROWEST)
    top = border + second[1] + height
    tile = Image.new("RGB", (inner + 2 * border, top + line + 16), PAGE)
    tile.paste(looks, (border, border))
    tile.paste(draws, (border + second[0], border + second[1]))
    draw = ImageDraw.Draw(tile)
    score, accent = float(trace.scores[step]), STOP if stops else GOING
    caption = f"step {step + 1}" + (": stop" if stops else "" if trace.found[step] else ": no object")
    top += 3
    write(draw, (border, top), caption, 14, STOP if stops else INK)
    write(draw, (border + inner, top), f"{score:.2f}", 14, STOP if stops else INK, anchor="ra")
    top += line - 2
    draw.rectangle((border, top, border + inner - 1, top + 6), fill=TRACK)
    if score > 0:
        draw.rectangle((border, top, border + max(0, round(inner * score) - 1), top + 6), fill=accent)
    mark = border + round((inner - 1) * threshold)
    draw.line((mark, top - 2, mark, top + 8), fill=INK)
    if stops:
        draw.rectangle((0, 0, tile.width - 1, tile.height - 1), outline=STOP, width=2)
    return tile


def _looks(pixels: np.ndarray, trace: Trace, step: int, scale: float) -> Image.Image:
    """Where the step looks, with a ring around the maximum."""
    log_place = trace.log_place[step]
    picture = Image.fromarray(heat_over(pixels, log_place, trace.cell, scale))
    row, column = np.unravel_index(log_place.argmax(), log_place.shape)
    x = min((column + 0.5) * trace.cell[1] * scale, picture.width - 1)
    y = min((row + 0.5) * trace.cell[0] * scale, picture.height - 1)
    draw = ImageDraw.Draw(picture)
    for radius, colour in ((9, "black"), (8, "white")):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
    return picture


def _draws(pixels: np.ndarray, trace: Trace, step: int, scale: float) -> Image.Image:
    """The step's mask, tinted and outlined, over those found before, outlined."""
    earlier = trace.masks[:step][trace.found[:step]]
    canvas, before = enlarge(pixels, Instances(earlier, np.ones(len(earlier)), pixels.shape[:2]).label_map(), scale)
    edge = outline(before)
    canvas[edge] = PALETTE[(before[edge] - 1) % len(PALETTE)]
    _, own = enlarge(pixels, trace.masks[step].astype(np.int32), scale)
    colour = PALETTE[len(earlier) % len(PALETTE)]
    tint(canvas, own > 0, colour, 0.5)
    canvas[outline(own)] = colour
    return Image.fromarray(canvas)
