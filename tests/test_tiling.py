"""Tiles cover the image, and stitching finds every object of it once."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fastris import InputError, Instances, ModelConfig, RecurrentInstanceSegmenter
from fastris.tiling import MARGIN, stitch, tile_boxes

Size = tuple[int, int]


def segmented(labels: np.ndarray, tile: int, overlap: int) -> Instances:
    """What stitching makes of tiles in which every object is found exactly, as far as the tile shows it."""
    boxes = tile_boxes(labels.shape, tile, overlap)
    return stitch(boxes, [Instances.from_label_map(labels[box.slices]) for box in boxes], labels.shape)


def assert_same_objects(found: Instances, labels: np.ndarray) -> None:
    """The masks are those of the label map, each once, in any order."""
    ids = [np.unique(labels[box.slices][mask]) for box, mask in found.crops]
    assert sorted(number for one in ids for number in one) == np.setdiff1d(labels, 0).tolist()
    new = np.zeros(labels.max() + 1, np.int32)
    new[np.concatenate([[0], *ids]).astype(int)] = np.arange(len(ids) + 1)
    np.testing.assert_array_equal(found.label_map(), new[labels])


def ellipses(size: Size, count: int, radius: tuple[float, float], seed: int = 0) -> np.ndarray:
    """A label map of `count` ellipses that do not overlap but may touch."""
    random = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    drawn = 0
    while drawn < count:
        y, x = random.uniform(0, size[0]), random.uniform(0, size[1])
        long, short = random.uniform(*radius), random.uniform(*radius)
        turn = random.uniform(0, np.pi)
        reach = int(max(long, short)) + 2
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        rows, columns = np.mgrid[top : min(size[0], int(y) + reach), left : min(size[1], int(x) + reach)]
        across = ((columns - x) * np.cos(turn) + (rows - y) * np.sin(turn)) / long
        along = ((rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)) / short
        mask = across**2 + along**2 <= 1
        view = labels[top : rows[-1, 0] + 1, left : columns[0, -1] + 1]
        if mask.sum() >= 4 and not view[mask].any():
            drawn += 1
            view[mask] = drawn
    return labels


@st.composite
def scenes(draw: st.DrawFn) -> np.ndarray:
    """Label maps of connected objects of any shape and size, many of which touch."""
    size = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = ndimage.gaussian_filter(random.standard_normal(size), draw(st.sampled_from([0.0, 1.0, 3.0, 8.0])))
    seeds = random.integers(0, 1 + size[0] * size[1] // draw(st.sampled_from([20, 200, 2000])) + 1, size)
    cells = ndimage.maximum_filter(np.where(random.random(size) < 0.05, seeds, 0), draw(st.sampled_from([1, 9, 25])))
    labels = np.zeros(size, np.int32)
    for cell in np.unique(cells):
        pieces, count = ndimage.label((noise > np.quantile(noise, 0.4)) & (cells == cell), np.ones((3, 3)))
        labels[pieces > 0] = pieces[pieces > 0] + labels.max()
    return labels


@given(st.tuples(st.integers(1, 900), st.integers(1, 900)), st.integers(1, 300), st.data())
def test_tiles_of_one_size_cover_the_image_with_the_overlap_asked_for(
    size: Size, tile: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, tile - 1).filter(lambda overlap: (tile - overlap) * 40 > max(size)))
    boxes = tile_boxes(size, tile, overlap)
    assert {box.size for box in boxes} == {(min(tile, size[0]), min(tile, size[1]))}
    assert len(set(boxes)) == len(boxes) and boxes == sorted(boxes)
    for axis, side in enumerate(size):
        starts = sorted({box[axis] for box in boxes})
        assert starts[0] == 0 and starts[-1] + min(tile, side) == side
        assert all(after - before <= tile - overlap for before, after in zip(starts, starts[1:], strict=False))
        fewest = 1 + max(0, -(-(side - tile) // (tile - overlap)))
        assert len(starts) == fewest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenes(), st.integers(2, 40), st.data())
def test_perfect_tiles_give_the_perfect_result(labels: np.ndarray, tile: int, data: st.DataObject) -> None:
    """Whatever the objects' shape and size, if neighbouring tiles share a pixel."""
    tile = max(tile, -(-max(labels.shape) // 8))  # at most some 20 tiles a side
    overlap = data.draw(st.integers(1, max(1, tile // 2)))
    assert_same_objects(segmented(labels, tile, overlap), labels)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(12, 24), st.integers(0, 20))
def test_objects_that_fit_into_the_overlap_may_be_ill_drawn_where_they_are_cut(
    seed: int, overlap: int, more: int
) -> None:
    """Of a cut object, a tile shows only what is within a few pixels of the cut."""
    random = np.random.default_rng(seed)
    most = overlap - 2 * MARGIN + 1
    labels = ellipses((90, 120), 25, (1.5, (most - 1) / 2), seed)
    assert all(max(crop.mask.shape) <= most for crop in Instances.from_label_map(labels).crops)
    boxes = tile_boxes(labels.shape, overlap + 8 + more, overlap)
    found = []
    for place in boxes:
        rows, columns = np.mgrid[place.slices]
        distance = np.full(rows.shape, np.inf)  # to the nearest cut
        for there, inner in (
            (rows - place.top, place.top > 0),
            (columns - place.left, place.left > 0),
            (place.bottom - 1 - rows, place.bottom < labels.shape[0]),
            (place.right - 1 - columns, place.right < labels.shape[1]),
        ):
            if inner:
                distance = np.minimum(distance, there)
        view = labels[place.slices].copy()
        for number in np.setdiff1d(view, 0):
            mask = view == number
            if distance[mask].min() < MARGIN:
                view[mask & (distance > random.integers(MARGIN, 9))] = 0
        found.append(Instances.from_label_map(view))
    assert_same_objects(stitch(boxes, found, labels.shape), labels)


@pytest.mark.parametrize("offset", range(0, 48, 5))
def test_an_object_is_found_once_wherever_the_tiles_cut_it(offset: int) -> None:
    labels = np.zeros((150, 160), np.int32)
    labels[offset : offset + 10, 20:30] = 1  # smaller than the overlap
    labels[offset + 20 : offset + 34, 40 : 40 + offset + 1] = 2  # across two tiles or three
    labels[offset + 40 : offset + 100, 50 : 60 + 2 * offset] = 3  # across four and more
    assert_same_objects(segmented(labels, 48, 16), labels)


def test_without_overlap_the_parts_stay_apart() -> None:
    labels = np.zeros((20, 40), np.int32)
    labels[5:15, 15:25] = 1
    found = segmented(labels, 20, 0)
    np.testing.assert_array_equal(found.boxes, [[15, 5, 20, 15], [20, 5, 25, 15]])


def two_tiles(left: list[np.ndarray], right: list[np.ndarray], scores: tuple[list[float], list[float]]) -> Instances:
    """Masks (20, 40) of two tiles of an image of (20, 60), the right one's from column 20 on."""
    boxes = tile_boxes((20, 60), 40, 20)
    found = [
        Instances(np.array(masks).reshape(-1, 20, 40), np.array(score), (20, 40))
        for masks, score in zip((left, right), scores, strict=True)
    ]
    return stitch([boxes[0], boxes[1]], found, (20, 60))


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((20, 40), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_the_tile_that_shows_the_whole_object_draws_it_and_the_best_score_stands() -> None:
    found = two_tiles([box(4, 30, 14, 40)], [box(5, 11, 15, 24)], ([0.9], [0.6]))
    np.testing.assert_array_equal(found.boxes, [[31, 5, 44, 15]])
    np.testing.assert_allclose(found.scores, [0.9])


@pytest.mark.parametrize("gap", range(MARGIN + 1))
def test_an_object_that_nearly_touches_the_cut_counts_as_cut(gap: int) -> None:
    found = two_tiles([box(5, 10, 15, 40 - gap)], [box(5, 0, 15, 30)], ([0.9], [0.9]))
    (x0, _, x1, _) = found.boxes[0]
    assert len(found) == 1
    assert (x0, x1) == ((10, 50) if gap < MARGIN else (10, 40 - gap))  # pieced together, or taken for whole


def test_two_instances_of_one_tile_are_two_objects() -> None:
    """Even if two other tiles, which agree with each other, each join one of them."""
    boxes = tile_boxes((60, 60), 40, 20)
    rows = [[(22, 30), (30, 38)], [(22, 36)], [(24, 38)], []]  # in the middle, which all four tiles show
    found = []
    for place, spans in zip(boxes, rows, strict=True):
        masks = np.zeros((len(spans), 60, 60), bool)
        for mask, (top, bottom) in zip(masks, spans, strict=True):
            mask[top:bottom, 24:36] = True
        found.append(Instances(masks[(slice(None), *place.slices)], np.full(len(spans), 0.9), (40, 40)))
    result = stitch(boxes, found, (60, 60))
    np.testing.assert_array_equal(result.boxes[:, 1:4:2], [[22, 30], [30, 38]])


def test_what_the_other_tile_sees_and_does_not_find_is_left_out_if_it_is_cut() -> None:
    found = two_tiles([box(0, 10, 5, 40), box(6, 25, 11, 36), box(12, 2, 17, 19)], [], ([0.9, 0.9, 0.9], []))
    np.testing.assert_array_equal(found.boxes, [[25, 6, 36, 11], [2, 12, 19, 17]])


def test_a_fragment_of_what_another_tile_shows_better_is_left_out() -> None:
    found = two_tiles([box(5, 22, 15, 36)], [box(5, 2, 15, 6), box(5, 13, 15, 18)], ([0.9], [0.8, 0.7]))
    np.testing.assert_array_equal(found.boxes, [[22, 5, 36, 15]])


def test_overlapping_instances_of_one_tile_are_left_alone() -> None:
    """An image of one tile gives what the tile gave."""
    masks = np.array([box(2, 2, 12, 12), box(3, 3, 11, 11), box(0, 0, 20, 40)])
    found = stitch(tile_boxes((20, 40), 64, 16), [Instances(masks, np.array([0.7, 0.8, 0.9]), (20, 40))], (20, 40))
    np.testing.assert_array_equal(found.masks, masks)
    np.testing.assert_allclose(found.scores, [0.7, 0.8, 0.9])


def test_nothing_found() -> None:
    assert len(segmented(np.zeros((50, 90), np.int32), 32, 8)) == 0


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> RecurrentInstanceSegmenter:
    """A model that reads the instances off the pixels, exactly, and keeps the shapes of what it looked at."""
    tiny = ModelConfig(feature_channels=8, backbone_channels=(8, 8, 8, 8), hidden_channels=8, max_side=512)
    model = RecurrentInstanceSegmenter(tiny)
    model.looked_at = []  # type: ignore[assignment]

    def find(images: torch.Tensor, limit: int, *_: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        model.looked_at.append(tuple(images.shape))  # type: ignore[operator, union-attr]
        results = []
        for image in images:
            colours = np.round(image.numpy() * 255).astype(np.int32)
            instances = Instances.from_label_map(colours[0] * 256 + colours[1])[:limit]
            results.append((torch.from_numpy(instances.masks), torch.from_numpy(instances.scores)))
        return results

    monkeypatch.setattr(model, "_find", find)
    return model


def painted(labels: np.ndarray) -> np.ndarray:
    """The image whose pixels say which instance they are of."""
    return np.dstack([labels // 256, labels % 256, np.full_like(labels, 7)]).astype(np.uint8)


def test_2000_by_2000_pixels_with_hundreds_of_objects(model: RecurrentInstanceSegmenter) -> None:
    labels = ellipses((2000, 2000), 600, (6, 24))
    labels[900:1300, 100:130] = labels.max() + 1  # much longer than the overlap
    labels[700:1100, 600:1000] = labels.max() + 1  # larger than a tile
    tracemalloc.start()
    found = model.predict(painted(labels), tile=256, overlap=64, min_area=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found, Instances)
    assert found.size == (2000, 2000) and len(found) > 500
    assert_same_objects(found, labels)
    assert peak < 30 * labels.size  # the image as fp32 takes 12 bytes a pixel; as many full masks would take 590
    assert max(shape[0] * shape[2] * shape[3] for shape in model.looked_at) <= 2**19  # type: ignore[union-attr]


def test_an_image_of_one_tile_is_looked_at_as_without() -> None:
    torch.manual_seed(0)
    tiny = ModelConfig(feature_channels=8, backbone_channels=(8, 8, 8, 8), hidden_channels=8, max_steps=3)
    model = RecurrentInstanceSegmenter(tiny).eval()
    image = torch.rand(3, 48, 70)
    with pytest.warns(UserWarning, match="1 of 1 tiles used all 3 steps"):
        tiled = model.predict(image, tile=70, threshold=0.0, mask_threshold=0.0)
    whole = model.predict(image, threshold=0.0, mask_threshold=0.0)
    assert isinstance(tiled, Instances) and isinstance(whole, Instances) and len(whole)
    np.testing.assert_array_equal(tiled.masks, whole.masks)
    np.testing.assert_array_equal(tiled.scores, whole.scores)


def test_predict_cuts_as_it_is_told(model: RecurrentInstanceSegmenter) -> None:
    labels = ellipses((100, 180), 20, (3, 9))
    image = painted(labels)
    for tile, overlap, expected in ((60, 20, 2 * 4), (60, None, 2 * 4), (60, 0, 2 * 3), (100, 90, 9)):
        model.looked_at.clear()  # type: ignore[operator, union-attr]
        found = model.predict(image, tile=tile, overlap=overlap, min_area=1)
        assert isinstance(found, Instances)
        assert sum(shape[0] for shape in model.looked_at) == expected  # type: ignore[union-attr]
        if overlap != 0:
            assert_same_objects(found, labels)


def test_a_small_object_is_dropped_only_after_stitching(model: RecurrentInstanceSegmenter) -> None:
    labels = np.zeros((20, 40), np.int32)
    labels[5, 5:8] = 1
    labels[10, 17:24] = 2  # three pixels of it in the left tile beyond the overlap
    found = model.predict(painted(labels), tile=21, overlap=2, min_area=4)
    assert isinstance(found, Instances)
    np.testing.assert_array_equal(found.boxes, [[17, 10, 24, 11]])


def test_crowded_tiles_are_told_of(model: RecurrentInstanceSegmenter, recwarn: pytest.WarningsRecorder) -> None:
    labels = np.zeros((64, 128), np.int32)
    labels[4:60:8, 4:20:8] = np.arange(1, 15).reshape(7, 2)  # 14 objects in the left half
    enough, few = (model.predict(painted(labels), tile=64, overlap=16, min_area=1, max_steps=n) for n in (15, 14))
    assert isinstance(enough, Instances) and isinstance(few, Instances)
    assert enough.warnings == () and len(enough) == len(few) == 14
    (message,) = few.warnings
    assert message.startswith("1 of 3 tiles used all 14 steps")
    assert [str(warning.message) for warning in recwarn] == [f"image: {message}"]
    assert few.summary()["warnings"] == [message]


def test_tiles_are_scaled_to_a_model_of_one_input_size() -> None:
    small = ModelConfig(
        feature_channels=8, backbone_channels=(8, 8, 8, 8), hidden_channels=8, confidence_pool=0, confidence_map=(8, 8)
    )
    model = RecurrentInstanceSegmenter(small).eval()
    with pytest.warns(UserWarning, match="4 of 4 tiles used all 2 steps"):
        found = model.predict(
            torch.rand(3, 60, 70), max_steps=2, threshold=0.0, mask_threshold=0.0, tile=48, overlap=16
        )
    assert isinstance(found, Instances)
    assert found.size == (60, 70) and found.masks.shape[1:] == (60, 70) and len(found)


def test_each_tile_is_refined_by_the_crf(model: RecurrentInstanceSegmenter) -> None:
    class Eraser:
        """Keeps what lies on pixels whose blue is 7, and tells of what it was given."""

        def refine(self, masks: torch.Tensor, image: torch.Tensor, threshold: float) -> torch.Tensor:
            assert masks.shape[1:] == image.shape[1:] == (40, 40) and threshold == 0.5
            return masks & (image[2] * 255 == 7)

    labels = ellipses((60, 90), 12, (3, 7))
    image = painted(labels)
    image[:, 45:, 2] = 0
    found = model.predict(image, tile=40, overlap=16, min_area=1, crf=Eraser())  # type: ignore[arg-type]
    assert isinstance(found, Instances)
    assert_same_objects(found, np.where(np.arange(90) < 45, labels, 0))


def test_lists_of_images_in_tiles(model: RecurrentInstanceSegmenter) -> None:
    scenes = [ellipses((90, 70), 9, (3, 8), seed) for seed in range(2)]
    results = model.predict([painted(labels) for labels in scenes], tile=50, min_area=1)
    assert isinstance(results, list) and len(results) == 2
    for found, labels in zip(results, scenes, strict=True):
        assert_same_objects(found, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 8}, "overlap: only tiles overlap"),
        ({"tile": 1000}, r"tile: expected 1 to 512 pixels \(the model's max_side\), got 1000"),
        ({"tile": 0}, "tile: expected 1 to 512"),
        ({"tile": 32, "overlap": 32}, "overlap: expected 0 to 31 pixels for tiles of 32, got 32"),
        ({"tile": 32, "overlap": -1}, "overlap: expected 0 to 31"),
    ],
)
def test_options_that_cannot_be_are_named(
    model: RecurrentInstanceSegmenter, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model.predict(np.zeros((8, 8), np.uint8), **options)  # type: ignore[arg-type]
