"""Fit the parameters of the dense CRF to a model's masks of the validation images of DSB2018.

    python benchmarks/fit_crf.py --data stage1_train.zip

The model looks at every image once. Then a coordinate search maximises the mean SBD over every other image: each
parameter in turn is set to the best of its values, twice, or until a whole turn changes nothing. The images in
between, which the search has not seen, tell what the parameters are worth. Prints both, and writes
benchmarks/results/crf_fit.json with every trial.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastris
from fastris.crf import DenseCRF
from fastris.data import open_dataset
from fastris.imageio import atomic_write
from fastris.metrics import InstanceMetrics

Parameters = dict[str, float]

VALUES: dict[str, tuple[float, ...]] = {
    "bilateral_compat": (0, 2, 4, 8, 16),
    "bilateral_srgb": (3, 6, 13, 25),
    "bilateral_sxy": (4, 8, 16, 32),
    "gaussian_compat": (0, 1, 2, 4),
    "gaussian_sxy": (1, 2, 3),
    "iterations": (2, 5, 10),
}
START: Parameters = {
    "bilateral_compat": 4,
    "bilateral_srgb": 13,
    "bilateral_sxy": 8,
    "gaussian_compat": 2,
    "gaussian_sxy": 2,
    "iterations": 5,
}
TURNS = 2
MIN_AREA = 4
"""What predict() drops."""


class Example(NamedTuple):
    """An image and what the model made of it."""

    name: str
    image: Tensor  # uint8 (3, H, W)
    labels: np.ndarray  # (H, W)
    mask_logits: Tensor  # (N, H, W)


def examples_of(model: fastris.RecurrentInstanceSegmenter, data: str, max_instances: int) -> list[Example]:
    found = []
    for sample in open_dataset(data, "validation", max_instances=max_instances):
        with torch.inference_mode():
            pixels = sample.image.float().unsqueeze(0) / 255
            mask_logits, _ = model._find(pixels, model.config.max_steps, 0.5, None)[0]
        found.append(Example(sample.name, sample.image, sample.labels.numpy(), mask_logits))
    return found


def label_map(masks: Tensor) -> np.ndarray:
    """(N, H, W) bool → (H, W): the earlier mask wins, and small ones are dropped."""
    masks = masks[masks.flatten(1).sum(1) >= MIN_AREA]
    return fastris.Instances(masks.numpy(), np.ones(len(masks)), tuple(masks.shape[1:])).label_map()


@torch.inference_mode()
def score(examples: Sequence[Example], parameters: Parameters | None) -> dict[str, float]:
    """Metrics with a CRF, or with no CRF where there are no parameters."""
    metrics = InstanceMetrics()
    crf = None if parameters is None else DenseCRF(**{**parameters, "iterations": int(parameters["iterations"])})
    for one in examples:
        masks = one.mask_logits > 0 if crf is None else crf.refine(one.mask_logits, one.image)
        metrics.update(label_map(masks), one.labels, one.name)
    return metrics.compute()


def search(examples: Sequence[Example]) -> tuple[Parameters, list[dict[str, Any]]]:
    """The best parameters, and all trials."""
    trials: list[dict[str, Any]] = []

    def sbd(parameters: Parameters) -> float:
        known = next((trial for trial in trials if trial["parameters"] == parameters), None)
        if known is None:
            known = {"parameters": parameters, "metrics": score(examples, parameters)}
            trials.append(known)
            print(f"{known['metrics']['sbd']:.4f}", parameters, flush=True)
        return known["metrics"]["sbd"]

    best = START
    for _ in range(TURNS):
        before = best
        for name, values in VALUES.items():
            best = max([best, *({**best, name: value} for value in values)], key=sbd)
        if best == before:
            break
    return best, trials


def row(name: str, metrics: dict[str, float]) -> str:
    return f"{name:28}" + "".join(f"{metrics[key]:8.3f}" for key in ("sbd", "dic", "map", "ap50", "fbd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="DSB2018 stage1_train.zip, or its directory")
    parser.add_argument("--weights", default="nuclei", help="a shipped model or a .safetensors file")
    parser.add_argument("--max-instances", type=int, default=20, help="only images with at most this many nuclei (20)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "crf_fit.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    examples = examples_of(fastris.load(arguments.weights), arguments.data, arguments.max_instances)
    fitted_on, held_out = examples[::2], examples[1::2]
    best, trials = search(fitted_on)
    halves = {"fitted on": fitted_on, "held out": held_out}
    results = {
        half: {"images": len(ones), "without": score(ones, None), "with": score(ones, best)}
        for half, ones in halves.items()
    }
    print(f"\n{best}\n\n{'':28}" + "".join(f"{name:>8}" for name in ("SBD", "|DiC|", "mAP", "AP@0.5", "FBD")))
    for half, result in results.items():
        for which in ("without", "with"):
            print(row(f"{half} ({result['images']}), {which}", result[which]))
    report = {
        "command": f"python benchmarks/fit_crf.py --data {os.path.basename(arguments.data)} "
        f"--max-instances {arguments.max_instances}",
        "weights": os.path.basename(arguments.weights),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "numpy")} | {"fastris": fastris.__version__},
        "seconds": round(time.perf_counter() - start),
        "parameters": best,
        "results": results,
        "trials": trials,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
