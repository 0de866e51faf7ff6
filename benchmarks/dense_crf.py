"""Mean field in a dense CRF: the images, who takes part, and what a right answer is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import costs
import fastris
from fastris import reference
from fastris.crf import DenseCRF
from peers import Peer

EVERY_PAIR = "every pair of pixels"
LATTICE = "reference lattice"
TOLERANCE = {EVERY_PAIR: 0.025, LATTICE: 1e-4}
"""Mean error of a marginal beside the truth: what docs/crf.md states for the lattice, and rounding."""


def problem(side: int, labels: int, family: str) -> tuple[Tensor, Tensor]:
    """Smooth random logits (1, L, side, side), and an image: part of a photograph, or the worst there is, noise."""
    random = costs.generator("dense crf", side, labels, family)
    knots = max(5, side // 32)
    unary = 3 * torch.randn(1, labels, knots, knots, generator=random)
    unary = F.interpolate(unary, size=(side, side), mode="bilinear")
    if family == "noise":
        return unary, torch.randint(0, 256, (1, 3, side, side), generator=random, dtype=torch.uint8)
    from skimage import data

    photograph = torch.from_numpy(data.astronaut()[:side, 512 - side :].copy())
    return unary, photograph.permute(2, 0, 1).unsqueeze(0)


def dense_crf_peers(every_pair: bool) -> list[Peer]:
    """One input is (unary, image)."""
    peers = [_lattice("fastris", "auto"), _lattice(LATTICE, "reference")]
    return peers + ([Peer(EVERY_PAIR, fastris.__version__, all_pairs)] if every_pair else [])


def all_pairs(unary: Tensor, image: Tensor) -> Tensor:
    return reference.dense_crf(unary[0], image[0].to(unary.dtype)).unsqueeze(0)


def _lattice(name: str, backend: str) -> Peer:
    def call(unary: Tensor, image: Tensor) -> Tensor:
        with fastris.use_backend(backend), torch.inference_mode():
            return DenseCRF()(unary, image)

    return Peer(name, fastris.__version__, call)


def truth_of(unary: Tensor, image: Tensor, every_pair: bool) -> dict[str, Tensor]:
    """What answers are compared with: the lattice in fp64, and on small images the sum over every pair."""
    wide = unary.double()
    with fastris.use_backend("reference"), torch.inference_mode():
        truth = {LATTICE: DenseCRF()(wide, image)}
    return truth | ({EVERY_PAIR: all_pairs(wide, image)} if every_pair else {})


def disagreement(peer: Peer, found: Tensor, truth: dict[str, Tensor]) -> str:
    """How far an answer is from the truth, if it is too far; that by every pair is no answer of a lattice."""
    for name, expected in truth.items():
        off = float((found.double() - expected).abs().mean())
        if not off <= TOLERANCE[name] and (peer.name, name) != (EVERY_PAIR, LATTICE):  # nor is NaN
            return f"marginals are off those of {name} by {off:.1e} in the mean"
    return ""
