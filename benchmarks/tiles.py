"""A large image in tiles: objects found, time and memory.

    python benchmarks/tiles.py --tile 256 --overlap 64
    python benchmarks/tiles.py

lays the package's sample images, turned over at random, side by side to one image, looks at it in tiles, or as a whole,
and prints how many nuclei there are and were found, SBD, processor seconds, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings

import numpy as np
import torch

import fastris
from fastris.commands.demo import sample_pairs
from fastris.imageio import read_image, read_label_map
from fastris.metrics import symmetric_best_dice

SIDE = 256  # of each sample, from its top left corner


def mosaic(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An RGB image (size, size, 3) of samples and its label map."""
    random = np.random.default_rng(seed)
    samples = [(read_image(image), read_label_map(labels)) for image, labels in sample_pairs()]
    image, labels = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.int32)
    places = [(top, left) for top in range(0, size, SIDE) for left in range(0, size, SIDE)]
    for k, (top, left) in enumerate(places):
        at = slice(top, top + SIDE), slice(left, left + SIDE)
        flip = slice(None, None, random.choice([1, -1])), slice(None, None, random.choice([1, -1]))
        pixels, ids = (array[:SIDE, :SIDE][flip][: size - top, : size - left] for array in samples[k % len(samples)])
        image[at], labels[at] = pixels, np.where(ids > 0, ids + labels.max(), 0)
    return image, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="nuclei", help="a shipped model or a .safetensors file")
    parser.add_argument("--size", type=int, default=2000, help="side of the image in pixels")
    parser.add_argument("--tile", type=int, help="side of a tile in pixels; the whole image where not given")
    parser.add_argument("--overlap", type=int, help="what neighbouring tiles share at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = fastris.load(arguments.weights)
    image, labels = mosaic(arguments.size)
    model.predict(image[:SIDE, :SIDE])  # so that what is counted is not loading the libraries
    before = peak()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.predict(image, tile=arguments.tile, overlap=arguments.overlap)
    seconds = time.process_time() - start
    true = np.setdiff1d(labels, 0).size
    score = symmetric_best_dice(found.label_map(), labels)
    print(f"{len(found)} found of {true}, SBD {score:.3f}, {seconds:.1f} s of processor time, ", end="")
    print(f"peak memory {peak():.0f} MiB, {before:.0f} after the first sample")


def peak() -> float:
    """The most memory that the process has held, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
