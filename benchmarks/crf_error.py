"""How far the marginals of DenseCRF are from those of a mean field over every pair of pixels: the table of docs/crf.md.

python benchmarks/crf_error.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

import fastris
from fastris import reference
from fastris.crf import DenseCRF
from fastris.imageio import read_image

SIDE, LABELS, SEEDS = 40, 4, 2
UNARIES = {"deviation 3, varying over 8 pixels": (3.0, 5), "deviation 2, varying over 2.5 pixels": (2.0, 16)}
"""Deviation of the logits, and how many of them along a side are independent."""


def images() -> list[Tensor]:
    """uint8 (3, SIDE, SIDE) parts of the sample images and of a photograph."""
    samples = sorted(Path(fastris.__file__).parent.glob("samples/*_rgb.png"))
    parts = [read_image(path)[40:80, 60:100] for path in samples]
    photograph = data.astronaut()
    parts += [photograph[100:140, 150:190], photograph[300:340, 200:240]]
    return [torch.from_numpy(part.copy()).permute(2, 0, 1) for part in parts]


def errors(image: Tensor, deviation: float, knots: int, iterations: int, seed: int) -> tuple[float, float, float]:
    """Mean and largest error of a marginal, and the share of pixels with another likeliest label."""
    random = torch.Generator().manual_seed(seed)
    unary = deviation * torch.randn(1, LABELS, knots, knots, generator=random)
    unary = F.interpolate(unary, size=(SIDE, SIDE), mode="bilinear")
    found = DenseCRF(iterations=iterations)(unary, image.unsqueeze(0))[0]
    exact = reference.dense_crf(unary[0].double(), image.double(), iterations=iterations)
    off = (found - exact).abs()
    return float(off.mean()), float(off.max()), float((found.argmax(0) != exact.argmax(0)).double().mean())


def main() -> None:
    print(
        "| logits | iterations | mean: median, worst image | largest | another likeliest label: median, worst image |"
    )
    print("|---|---:|---:|---:|---:|")
    for name, (deviation, knots) in UNARIES.items():
        for iterations in (1, 5, 10):
            every = [errors(image, deviation, knots, iterations, seed) for image in images() for seed in range(SEEDS)]
            mean, largest, changed = np.array(every).T
            print(
                f"| {name} | {iterations} | {np.median(mean):.4f}, {mean.max():.4f} | {largest.max():.2f} "
                f"| {np.median(changed):.1%}, {changed.max():.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
