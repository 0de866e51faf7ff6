"""Otsu and watershed: the classical pipeline to compare a trained model with.

    python benchmarks/classical.py --data stage1_train.zip

prints SBD, |DiC|, mean AP and AP@0.5 on the validation split and writes benchmarks/results/classical.json.
Its parameters were chosen on the training split. Needs scikit-image.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastris.data import open_dataset
from fastris.imageio import atomic_write
from fastris.metrics import InstanceMetrics

PARAMETERS: dict[str, Any] = {"blur": 1.0, "smooth": 1.0, "min_distance": 5, "min_area": 15}


def segment(
    image: np.ndarray, blur: float = 1.0, smooth: float = 1.0, min_distance: int = 5, min_area: int = 15
) -> np.ndarray:
    """Label the nuclei of an image.

    Gaussian, Otsu, inversion where the background is the brighter part (more than half above the threshold),
    distance transform, its local maxima as seeds, watershed, small objects removed.

    Args:
        image: uint8 (H, W, 3).
        blur: sigma of the Gaussian on the grey image, pixels.
        smooth: sigma of the Gaussian on the distance transform, pixels.
        min_distance: least distance of two seeds, pixels.
        min_area: smaller objects are removed, pixels.

    Returns:
        int32 (H, W), 0 = background.
    """
    from scipy import ndimage
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    grey = ndimage.gaussian_filter(image.astype(np.float32).mean(axis=2), blur)
    if grey.min() == grey.max():
        return np.zeros(grey.shape, np.int32)
    foreground = grey > threshold_otsu(grey)
    if foreground.mean() > 0.5:
        foreground = ~foreground
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(foreground), smooth)
    parts = ndimage.label(foreground)[0]
    seeds = np.zeros(grey.shape, np.int32)
    peaks = peak_local_max(distance, min_distance=min_distance, labels=parts, exclude_border=False)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, seeds, mask=foreground)
    small = np.flatnonzero(np.bincount(labels.reshape(-1)) < min_area)
    return np.where(np.isin(labels, small), 0, labels).astype(np.int32)


def evaluate(data: str, split: str, size: tuple[int, int] | None, **parameters: Any) -> InstanceMetrics:
    """Metrics of :func:`segment` over the images of a split with at most 20 instances."""
    metrics = InstanceMetrics()
    for sample in open_dataset(data, split, max_instances=20, size=size):
        image = sample.image.permute(1, 2, 0).numpy()
        metrics.update(segment(image, **parameters), sample.labels, sample.name)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="DSB2018 stage1_train.zip, or its directory")
    parser.add_argument("--split", default="validation", choices=["train", "validation", "all"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "classical.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "method": "Gaussian, Otsu, distance-transform watershed",
        "parameters": PARAMETERS,
        "data": os.path.basename(arguments.data),
        "split": arguments.split,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-image")},
        "results": {},
    }
    print(f"{'images':28}{'n':>5}{'SBD':>8}{'|DiC|':>8}{'mAP':>8}{'AP@0.5':>8}{'ms/image':>10}")
    for name, size in (("256x256, at most 20 nuclei", (256, 256)), ("all, at most 20 nuclei", None)):
        start = time.perf_counter()
        metrics = evaluate(arguments.data, arguments.split, size, **PARAMETERS)
        row = metrics.compute()
        spent = 1e3 * (time.perf_counter() - start) / max(row["images"], 1)
        results["results"][name] = {**row, "milliseconds_per_image": spent, "rows": metrics.rows}
        scores = f"{row['sbd']:8.3f}{row['dic']:8.2f}{row['map']:8.3f}{row['ap50']:8.3f}"
        print(f"{name:28}{row['images']:5}{scores}{spent:10.1f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
