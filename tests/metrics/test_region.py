"""AP^r by hand, against its definition in other words, and against pycocotools where both measure the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastris import Instances
from fastris.errors import InputError
from fastris.metrics import REGION_THRESHOLDS, AveragePrecisionRegion, InstanceMetrics

Images = list[tuple[Instances, np.ndarray]]


def instances(scores: list[float], *rows: str) -> Instances:
    """Masks of one line each, "#" for a pixel."""
    masks = np.array([[[pixel == "#" for pixel in row]] for row in rows])
    return Instances(masks, np.array(scores), masks.shape[1:])


def target(row: str) -> np.ndarray:
    """A label map of one line: digits, "." for background, "x" for void."""
    return np.array([[{".": 0, "x": -1}.get(pixel, pixel) for pixel in row]], dtype=int)


def measured(images: Images) -> dict[str, float]:
    metric = AveragePrecisionRegion()
    for pred, labels in images:
        metric.update(pred, labels)
    return metric.compute()


def by_definition(images: Images, threshold: float) -> float:
    """The mean, over k = 1 … n targets, of the best precision at which k or more of them are found.

    One mask after the other, and the detections of all images in one list; every cut between two distinct scores is
    one precision and one recall.
    """
    targets = {
        (index, label): (labels == label)
        for index, (_, labels) in enumerate(images)
        for label in np.unique(labels)
        if label > 0
    }
    verdicts = []  # (score, right), without what is ignored
    free = set(targets)
    for score, index, mask in sorted(
        (
            (score, index, mask)
            for index, (pred, _) in enumerate(images)
            for score, mask in zip(pred.scores, pred.masks, strict=True)
        ),
        key=lambda one: -one[0],
    ):
        void = images[index][1] == -1
        seen = mask & ~void
        candidates = [
            ((seen & targets[key]).sum() / (seen | targets[key]).sum(), key) for key in free if key[0] == index
        ]
        best, key = max(candidates, default=(0.0, None), key=lambda one: one[0])
        if best > threshold:
            free.remove(key)
            verdicts.append((score, True))
        elif not (mask & void).sum() > mask.sum() / 2:
            verdicts.append((score, False))
    if not targets:
        return float(not verdicts)
    cuts = []
    for cut in {score for score, _ in verdicts}:
        above = [right for score, right in verdicts if score >= cut]
        cuts.append((sum(above), sum(above) / len(above)))
    found = range(1, len(targets) + 1)
    return math.fsum(max([p for hits, p in cuts if hits >= k], default=0.0) for k in found) / len(targets)


def random_images(seed: int, void: bool = True) -> Images:
    """Three images of nine blocks; detections are blocks shifted, cut, doubled or invented; every score another."""
    random = np.random.default_rng(seed)
    images: Images = []
    for _ in range(3):
        labels = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((10, 10), int))
        labels[random.random(labels.shape) < 0.1] = 0
        if void:
            labels[:, random.integers(30) :][:, :6] = -1
        masks = [np.roll(labels == k, random.integers(-3, 4, 2), (0, 1)) for k in random.integers(1, 10, 10)]
        masks += [random.random(labels.shape) < 0.2 for _ in range(2)]
        images.append((Instances(np.array(masks), random.random(12), labels.shape), labels))
    return images


def tied(pred: Instances, labels: np.ndarray) -> bool:
    """Whether a mask has the same positive IoU with two targets."""
    targets = [labels == label for label in np.unique(labels) if label > 0]
    for mask in pred.masks & (labels != -1):
        ious = [iou for one in targets if (iou := (mask & one).sum() / (mask | one).sum())]
        if len(set(ious)) < len(ious):
            return True
    return False


def masks_and_labels() -> st.SearchStrategy[tuple[Instances, np.ndarray]]:
    """Up to four masks of 3 × 4 pixels with few distinct scores, and a label map with void.

    Without equal IoUs of one mask: which target it takes would be a matter of order.
    """
    return (
        st.integers(0, 4)
        .flatmap(
            lambda count: st.tuples(
                st.builds(
                    lambda masks, scores: Instances(masks, scores, (3, 4)),
                    arrays(bool, (count, 3, 4)),
                    arrays(np.float32, count, elements=st.sampled_from([0.25, 0.5, 1.0])),
                ),
                arrays(np.int32, (3, 4), elements=st.integers(-1, 3)),
            )
        )
        .filter(lambda image: not tied(*image))
    )


class TestByHand:
    def test_a_ranking_over_two_images(self):
        first = instances([0.9, 0.6], "##....", "##....")  # the second finds the same object again
        second = instances([0.8, 0.7], "....##", "##....")
        values = measured([(first, target("11..22")), (second, target("11...."))])
        # right, wrong, right, wrong of 3 targets: precision 1 at recall 1/3, 2/3 at 2/3
        assert values["apr50"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
        assert values["apr90"] == values["apr"] == pytest.approx(5 / 9)

    def test_precision_is_interpolated(self):
        pred = instances([0.9, 0.8, 0.7], "...#...", "#......", ".#.....")
        # wrong, right, right: precision 0, 1/2, 2/3, of which 2/3 counts for both recalls
        assert measured([(pred, target("12....."))])["apr50"] == pytest.approx(2 / 3)

    def test_each_threshold_has_its_own(self):
        values = measured([(instances([1.0], "#######..."), target("1111111111"))])  # IoU 0.7, not above 0.7
        assert [values[f"apr{k}0"] for k in range(5, 10)] == [1, 1, 0, 0, 0]
        assert values["apr"] == pytest.approx(2 / 5)
        assert values["apr_vol"] == pytest.approx(6 / 9)

    def test_a_detection_takes_the_best_target_that_is_left(self):
        pred = instances([0.9, 0.8], "###.....", "####....")
        # IoU 3/4 and 1 with target 1: the better one comes too late
        assert measured([(pred, target("1111...2"))])["apr50"] == pytest.approx(1 / 2)
        # the second's best, 3/4 with target 1, is taken: it is left target 2, with 1/4, enough at 0.1 and 0.2
        assert measured([(pred, target("1112...."))])["apr_vol"] == pytest.approx((2 * 1 + 7 / 2) / 9)

    def test_equal_scores_are_one_point(self):
        right, wrong = instances([0.5], "##.."), instances([0.5], "..##")
        for images in (
            [(right, target("11..")), (wrong, target("11.."))],
            [(wrong, target("11..")), (right, target("11.."))],
        ):
            assert measured(images)["apr50"] == pytest.approx(1 / 2 * 1 / 2)

    def test_a_label_map_is_detections_of_one_score(self):
        pred = np.array([[5, 5, 0, 9]])
        metric = AveragePrecisionRegion()
        metric.update(pred, target("11.."))
        assert metric.compute() == measured([(instances([1.0, 1.0], "##..", "...#"), target("11.."))])
        assert metric.compute()["apr50"] == pytest.approx(1 / 2)


class TestVoid:
    def test_pixels_of_void_count_for_neither(self):
        assert measured([(instances([1.0], "####.."), target("11xx.."))])["apr90"] == 1

    def test_a_false_positive_mostly_in_void_is_ignored(self):
        good = "##......"
        for other, expected in (("....###.", 1.0), ("...####.", 1.0), ("..####..", 0.5), ("..###...", 0.5)):
            pred = instances([0.5, 0.9], good, other)  # in void: 3 of 3, 3 of 4, 2 of 4, 1 of 3
            assert measured([(pred, target("11..xxx."))])["apr50"] == pytest.approx(expected), other

    def test_a_true_positive_mostly_in_void_counts(self):
        assert measured([(instances([1.0], "#####..."), target("11xxx..."))])["apr50"] == 1

    def test_a_target_is_what_is_left_of_it(self):
        assert measured([(instances([1.0], "......"), target("xxxxxx"))])["apr50"] == 0  # an empty mask is wrong
        assert measured([(instances([1.0], "##...."), target("xxxxxx"))])["apr50"] == 1  # nothing to find or to judge

    def test_a_label_map_with_void_on_both_sides(self):
        metric = AveragePrecisionRegion()
        metric.update(target("1x22.x"), target("112x.x"))
        assert metric.compute()["apr90"] == 1


class TestEmpty:
    NOTHING = Instances(np.zeros((0, 1, 4), bool), np.zeros(0), (1, 4))

    def test_nothing_found_where_nothing_is(self):
        assert set(measured([(self.NOTHING, target("...."))]).values()) == {1.0}

    def test_only_one_is_empty(self):
        assert set(measured([(self.NOTHING, target("11.."))]).values()) == {0.0}
        assert set(measured([(instances([1.0], "##.."), target("...."))]).values()) == {0.0}

    def test_no_pixels_at_all(self):
        nothing = Instances(np.zeros((0, 0, 4), bool), np.zeros(0), (0, 4))
        assert set(measured([(nothing, np.zeros((0, 4), int))]).values()) == {1.0}

    def test_no_image(self):
        assert all(map(math.isnan, measured([]).values()))

    def test_an_image_without_objects_still_has_false_positives(self):
        good, bad = instances([0.5], "##.."), instances([0.9], "##..")
        assert measured([(good, target("11..")), (bad, target("...."))])["apr50"] == pytest.approx(1 / 2)


class TestAgainstTheDefinition:
    @settings(deadline=None, max_examples=150)
    @given(st.lists(masks_and_labels(), min_size=1, max_size=3))
    def test_tiny_images(self, images):
        values = measured(images)
        expected = [by_definition(images, threshold) for threshold in REGION_THRESHOLDS]
        assert [values[f"apr{k}0"] for k in range(5, 10)] == pytest.approx(expected[4:])
        assert values["apr"] == pytest.approx(sum(expected[4:]) / 5)
        assert values["apr_vol"] == pytest.approx(sum(expected) / 9)

    @pytest.mark.parametrize("seed", range(6))
    def test_blocks(self, seed):
        images = random_images(seed)
        values = measured(images)
        expected = [by_definition(images, threshold) for threshold in REGION_THRESHOLDS]
        assert 0 < values["apr50"] < 1
        assert [values[f"apr{k}0"] for k in range(5, 10)] == pytest.approx(expected[4:])
        assert values["apr_vol"] == pytest.approx(sum(expected) / 9)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(masks_and_labels(), min_size=1, max_size=3), st.permutations(range(1, 4)), st.randoms())
    def test_neither_names_nor_the_order_of_images_matter(self, images, order, shuffled):
        names = np.array([0, *(1000 * label for label in order), -1])  # index -1 is the last: void stays void
        other = [(pred, names[labels]) for pred, labels in images]
        shuffled.shuffle(other)
        assert measured(other) == measured(images)

    @settings(deadline=None, max_examples=50)
    @given(arrays(np.int32, (4, 5), elements=st.integers(-1, 4)))
    def test_perfect_is_one(self, labels):
        assert set(measured([(Instances.from_label_map(labels), labels)]).values()) == {1.0}

    @pytest.mark.parametrize("seed", range(3))
    def test_pycocotools_at_every_recall(self, seed):
        """COCO's AP samples the same interpolated precision; at the recalls 1/n … n/n its mean is the whole area."""
        images = random_images(seed, void=False)
        values = measured(images)
        expected = coco_average_precision(images)
        assert [values[f"apr{k}0"] for k in range(5, 10)] == pytest.approx(expected[4:])
        assert values["apr_vol"] == pytest.approx(sum(expected) / 9)


def coco_average_precision(images: Images) -> list[float]:
    """AP by COCOeval at each threshold, from the masks as they are."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluate = pytest.importorskip("pycocotools.cocoeval").COCOeval
    sizes = [{"id": k, "height": pred.size[0], "width": pred.size[1]} for k, (pred, _) in enumerate(images, 1)]
    truth, found = coco(), coco()
    for dataset, parts in (
        (truth, [Instances.from_label_map(labels) for _, labels in images]),
        (found, [pred for pred, _ in images]),
    ):
        annotations: list[dict[str, Any]] = [one for k, part in enumerate(parts, 1) for one in part.to_coco(k)]
        numbered = [{"id": number, "iscrowd": 0, **one} for number, one in enumerate(annotations, 1)]
        dataset.dataset = {"images": sizes, "categories": [{"id": 1}], "annotations": numbered}
        dataset.createIndex()
    count = len(truth.anns)
    evaluation = evaluate(truth, found, "segm")
    evaluation.params.iouThrs = np.array(REGION_THRESHOLDS) + 1e-9  # COCO's is "at least", AP^r's "more than"
    evaluation.params.recThrs = np.arange(1, count + 1) / count
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return [float(value) for value in evaluation.eval["precision"][:, :, 0, 0, -1].mean(axis=1)]


class TestInputs:
    def test_a_tensor_as_the_target(self):
        pred, labels = random_images(0)[0]
        assert measured([(pred, torch.from_numpy(labels))]) == measured([(pred, labels)])

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.zeros((1, 5), int), r"same shape, got \(1, 4\) and \(1, 5\)"),
            (np.zeros((1, 4)), "target must be an integer"),
            (np.zeros((1, 1, 4), int), "target must be an integer"),
            (np.full((1, 4), -2), "target must not have negative ids other than -1"),
        ],
    )
    def test_unusable_targets_are_named_and_nothing_is_counted(self, labels, message):
        for metric in (AveragePrecisionRegion(), InstanceMetrics()):
            with pytest.raises(InputError, match=message):
                metric.update(instances([1.0], "##.."), labels)
            assert math.isnan(metric.compute()["apr50"])
