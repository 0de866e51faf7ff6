"""Overlays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastris.errors import InputError
from fastris.instances import Instances
from fastris.viz import overlay
from fastris.viz.drawing import FILL, LARGE, PALETTE, fit, font_of, wrap

IMAGE = np.full((64, 80, 3), 100, np.uint8)
LABELS = np.zeros((64, 80), np.int32)
LABELS[10:30, 10:30] = 1
LABELS[30:60, 30:70] = 2


def test_instances_are_tinted_outlined_and_the_rest_is_left() -> None:
    picture = np.asarray(overlay(IMAGE, LABELS, numbers=False))
    scale = picture.shape[0] // 64
    assert picture.shape == (64 * scale, 80 * scale, 3)
    for label, (row, column) in ((1, (15, 15)), (2, (50, 60))):
        tint = np.round((1 - FILL) * 100 + FILL * PALETTE[label - 1])
        np.testing.assert_array_equal(picture[row * scale, column * scale], tint)
    np.testing.assert_array_equal(picture[10 * scale, 20 * scale], PALETTE[0])
    assert (picture[: 10 * scale] == 100).all()


def test_the_number_of_a_small_instance_is_drawn_beside_it() -> None:
    labels = np.zeros((512, 512), np.int32)
    for label, left in ((1, 250), (2, 500)):  # the second has no room on its right
        labels[250:258, left : left + 8] = label
    image = np.full((512, 512), 100, np.uint8)
    plain, numbered = (np.asarray(overlay(image, labels, numbers=numbers)).astype(int) for numbers in (False, True))
    changed = np.abs(plain - numbered).sum(axis=2) > 0
    assert changed[:, 258:280].any()
    assert changed[:, 480:500].any()
    assert np.count_nonzero(changed & (labels > 0)) < 20


def test_numbers_are_drawn_inside_their_instance() -> None:
    plain = np.asarray(overlay(IMAGE, LABELS, numbers=False)).astype(int)
    numbered = np.asarray(overlay(IMAGE, LABELS)).astype(int)
    scale = plain.shape[0] // 64
    changed = np.abs(plain - numbered).sum(axis=2) > 0
    large = np.kron(LABELS, np.ones((scale, scale), int))
    assert set(large[changed].tolist()) == {1, 2}


@pytest.mark.parametrize(
    "image",
    [IMAGE, IMAGE[:, :, 0], torch.from_numpy(IMAGE.copy()).permute(2, 0, 1) / 255, Image.fromarray(IMAGE), "path"],
    ids=["array", "grey", "tensor", "pil", "path"],
)
def test_all_kinds_of_image_look_the_same(tmp_path: Path, image: object) -> None:
    if isinstance(image, str):
        image = tmp_path / "a.png"
        Image.fromarray(IMAGE).save(image)
    np.testing.assert_array_equal(np.asarray(overlay(image, LABELS)), np.asarray(overlay(IMAGE, LABELS)))


def test_label_maps_and_instances_look_the_same() -> None:
    instances = Instances.from_label_map(LABELS)
    expected = np.asarray(overlay(IMAGE, LABELS))
    np.testing.assert_array_equal(np.asarray(instances.plot(IMAGE)), expected)
    np.testing.assert_array_equal(np.asarray(overlay(IMAGE, torch.from_numpy(LABELS))), expected)


def test_a_very_large_image_is_reduced_and_a_pixel_is_enlarged() -> None:
    assert max(overlay(np.zeros((2100, 3000), np.uint8), np.zeros((2100, 3000), np.int32)).size) == LARGE
    assert overlay(IMAGE[:1, :1], LABELS[:1, :1]).size == (512, 512)
    assert overlay(IMAGE[:1], LABELS[:1]).size[1] >= 1


def test_hundreds_of_instances_are_drawn() -> None:
    labels = np.arange(1, 401, dtype=np.int32).reshape(20, 20).repeat(8, 0).repeat(8, 1)
    assert overlay(np.zeros((160, 160), np.uint8), labels).size == (480, 480)


def test_other_sizes_and_types_are_refused() -> None:
    with pytest.raises(InputError, match="instances"):
        overlay(IMAGE, LABELS[:-1])
    with pytest.raises(InputError, match="integer labels"):
        overlay(IMAGE, LABELS / 2)
    with pytest.raises(InputError, match="complex64"):
        overlay(IMAGE.astype(np.complex64), LABELS)


def test_what_predict_takes_can_be_drawn_on() -> None:
    deep = IMAGE[:, :, 0].astype(np.uint16) * 200
    deep[0, 0], deep[0, 1] = 0, 65535
    stretched = np.round(deep / 257).astype(np.uint8)
    expected = np.asarray(overlay(stretched, LABELS))
    for image in (deep, Image.fromarray(deep), torch.from_numpy(deep), torch.from_numpy(deep)[None].expand(3, -1, -1)):
        np.testing.assert_array_equal(np.asarray(overlay(image, LABELS)), expected)
    half = torch.from_numpy(IMAGE).permute(2, 0, 1).bfloat16() / 256  # exact in bfloat16
    np.testing.assert_array_equal(overlay(half, LABELS), overlay(half.float(), LABELS))


def test_text_is_cut_or_wrapped_to_the_width() -> None:
    text = "a line of words that is longer than it may be"
    for width in (60, 100, 1000):
        assert font_of(14).getlength(fit(text, width, 14)) <= width
        lines = wrap(text, width, 14)
        assert all(font_of(14).getlength(line) <= width for line in lines)
        assert " ".join(lines) == text
    assert fit(text, 1000, 14) == text
    assert fit(text, 100, 14).startswith("a line") and fit(text, 100, 14).endswith("…")
