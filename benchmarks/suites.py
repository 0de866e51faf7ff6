"""The cases: which inputs every suite has, who takes part and what a right answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import costs
import dense_crf
import peers
import recurrent
import ris_step
from fastris import reference
from peers import Peer
from recurrent import Problem

Labels = Mapping[str, str]
"""What names a case, as in ``{"shape": "22x20", "family": "tied", "batch": "8", "dtype": "float32"}``."""


@dataclass(frozen=True)
class Case:
    """What every peer has to do.

    Attributes:
        inputs: distinct inputs; a sample is one call with each.
        items: matrices (or images) in all inputs together.
        wrong: what is wrong with a peer's answers to all inputs; empty where they are right.
    """

    inputs: Sequence[tuple[Any, ...]]
    items: int
    wrong: Callable[[Peer, list[Any]], str]

    def run(self, peer: Peer) -> None:
        """One sample."""
        for inputs in self.inputs:
            peer.call(*inputs)

    def fault(self, peer: Peer) -> str:
        """What is wrong with a peer's answers; empty where all are right. Also warms the peer up."""
        try:
            answers = [peer.answer(peer.call(*inputs), *inputs) for inputs in self.inputs]
            return self.wrong(peer, answers)
        except Exception as error:  # whatever a peer trips over is its result
            return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Suite:
    """Cases that make up one table.

    Attributes:
        name: of the suite and its result file.
        item: what a time is per.
        base: the peer that ratios are relative to.
        grid: the labels of all cases.
        quick: tells whether a case belongs to the quick selection.
        peers: who takes part in the case of some labels.
        build: makes that case.
    """

    name: str
    item: str
    base: str
    grid: Sequence[Labels]
    quick: Callable[[Labels], bool]
    peers: Callable[[Labels], list[Peer]]
    build: Callable[[Labels], Case]


def grid(**axes: Sequence[str]) -> list[Labels]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def dimensions(shape: str) -> list[int]:
    return [int(number) for number in shape.split("x")]


# Assignment


def assignment_fault(cost: Tensor, answer: Tensor, optimum: Tensor) -> str:
    """Compare the total costs of a batch with SciPy's: one-to-one, complete and within 1e-6 relative."""
    batch, rows, cols = cost.shape
    if tuple(answer.shape) != (batch, rows):
        return f"answer of shape {tuple(answer.shape)}, not {(batch, rows)}"
    if rows == 0 or cols == 0:
        return ""
    matched = answer >= 0
    used = torch.zeros(batch, cols, dtype=torch.int64).scatter_add_(1, answer.clamp_min(0), matched.long())
    if (matched.sum(1) != min(rows, cols)).any() or (used > 1).any():
        return "not a complete one-to-one assignment"
    total = total_cost(cost, answer)
    off = (total - optimum).abs() - (1e-6 * optimum.abs() + 1e-12)
    worst = int(off.argmax())
    if off[worst] > 0:
        return f"total cost {float(total[worst])!r} where the optimum is {float(optimum[worst])!r}"
    return ""


def total_cost(cost: Tensor, col_of_row: Tensor) -> Tensor:
    """(B, P, G), (B, P) → float64 (B,)."""
    taken = cost.double().gather(2, col_of_row.clamp_min(0).unsqueeze(2)).squeeze(2)
    return torch.where(col_of_row >= 0, taken, 0.0).sum(1)


def assignment_case(labels: Labels) -> Case:
    rows, cols = dimensions(labels["shape"])
    matrices = costs.matrices(labels["family"], rows, cols).to(getattr(torch, labels["dtype"]))
    batches = matrices.split(int(labels["batch"]))
    truth = peers.from_pairs(peers.scipy_loop(matrices), matrices)
    optimum = total_cost(matrices, truth)

    def wrong(peer: Peer, answers: list[Tensor]) -> str:
        answer = torch.cat(answers)
        fault = assignment_fault(matrices, answer, optimum)
        if not fault and peer.scipy_indices and not torch.equal(answer, truth):
            return "optimal, but not SciPy's choice among ties"
        return fault

    return Case([(batch,) for batch in batches], len(matrices), wrong)


ASSIGNMENT = Suite(
    name="assignment",
    item="matrix",
    base="fastris",
    grid=[
        labels
        for labels in grid(
            shape=("8x6", "22x20", "100x20", "100x100", "300x50", "512x512"),
            family=tuple(costs.FAMILIES),
            batch=("1", "8", "64", "512"),
            dtype=("float32", "float64"),
        )
        if int(labels["batch"]) <= costs.count(*dimensions(labels["shape"]))
    ],
    quick=lambda labels: labels["shape"] in ("8x6", "22x20") and labels["batch"] in ("1", "64"),
    peers=lambda labels: peers.assignment_peers(),
    build=assignment_case,
)

OVERHEAD = Suite(
    name="overhead",
    item="call",
    base="torch.ops.fastris.assignment",
    grid=grid(shape=("22x20",), family=("soft_iou",), batch=("1",), dtype=("float32", "float64")),
    quick=lambda labels: True,
    peers=lambda labels: peers.overhead_peers(),
    build=assignment_case,
)


SCALING = Suite(
    name="scaling",
    item="matrix",
    base="fastris, 2 threads",
    grid=[
        {**labels, "batch": str(min(64, costs.count(*dimensions(labels["shape"]))))}
        for labels in grid(
            shape=("8x6", "22x20", "100x20", "100x100", "300x50", "512x512"),
            family=("uniform", "soft_iou"),
            batch=("64",),
            dtype=("float32", "float64"),
        )
    ],
    quick=lambda labels: labels["shape"] in ("8x6", "22x20"),
    peers=lambda labels: [peers.with_threads(peers.assignment_peers()[0], threads) for threads in (1, 2)],
    build=assignment_case,
)


# Soft IoU

MOST_BYTES = 2**32
"""Broadcasting does not run where its intermediate tensors would take more than this."""

IOU_TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def overlaps(labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """pred (B, P, S, S), masks (B, G, S, S) in the same dtype, labels (B, S, S)."""
    num_pred, num_target, side = dimensions(labels["shape"])
    random = costs.generator(labels["shape"], labels["batch"])
    pred, label_map = costs.masks(int(labels["batch"]), num_pred, num_target, side, random)
    numbers = torch.arange(1, num_target + 1).view(1, -1, 1, 1)
    dtype = getattr(torch, labels["dtype"])
    return pred.to(dtype), (label_map.unsqueeze(1) == numbers).to(dtype), label_map


def soft_iou_case(labels: Labels) -> Case:
    pred, masks, label_map = overlaps(labels)
    truth = peers.iou_by_bmm(pred.double(), masks.double(), label_map)
    tolerance = IOU_TOLERANCE[labels["dtype"]]

    def wrong(peer: Peer, answers: list[Tensor]) -> str:
        error = (answers[0].double() - truth).abs().max()
        return "" if error <= tolerance else f"off by {float(error):.1e}"

    return Case([(pred, masks, label_map)], pred.shape[0], wrong)


def soft_iou_peers(labels: Labels) -> list[Peer]:
    """All; broadcasting holds two tensors of B·P·G·S² at once and sits out where they are too large."""
    num_pred, num_target, side = dimensions(labels["shape"])
    needed = 2 * int(labels["batch"]) * num_pred * num_target * side**2 * getattr(torch, labels["dtype"]).itemsize
    contestants = peers.soft_iou_peers(num_target)
    if needed <= MOST_BYTES:
        return contestants
    reason = f"would take {needed / 2**30:.1f} GiB"
    return [replace(peer, missing=reason) if peer.name == "broadcasting" else peer for peer in contestants]


SOFT_IOU = Suite(
    name="soft_iou",
    item="image",
    base="fastris",
    grid=grid(
        shape=("8x6x128", "22x20x64", "22x20x256", "100x20x128"),
        batch=("1", "8", "32"),
        dtype=("float32", "float64"),
    ),
    quick=lambda labels: labels["shape"] in ("8x6x128", "22x20x64") and labels["batch"] == "1",
    peers=soft_iou_peers,
    build=soft_iou_case,
)


# Matchers


def matched_fault(cost: Tensor, pairs: tuple[Any, Any]) -> str:
    """Compare one image's pairs with the optimum of its float64 cost (Q, G)."""
    rows, cols = (torch.as_tensor(indices) for indices in pairs)
    col_of_row = torch.full(cost.shape[:1], -1)
    col_of_row[rows] = cols
    best = torch.full_like(col_of_row, -1)
    best_rows, best_cols = linear_sum_assignment(cost)
    best[torch.from_numpy(best_rows)] = torch.from_numpy(best_cols)
    return assignment_fault(cost[None], col_of_row[None], total_cost(cost[None], best[None]))


def detr_case(labels: Labels) -> Case:
    queries, most = dimensions(labels["shape"])
    batch = int(labels["batch"])
    outputs, targets = costs.boxes_of_detr(batch, queries, most, costs.generator("detr", labels["shape"], batch))
    as_double = {name: values.double() for name, values in outputs.items()}
    targets_as_double = [{**target, "boxes": target["boxes"].double()} for target in targets]
    cost = peers.detr_cost(as_double, targets_as_double, **peers.DETR_WEIGHTS)
    parts = cost.split([len(target["labels"]) for target in targets], -1)

    def wrong(peer: Peer, answers: list[Any]) -> str:
        faults = (matched_fault(part[image], answers[0][image]) for image, part in enumerate(parts))
        return next(filter(None, faults), "")

    return Case([(outputs, targets)], batch, wrong)


def mask2former_case(labels: Labels) -> Case:
    """Right is the optimum over all pixels: the inputs are such that random points do not change the matching."""
    queries, most, side = dimensions(labels["shape"])
    batch = int(labels["batch"])
    random = costs.generator("mask2former", labels["shape"], batch)
    outputs, targets = costs.masks_of_mask2former(batch, queries, most, side, random)
    weights = list(peers.MASK2FORMER_WEIGHTS.values())
    parts = [
        peers.mask_cost(
            logits.flatten(1).double(), target["masks"].flatten(1).double(), classes.double(), target["labels"], weights
        )
        for logits, classes, target in zip(outputs["pred_masks"], outputs["pred_logits"], targets, strict=True)
    ]

    def wrong(peer: Peer, answers: list[Any]) -> str:
        return next(filter(None, map(matched_fault, parts, answers[0])), "")

    return Case([(outputs, targets)], batch, wrong)


def ris_case(labels: Labels) -> Case:
    inputs = overlaps({**labels, "dtype": "float32"})
    cost = -peers.iou_by_bmm(inputs[0].double(), inputs[1].double(), inputs[2])
    truth = peers.from_pairs(peers.scipy_loop(cost), cost)

    def wrong(peer: Peer, answers: list[Tensor]) -> str:
        return assignment_fault(cost, answers[0], total_cost(cost, truth))

    return Case([inputs], len(cost), wrong)


MATCHER_FAMILIES: dict[str, tuple[Callable[[], list[Peer]], Callable[[Labels], Case]]] = {
    "detr": (peers.detr_peers, detr_case),
    "mask2former": (peers.mask2former_peers, mask2former_case),
    "ris": (peers.ris_peers, ris_case),
}

MATCHERS = Suite(
    name="matchers",
    item="image",
    base="fastris",
    grid=[
        *grid(family=("detr",), shape=("100x20", "300x50"), batch=("1", "8", "64")),
        *grid(family=("mask2former",), shape=("100x20x64", "100x20x128"), batch=("1", "8")),
        *grid(family=("ris",), shape=("22x20x64", "22x20x256"), batch=("1", "8", "64")),
    ],
    quick=lambda labels: labels["shape"] in ("100x20", "100x20x64", "22x20x64") and labels["batch"] == "1",
    peers=lambda labels: MATCHER_FAMILIES[labels["family"]][0](),
    build=lambda labels: MATCHER_FAMILIES[labels["family"]][1](labels),
)

# ConvLSTM

SMALL = "5x6x16"
"""The quick case, without torch.compile: that takes half a minute for each case."""

OF_CONVLSTM = [
    {"shape": shape, "batch": batch}
    for shape, batch in ((SMALL, "2"), ("30x30x64", "8"), ("64x64x64", "4"), ("100x30x128", "1"))
]
"""Shapes are Cin x C x side, C x side of the gates."""

PASSES = ("forward", "forward+backward")


def recurrent_case(problem: Problem, truth: Mapping[str, Tensor]) -> Case:
    def wrong(peer: Peer, answers: list[Any]) -> str:
        if peer.name == recurrent.FLOOR:
            return ""
        return recurrent.disagreement(answers[0], truth, recurrent.tolerance_of(peer))

    return Case([(problem,)], 1, wrong)


def gates_case(labels: Labels) -> Case:
    channels, side = dimensions(labels["shape"])
    problem = recurrent.gates_problem(int(labels["batch"]), channels, side, labels["pass"] != "forward")
    return recurrent_case(problem, recurrent.truth_of(problem, reference.lstm_gates, ("hidden", "cell")))


def cell_case(labels: Labels) -> Case:
    sizes = [int(labels["batch"]), *dimensions(labels["shape"])]
    problem = recurrent.convlstm_problem(*sizes, labels["pass"] != "forward")
    return recurrent_case(problem, recurrent.truth_of(problem, recurrent.reference_cell, ("hidden", "cell")))


def convlstm_case(labels: Labels) -> Case:
    sizes = [int(labels["batch"]), *dimensions(labels["shape"])]
    problem = recurrent.convlstm_problem(*sizes, labels["pass"] != "forward", labels["family"])
    return recurrent_case(problem, recurrent.truth_of(problem, recurrent.reference_sequence, ("outputs", "cell")))


GATES = Suite(
    name="gates",
    item="call",
    base="fastris",
    grid=[
        {**labels, "shape": labels["shape"].partition("x")[2], **one}
        for labels in OF_CONVLSTM
        for one in grid(**{"pass": PASSES})
    ],
    quick=lambda labels: SMALL.endswith(labels["shape"]),
    peers=lambda labels: recurrent.gates_peers(compiled=not SMALL.endswith(labels["shape"])),
    build=gates_case,
)

CELL = Suite(
    name="cell",
    item="call",
    base="fastris",
    grid=[{**labels, **one} for labels in OF_CONVLSTM for one in grid(**{"pass": PASSES})],
    quick=lambda labels: labels["shape"] == SMALL,
    peers=lambda labels: recurrent.cell_peers(labels["pass"] != "forward", compiled=labels["shape"] != SMALL),
    build=cell_case,
)

CONVLSTM = Suite(
    name="convlstm",
    item="sequence",
    base="fastris",
    grid=[
        {**labels, **one}
        for labels in OF_CONVLSTM
        for one in grid(**{"family": ("constant", "varying"), "pass": PASSES})
    ],
    quick=lambda labels: labels["shape"] == SMALL,
    peers=lambda labels: recurrent.convlstm_peers(labels["pass"] != "forward", compiled=labels["shape"] != SMALL),
    build=convlstm_case,
)


# Training step


def ris_step_case(labels: Labels) -> Case:
    step = ris_step.new_step(
        int(labels["batch"]), dimensions(labels["shape"])[0], int(labels["steps"]), labels["dtype"]
    )
    truth = step.truth()

    def wrong(peer: Peer, answers: list[Any]) -> str:
        return ris_step.disagreement(answers[0], truth, labels["dtype"])

    return Case([(step,)], 1, wrong)


RIS_STEP = Suite(
    name="ris_step",
    item="step",
    base="fastris",
    grid=[
        {**labels, **one}
        for labels in (
            {"shape": "32x32", "batch": "1", "steps": "3"},
            {"shape": "128x128", "batch": "4", "steps": "12"},
            {"shape": "256x256", "batch": "4", "steps": "12"},
        )
        for one in grid(dtype=("float32", "bfloat16"))
    ],
    quick=lambda labels: labels["shape"] == "32x32",
    peers=lambda labels: ris_step.ris_step_peers(),
    build=ris_step_case,
)

# Dense CRF

SMALL_CRF = "40x4"
"""The case in which every pair of pixels takes part."""


def dense_crf_case(labels: Labels) -> Case:
    unary, image = dense_crf.problem(*dimensions(labels["shape"]), labels["family"])
    truth = dense_crf.truth_of(unary, image, labels["shape"] == SMALL_CRF)

    def wrong(peer: Peer, answers: list[Any]) -> str:
        return dense_crf.disagreement(peer, answers[0], truth)

    return Case([(unary, image)], 1, wrong)


DENSE_CRF = Suite(
    name="dense_crf",
    item="image",
    base="fastris",
    grid=[  # side x labels
        {"shape": SMALL_CRF, "family": "photograph"},
        *grid(shape=("500x10",), family=("photograph", "noise")),
    ],
    quick=lambda labels: labels["shape"] == SMALL_CRF,
    peers=lambda labels: dense_crf.dense_crf_peers(labels["shape"] == SMALL_CRF),
    build=dense_crf_case,
)

SUITES = {
    suite.name: suite
    for suite in (ASSIGNMENT, SOFT_IOU, MATCHERS, OVERHEAD, SCALING, GATES, CELL, CONVLSTM, RIS_STEP, DENSE_CRF)
}
