"""Panels, contact sheets and the paper's figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastris.errors import InputError
from fastris.instances import Instances
from fastris.viz import FigureRow, contact_sheet, figure_panel, panel
from fastris.viz.drawing import PAGE, PALETTE
from fastris.viz.panels import FIGURE, UNMATCHED, colours_of_matches, spread_colours

IMAGE = np.full((64, 80, 3), 100, np.uint8)
LABELS = np.zeros((64, 80), np.int32)
LABELS[10:30, 10:30] = 1
LABELS[30:60, 30:70] = 2


def test_a_panel_has_a_third_picture_only_with_ground_truth() -> None:
    two = panel(IMAGE, Instances.from_label_map(LABELS), title="a title " * 100)
    three = panel(IMAGE, LABELS, LABELS, title="a")
    assert three.width > two.width * 1.4
    assert three.height == two.height
    assert panel(IMAGE, LABELS).height < two.height
    assert panel(IMAGE, np.zeros_like(LABELS), np.zeros_like(LABELS)).size == (three.width, panel(IMAGE, LABELS).height)


def test_a_contact_sheet_holds_every_panel() -> None:
    panels = [Image.new("RGB", (300, 100), (k, 0, 0)) for k in range(10, 15)]
    sheet = np.asarray(contact_sheet(panels, title="a"))
    assert set(range(10, 15)) <= set(np.unique(sheet[:, :, 0][(sheet[:, :, 1] == 0)]).tolist())
    assert contact_sheet(panels, columns=1).height > contact_sheet(panels, columns=2).height
    with pytest.raises(InputError, match="panel"):
        contact_sheet([])


# The figure. Its pictures are FIGURE pixels wide, in columns 8 pixels apart, from row 28 on.

TRUTH = np.zeros((FIGURE, FIGURE), np.int32)
TRUTH[20:60, 20:60] = 4
TRUTH[20:60, 150:200] = 7
TRUTH[150:220, 60:120] = 9
GREY = np.full((FIGURE, FIGURE), 100, np.uint8)


def columns(figure: Image.Image, number: int, top: int = 28, height: int = FIGURE) -> list[np.ndarray]:
    """The pictures of the first row."""
    page = np.asarray(figure)
    assert page.shape[1] == 8 + number * (FIGURE + 8)
    return [page[top : top + height, 8 + k * (FIGURE + 8) :][:, :FIGURE] for k in range(number)]


def test_what_is_found_has_the_colour_of_the_ground_truth_it_matches() -> None:
    found = np.zeros_like(TRUTH)
    found[22:62, 20:60] = 3  # 4 in the ground truth
    found[150:220, 60:120] = 1  # 9
    found[100:120, 200:220] = 2  # none
    image, network, truth = columns(figure_panel([FigureRow(GREY, found, TRUTH)]), 3)
    assert (image == 100).all()
    for label, true_label in ((3, 4), (1, 9)):
        colours = np.concatenate([network[outline(found, label)], truth[outline(TRUTH, true_label)]])
        assert (colours == colours[0]).all() and (colours[0] == PALETTE).all(1).any()
    assert (network[outline(found, 2)] == UNMATCHED).all()
    assert len({tuple(truth[outline(TRUTH, label)][0]) for label in (4, 7, 9)}) == 3
    assert (network[found == 0] == 100).all()


def outline(labels: np.ndarray, label: int) -> np.ndarray:
    """The pixels on the edge of a rectangle."""
    mask = labels == label
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inner = np.zeros_like(mask)
    inner[rows[1] : rows[-1], columns[1] : columns[-1]] = True
    return mask & ~inner


def test_the_crf_has_a_column_where_a_row_has_it() -> None:
    rows = [FigureRow(GREY, TRUTH, TRUTH), FigureRow(GREY, np.zeros_like(TRUTH), TRUTH, refined=TRUTH)]
    assert figure_panel(rows[:1]).width == 8 + 3 * (FIGURE + 8)
    _, network, refined, truth = columns(figure_panel(rows), 4, 28 + FIGURE + 28)
    assert (network == 100).all()
    np.testing.assert_array_equal(refined, truth)
    assert (columns(figure_panel(rows), 4)[2] == PAGE).all()  # the first row was not refined


def test_columns_have_headings_and_the_figure_a_legend() -> None:
    figure = figure_panel([FigureRow(GREY, TRUTH, TRUTH, refined=TRUTH)])
    headings = [heading.tobytes() for heading in columns(figure, 4, 0, 28)]
    assert len({*headings, np.full((28, FIGURE, 3), PAGE, np.uint8).tobytes()}) == 5
    page = np.asarray(figure)
    assert (page[28 + FIGURE + 28 :] != PAGE).any()
    assert (page[:, -8:] == PAGE).all() and (page[-3:] == PAGE).all()


def test_captions_say_how_many_there_are() -> None:
    def page(found: np.ndarray, truth: np.ndarray, title: str = "") -> Image.Image:
        return figure_panel([FigureRow(GREY, found, truth, title=title)])

    def caption(column: int, *row: Any) -> np.ndarray:
        return columns(page(*row), 3, 28 + FIGURE, 22)[column]

    one = np.where(TRUTH == 4, 4, 0)
    assert (caption(0, one, TRUTH) == PAGE).all()
    assert (caption(0, one, TRUTH, "a") != PAGE).any()
    for column in (1, 2):
        assert (caption(column, one, TRUTH) != PAGE).any()
    np.testing.assert_array_equal(caption(1, one, TRUTH), caption(1, np.where(TRUTH == 9, 1, 0), TRUTH))  # 1, 1 right
    assert (caption(1, one, TRUTH) != caption(1, one, TRUTH * (TRUTH != 4))).any()  # 1, 0 right
    assert (caption(1, one, TRUTH) != caption(1, TRUTH, TRUTH)).any()  # 3, 3 right
    np.testing.assert_array_equal(caption(2, one, TRUTH), caption(2, TRUTH, TRUTH))
    assert (caption(2, one, TRUTH) != caption(2, one, one)).any()
    beside = np.asarray(page(one, TRUTH, "a long title " * 20))[28 + FIGURE :][:22, 8 + FIGURE :][:, :8]
    assert (beside == PAGE).all()  # cut off within its column


def test_matches_are_one_to_one_for_the_largest_sum() -> None:
    truth = np.zeros((1, 20), np.int32)
    truth[0, :10], truth[0, 10:] = 5, 2
    found = np.zeros_like(truth)
    found[0, :4], found[0, 4:12], found[0, 18:] = 1, 2, 3  # 2 overlaps both, mostly 5; 3 is the only other one on 2
    true_colours = spread_colours(truth)
    colours, right = colours_of_matches(found, truth, true_colours)
    # by hand: IoU of 1 with 5 is 4/10, of 2 with 5 6/12 and with 2 2/16, of 3 with 2 2/10: 2 → 5 and 3 → 2
    np.testing.assert_array_equal(colours[1:], [UNMATCHED, true_colours[5], true_colours[2]])
    assert right == 0
    assert colours_of_matches(truth, truth, true_colours)[1] == 2


def test_void_counts_for_nothing() -> None:
    void = TRUTH.copy()
    void[100:, :] = -1  # 9 is gone, and what is found there does not matter
    figure = figure_panel([FigureRow(GREY, TRUTH, void)])
    np.testing.assert_array_equal(columns(figure, 3)[2][100:], GREY[100:, :, None].repeat(3, 2))
    found = np.where(TRUTH == 9, 4, TRUTH)  # an object that reaches into the void
    colours, right = colours_of_matches(found, void, spread_colours(void))
    np.testing.assert_array_equal(colours[[4, 7]], spread_colours(void)[[4, 7]])
    assert right == 2
    counted, alone = (
        columns(figure_panel([FigureRow(GREY, TRUTH, labels)]), 3, 28 + FIGURE, 22)[2]
        for labels in (void, np.where(TRUTH == 9, 0, TRUTH))
    )
    np.testing.assert_array_equal(counted, alone)


def test_near_instances_differ_in_colour() -> None:
    labels = np.arange(1, 43, dtype=np.int32).reshape(6, 7).repeat(8, 0).repeat(8, 1)  # as many a row as colours
    colours = spread_colours(labels)[1:].reshape(6, 7, 3)
    assert {tuple(colour) for colour in colours.reshape(-1, 3)} == {tuple(colour) for colour in PALETTE}
    assert (colours[1:] != colours[:-1]).any(2).all()
    assert (colours[:, 1:] != colours[:, :-1]).any(2).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (64, 64), (300, 200), (20, 400)])
@pytest.mark.parametrize("number", [0, 1, 30])
def test_images_of_any_shape_with_any_number_of_instances(size: tuple[int, int], number: int) -> None:
    labels = (np.arange(size[0] * size[1], dtype=np.int32) % (number + 1)).reshape(size)
    image = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    found = Instances.from_label_map(labels)
    figure = figure_panel([FigureRow(image, found, labels, title="a"), FigureRow(GREY, TRUTH, TRUTH)])
    scale = FIGURE / max(size)
    height = max(1, round(size[0] * scale))
    assert figure.width == 8 + 3 * (FIGURE + 8)
    page = np.asarray(figure)
    assert (page[28 + height + 28 :][:FIGURE, 8 : 8 + FIGURE] == 100).all()  # the second row begins below the first
    if number == 0:
        _, network, truth = columns(figure, 3, height=height)
        np.testing.assert_array_equal(network, truth)


def test_a_figure_needs_rows_whose_sizes_agree() -> None:
    with pytest.raises(InputError, match="row"):
        figure_panel([])
    with pytest.raises(InputError, match="instances"):
        figure_panel([FigureRow(GREY, TRUTH[1:], TRUTH)])
