"""A training step of recurrent instance segmentation: the batch, and the back ends that take part."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import costs
import fastris
from fastris.nn.loss import LossTerms
from fastris.training.graphed import new_adam
from peers import Peer

TOLERANCE = {"float32": {"loss": 1e-5, "gradient": 1e-3}, "bfloat16": {"loss": 1e-2, "gradient": 0.3}}
"""Largest error beside the reference in fp64, relative to the length of what is compared.

The bfloat16 convolutions, which all share, turn the gradient of the full case by 18% of its length.
"""

CLIP = 5.0


@dataclass(frozen=True)
class Step:
    """What every peer has to do: Adam steps of the default model on one batch.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: (B, H, W) label map.
        counts: (B,) instances of each image.
        steps: T.
        dtype: "float32", or "bfloat16" under autocast.
    """

    images: Tensor
    labels: Tensor
    counts: Tensor
    steps: int
    dtype: str
    _trained: dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]] = field(default_factory=dict)

    def loss(self, model: torch.nn.Module) -> LossTerms:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            output = model(self.images, self.steps)
        return fastris.RISLoss()(output, self.labels, self.counts, int(self.counts.max()))

    def train(self, peer: str) -> None:
        """One step of the model that this peer trains."""
        if peer not in self._trained:
            model = new_model()
            self._trained[peer] = model, new_adam(model.parameters(), 1e-3, self.images.device)
        model, optimizer = self._trained[peer]
        optimizer.zero_grad()
        self.loss(model).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def answer(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """The parts of the loss of this model, and its gradient as one vector."""
        terms = self.loss(model)
        gradient = torch.autograd.grad(terms.total, list(model.parameters()), materialize_grads=True)
        parts = {"loss": terms.total, "mask term": terms.mask, "confidence term": terms.confidence}
        return {name: part.detach() for name, part in parts.items()} | {
            "gradient": torch.cat([one.flatten() for one in gradient])
        }

    def truth(self) -> dict[str, Tensor]:
        """The answer of the reference in fp64."""
        wide = Step(self.images.double(), self.labels, self.counts, self.steps, "float64")
        with fastris.use_backend("reference"):
            return wide.answer(new_model().double())


def new_model() -> torch.nn.Module:
    """The default configuration with the same parameters every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fastris.RecurrentInstanceSegmenter()


def new_step(batch: int, side: int, steps: int, dtype: str) -> Step:
    """Bright ellipses on dark noise, from 4 to T − 2 in an image where there is room for as many."""
    random = costs.generator("ris step", batch, side, steps)
    most = max(1, steps - 2)
    _, labels = costs.masks(batch, 1, most, side, random)
    counts = torch.randint(min(4, most), most + 1, (batch,), generator=random)
    labels = torch.where(labels <= counts.view(-1, 1, 1), labels, 0)
    images = 0.3 * torch.rand(batch, 3, side, side, generator=random) + 0.5 * (labels > 0).unsqueeze(1)
    return Step(images, labels, counts, steps, dtype)


def ris_step_peers() -> list[Peer]:
    """One input is (step,); what is timed goes on training, and the answer is that of the new model."""
    return [_peer("fastris", "auto"), _peer("reference back end", "reference")]


def _peer(name: str, backend: str) -> Peer:
    def call(step: Step) -> None:
        with fastris.use_backend(backend):
            step.train(name)

    def answer(result: None, step: Step) -> dict[str, Tensor]:
        with fastris.use_backend(backend):
            return step.answer(new_model())

    return Peer(name, fastris.__version__, call, answer)


def disagreement(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: str) -> str:
    """What differs from the truth; empty where nothing does."""
    for name, expected in truth.items():
        off = float((found[name].double() - expected).norm() / expected.norm())
        if not off <= TOLERANCE[dtype]["gradient" if name == "gradient" else "loss"]:  # nor is NaN
            return f"the {name} is off by {off:.1e}"
    return ""
