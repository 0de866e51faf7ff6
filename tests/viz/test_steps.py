"""The steps of a prediction: heat where the network looks, the masks, confidences and the stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastris.errors import InputError
from fastris.nn.model import Trace
from fastris.viz import step_strip
from fastris.viz.drawing import PAGE, PALETTE
from fastris.viz.steps import DIM, GOING, HEAT, STOP, TILE, heat_over

IMAGE = np.full((TILE, TILE, 3), 100, np.uint8)
LOW = -50.0  # a logarithm that is no probability


class Model:
    """A stand-in for a model, whose steps are given."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def trace(self, image: Any, max_steps: int | None, threshold: float) -> Trace:
        return self._trace


def squares(scores: list[float], side: int = TILE, found: list[bool] | None = None) -> Trace:
    """Steps that look at and draw squares of an eighth of the image, one after the other along the diagonal."""
    steps, eighth = len(scores), side // 8
    masks = np.zeros((steps, side, side), bool)
    log_place = np.full((steps, side // 4, side // 4), LOW, np.float32)
    for k in range(steps):
        masks[k, k * eighth : (k + 1) * eighth, k * eighth : (k + 1) * eighth] = True
        log_place[k, k * eighth // 4, k * eighth // 4] = 0.0
    confidence = np.array(scores, np.float32)
    drawn = confidence >= 0.5 if found is None else np.array(found)
    return Trace(masks, confidence, log_place, (4.0, 4.0), drawn, bool(confidence[-1] < 0.5))


def tiles(strip: Image.Image, number: int, columns: int) -> list[np.ndarray]:
    """The tiles, each TILE + 10 pixels wide, 10 pixels apart, from row 26 on."""
    page = np.asarray(strip)
    width, height = TILE + 10, 5 + 2 * TILE + 2 + 20 + 16
    assert page.shape[1] == max(10 + columns * (width + 10), 645)
    return [
        page[26 + k // columns * (height + 10) :][:height, 10 + k % columns * (width + 10) :][:, :width]
        for k in range(number)
    ]


def strip(trace: Trace, image: np.ndarray = IMAGE, **options: Any) -> Image.Image:
    return step_strip(Model(trace), image, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [(0, 0), (3, 9), (11, 15)])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_heat_is_greatest_where_the_softmax_is(place: tuple[int, int], scale: float) -> None:
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    log_place = np.log(np.random.default_rng(1).uniform(0.001, 0.1, (12, 16))).astype(np.float32)
    log_place[place] = 0.0
    heat = heat_over(image, log_place, (4.0, 4.0), scale).astype(int)
    brightest = np.argwhere((heat == HEAT[-1]).all(2))
    assert len(brightest)
    np.testing.assert_array_equal(np.unique(brightest // (4 * scale), axis=0), [place])


def test_the_heat_of_a_shrunk_or_padded_image_lies_where_the_cells_are() -> None:
    log_place = np.full((4, 6), LOW, np.float32)  # of an image of 3.2 × 5.5 cells of 10 × 20 pixels
    log_place[2, 4] = 0.0
    heat = heat_over(np.zeros((32, 110, 3), np.uint8), log_place, (10.0, 20.0), 1.0)
    rows, columns = np.nonzero(heat[:, :, 0] == heat[:, :, 0].max())
    assert abs(rows.mean() + 0.5 - 25) < 1 and abs(columns.mean() + 0.5 - 90) < 1


def test_no_heat_leaves_the_image_dimmed() -> None:
    log_place = np.full((12, 16), LOW, np.float32)
    log_place[0, 0] = 0.0
    heat = heat_over(np.full((48, 64), 200, np.uint8).repeat(3).reshape(48, 64, 3), log_place, (4.0, 4.0), 1.0)
    assert (heat[8:, 8:] == round(DIM * 200)).all()


def test_the_heat_falls_with_the_logarithm() -> None:
    log_place = np.log(np.array([[1.0, 10**-1.5, 0.01, 0.001, 1e-9]], np.float32)).repeat(8, 1)
    heat = heat_over(np.zeros((1, 40, 3), np.uint8), log_place, (1.0, 1.0), 1.0)[0, 4::8]
    np.testing.assert_array_equal(heat[:2], np.round([HEAT[-1], 0.75 * HEAT[2]]))  # of three decades all, and half
    assert 0 < heat[2].sum() < heat[1].sum() and (heat[3:] == 0).all()


def test_every_step_shows_its_place_its_mask_and_the_earlier_ones_outlined() -> None:
    for k, tile in enumerate(tiles(strip(squares([0.9, 0.9, 0.9])), 3, 3)):
        looks, draws = tile[5:][:TILE, 5:][:, :TILE], tile[5 + TILE + 2 :][:TILE, 5:][:, :TILE]
        heat = np.argwhere((looks == HEAT[-1]).all(2))
        np.testing.assert_array_equal(np.unique(heat // 4, axis=0), [[k * 6, k * 6]])
        ring = np.argwhere((looks == 255).all(2))
        assert abs(np.hypot(*(ring - (k * 24 + 1.5)).T) - 8).max() < 1.5
        for j in range(3):
            square = draws[j * 24 : (j + 1) * 24, j * 24 : (j + 1) * 24]
            if j > k:
                assert (square == 100).all()
            else:
                assert (square[-1, :-1] == PALETTE[j]).all()  # outlined
                inside = np.round((100 + PALETTE[j].astype(float)) / 2) if j == k else np.full(3, 100)
                assert (square[8:16, 8:16] == inside).all()


def test_a_step_that_drew_no_object_gives_its_colour_to_the_next() -> None:
    trace = squares([0.9, 0.9, 0.9], found=[True, False, True])
    none, last = tiles(strip(trace), 3, 3)[1:]
    draws = last[5 + TILE + 2 :, 5:]
    assert (draws[24:48, 24:48] == 100).all()  # not among those found before
    assert (draws[71, 48:71] == PALETTE[1]).all()
    plain = tiles(strip(squares([0.9, 0.9, 0.9])), 3, 3)[1]
    assert (none[5 + 2 * TILE + 2 :][:22, 5:110] != plain[5 + 2 * TILE + 2 :][:22, 5:110]).any()  # "no object"


def test_the_bar_is_as_long_as_the_confidence_and_only_the_stop_is_marked() -> None:
    scores = [1.0, 0.75, 0.25]
    for score, tile in zip(scores, tiles(strip(squares(scores)), 3, 3), strict=True):
        bar = tile[5 + 2 * TILE + 2 + 21 + 1][5 : 5 + TILE]
        for colour, length in ((GOING, score if score >= 0.5 else 0), (STOP, score if score < 0.5 else 0)):
            # less the mark of the threshold, which may lie on it
            assert round(length * TILE) - np.count_nonzero((bar == colour).all(1)) in (0, 1)
        frame = np.concatenate([tile[0], tile[-1], tile[:, 0], tile[:, -1]])
        assert (frame == (STOP if score < 0.5 else PAGE)).all()


def test_the_mark_of_the_threshold_is_where_the_bar_would_end() -> None:
    for threshold in (0.0, 0.3, 1.0):
        (tile,) = tiles(strip(squares([0.9]), threshold=threshold), 1, 1)
        below = tile[5 + 2 * TILE + 2 + 21 + 8]  # only the mark reaches below the bar
        (column,) = np.flatnonzero((below != PAGE).any(1))
        assert abs(column - 5 - threshold * TILE) <= 1


def test_title_and_numbers_are_written() -> None:
    def head(*arguments: Any, **options: Any) -> np.ndarray:
        return np.asarray(strip(*arguments, **options))[:26]

    scores = [0.9, 0.8]
    assert (head(squares(scores)) != head(squares([0.9, 0.2]))).any()  # stopped
    assert (head(squares(scores)) != head(squares(scores, found=[True, False]))).any()  # count
    assert (head(squares(scores)) != head(squares(scores), title="a")).any()
    long = head(squares(scores), title="a long title " * 40)
    assert (long[:, -5:] == PAGE).all()
    assert (long[:, -60:] != PAGE).any()  # the count still fits beside it
    first, second = (tile[5 + 2 * TILE + 2 :][:21, -60:] for tile in tiles(strip(squares(scores)), 2, 2))
    assert (first != second).any()  # 0.90 and 0.80


def test_thirty_steps_are_wrapped() -> None:
    trace = squares([0.9] * 8)
    many = Trace(*(np.tile(part, (4, *[1] * (part.ndim - 1)))[:30] for part in trace[:3]), trace.cell,
                 np.ones(30, bool), False)  # fmt: skip
    shown = tiles(strip(many), 30, 6)
    for k in (0, 7, 17, 29):
        looks = shown[k][5:][:TILE, 5:][:, :TILE]
        assert (looks[k % 8 * 24 + 1, k % 8 * 24 + 1] == HEAT[-1]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (40, 400), (400, 40), (1000, 700)])
def test_images_of_any_shape_fit(size: tuple[int, int]) -> None:
    height, width = size
    log_place = np.full((2, -(-height // 4), -(-width // 4)), LOW, np.float32)
    log_place[:, -1, -1] = 0.0
    masks = np.ones((2, *size), bool)
    trace = Trace(masks, np.array([0.9, 0.1], np.float32), log_place, (4.0, 4.0), np.array([True, False]), True)
    page = np.asarray(strip(trace, np.full(size, 100, np.uint8)))
    assert 0.05 < page.shape[0] / page.shape[1] < 1 and page.shape[1] <= 1300
    assert (page[:, :8] == PAGE).all() and (page[:, -8:] == PAGE).all()
    frame = np.argwhere((page == STOP).all(2))
    assert len(frame) and (frame[-1] < np.array(page.shape[:2]) - 10).all()


def test_a_real_model_draws_what_it_predicts() -> None:
    from fastris.nn import ModelConfig, RecurrentInstanceSegmenter

    model = RecurrentInstanceSegmenter(
        ModelConfig(feature_channels=8, backbone_channels=(8, 8, 8, 8), hidden_channels=8, layers=1)
    ).eval()
    with torch.no_grad():
        model.confidence_head.linear.bias.fill_(9.0)
    image = np.random.default_rng(0).integers(0, 255, (TILE, TILE, 3), np.uint8)
    shown = tiles(step_strip(model, image, max_steps=2), 2, 2)
    trace = model.trace(image, max_steps=2)
    for step, tile in enumerate(shown):
        row, column = np.unravel_index(trace.log_place[step].argmax(), trace.log_place[step].shape)
        looks = tile[5:][:TILE, 5:][:, :TILE]
        assert (looks[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] == HEAT[-1]).all(2).any()
        draws = tile[5 + TILE + 2 :][:TILE, 5:][:, :TILE]
        if step == 0:
            np.testing.assert_array_equal((draws != image).any(2), trace.masks[0])
    with pytest.raises(InputError, match="image"):
        step_strip(model, [image])
