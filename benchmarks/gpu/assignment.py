"""``assignment`` of matrices on the device, beside torch-linear-assignment and SciPy over the bus."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import costs
import fastris
from gpu.harness import Absent, Harness, Peer, Row, ready
from peers import _imported

SHAPES = {(32, 22, 20): 25.0, (64, 100, 20): None, (64, 100, 100): 250.0, (64, 300, 50): None, (8, 512, 512): None}
"""B, P, G, and the microseconds that are asked for."""
LINEAR = "torch-linear-assignment"


def measure(harness: Harness) -> None:
    shapes = {(4, 7, 5): None} if harness.tiny else SHAPES
    for (batch, rows, cols), most in shapes.items():
        for family in ("soft_iou", "uniform"):
            one(harness, family, batch, rows, cols, most)


def scipy_over_the_bus(cost: Tensor) -> Tensor:
    """What matchers do: to the host, a loop, and back."""
    found = torch.full(cost.shape[:2], -1)
    for row, matrix in zip(found, cost.cpu().numpy(), strict=True):
        row_ind, col_ind = linear_sum_assignment(matrix)
        row[torch.from_numpy(row_ind)] = torch.from_numpy(col_ind)
    return found.to(cost.device)


def one(harness: Harness, family: str, batch: int, rows: int, cols: int, most: float | None) -> None:
    made = costs.FAMILIES[family](batch, rows, cols, costs.generator("gpu", family, batch, rows, cols))
    cost = made.float().to(harness.device)
    truth = scipy_over_the_bus(cost).cpu()

    def check(found: Tensor) -> str:
        differing = int((found.cpu() != truth).sum())
        return f"{differing} indices are not SciPy's" if differing else ""

    def linear() -> Callable[[], Tensor]:
        module, missing = _imported("torch_linear_assignment")
        if module is None:
            raise Absent(missing)
        return partial(module.batch_linear_assignment, cost)

    peers = {LINEAR: Peer(linear), "SciPy over the bus": ready(partial(scipy_over_the_bus, cost), on_host=True)}

    def asked(row: Row) -> None:
        if most is not None and family == "soft_iou":
            row.at_most(most)
            row.ahead_of(LINEAR, 5)

    name = f"assignment {rows}×{cols} B{batch} {family}"
    floor = partial(harness.byte_floor, count=cost.numel() * 4 + batch * rows * 8)
    harness.measure(name, lambda: fastris.assignment(cost).col_of_row, check, peers, asked, floor)
