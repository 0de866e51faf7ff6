"""The models that come with the package: small, documented, and as good as the README says."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import fastris
from fastris.commands.demo import sample_pairs
from fastris.data import in_validation, open_dataset
from fastris.imageio import read_image, read_label_map
from fastris.loading import read_metadata, shipped
from fastris.metrics import InstanceMetrics, symmetric_best_dice

WEIGHTS = Path(str(resources.files("fastris") / "weights"))
ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("FASTRIS_DSB2018", ROOT.parent / "shared/data/dsb2018/stage1_train.zip"))


def test_there_is_a_model_for_nuclei():
    assert "nuclei" in shipped()


@pytest.mark.parametrize("name", shipped())
def test_a_model_is_small_documented_and_says_how_it_was_made(name: str) -> None:
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size <= 5e6
    card = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    metadata = read_metadata(name)
    assert f"--preset {name}" in card
    assert metadata["training"]["seed"] >= 0 and metadata["validation"]["step"] > 0


def test_the_samples_are_found_about_right() -> None:
    model = fastris.load("nuclei")
    metrics = InstanceMetrics()
    for image, labels in sample_pairs():
        metrics.update(model.predict(read_image(image)).label_map(), read_label_map(labels), image.name)
    assert metrics.compute()["sbd"] >= 0.5, metrics.rows


def test_tiles_find_what_is_too_much_for_one_look() -> None:
    model = fastris.load("nuclei")
    pairs = [(read_image(image)[:256, :256], read_label_map(labels)[:256, :256]) for image, labels in sample_pairs()]
    apart = [np.where(labels > 0, labels + 100 * k, 0) for k, (_, labels) in enumerate(pairs)]
    labels = np.block([apart[:3], apart[3:]])  # 71 nuclei on 512 × 768 pixels
    image = np.vstack([np.hstack([image for image, _ in row]) for row in (pairs[:3], pairs[3:])])
    whole, tiled = (symmetric_best_dice(model.predict(image, tile=tile).label_map(), labels) for tile in (None, 256))
    assert tiled >= 0.5 and tiled > whole


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"no DSB2018 data at {REAL} (FASTRIS_DSB2018 names another place)")
def test_held_out_images_of_at_most_20_nuclei() -> None:
    model = fastris.load("nuclei")
    metrics = InstanceMetrics()
    for sample in open_dataset(REAL, "validation", size=(256, 256), max_instances=20):
        assert in_validation(sample.name)
        metrics.update(model.predict(sample.image).label_map(), sample.labels, sample.name)
    means = metrics.compute()
    assert means["images"] == 18
    assert means["sbd"] >= 0.60 and means["dic"] <= 2.5, means
