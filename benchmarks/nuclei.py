"""The shipped model beside Otsu and watershed on the held-out nuclei images.

    python benchmarks/nuclei.py --data stage1_train.zip

prints SBD, |DiC|, mean AP, AP@0.5 and the time per image of both on the same images of the validation split, and writes
benchmarks/results/nuclei.json with a row for each image.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import classical
import fastris
from fastris.data import InstanceDataset, open_dataset
from fastris.imageio import atomic_write
from fastris.metrics import InstanceMetrics

SUBSETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "256x256, at most 20 nuclei": ({"size": (256, 256), "max_instances": 20}, {}),
    "all sizes, at most 20 nuclei": ({"max_instances": 20}, {}),
    "all, in tiles": ({}, {"tile": 192, "overlap": 48}),
}
"""By name: which images, and how ``predict`` looks at them."""


def measure(segment: Callable[[np.ndarray], np.ndarray], images: InstanceDataset) -> dict[str, Any]:
    """Metrics of a function from an (H, W, 3) image to a label map, their rows, and the median time of an image."""
    metrics = InstanceMetrics()
    milliseconds = []
    for sample in images:
        image = sample.image.permute(1, 2, 0).numpy()
        start = time.perf_counter()
        labels = segment(image)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        metrics.update(labels, sample.labels, sample.name)
    return {**metrics.compute(), "milliseconds_per_image": float(np.median(milliseconds)), "rows": metrics.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="DSB2018 stage1_train.zip, or its directory")
    parser.add_argument("--weights", default="nuclei", help="a shipped model or a .safetensors file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "nuclei.json")
    arguments = parser.parse_args()
    model = fastris.load(arguments.weights)
    report: dict[str, Any] = {
        "command": f"python benchmarks/nuclei.py --data {os.path.basename(arguments.data)}",
        "split": "validation",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("fastris", "torch", "numpy", "scipy", "scikit-image")},
        "results": {},
    }
    print(f"{'images':30}{'method':22}{'n':>4}{'SBD':>8}{'|DiC|':>8}{'mAP':>8}{'AP@0.5':>8}{'ms/image':>10}")
    for subset, (chosen, options) in SUBSETS.items():
        images = open_dataset(arguments.data, "validation", **chosen)
        images.preload()
        methods = {
            f"fastris {arguments.weights}": lambda image, options=options: model.predict(image, **options).label_map(),
            "Otsu and watershed": classical.segment,
        }
        for method, segment in methods.items():
            found = measure(segment, images)
            report["results"].setdefault(subset, {})[method] = found
            scores = f"{found['sbd']:8.3f}{found['dic']:8.2f}{found['map']:8.3f}{found['ap50']:8.3f}"
            print(
                f"{subset:30}{method:22}{found['images']:4}{scores}{found['milliseconds_per_image']:10.0f}", flush=True
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
