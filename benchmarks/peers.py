"""Everybody who takes part: fastris, the libraries it is compared with, and the code people write today.

lap and lapx (a descendant of lap) both install a package called ``lap``, with an ``_lapjv`` of their own inside: the
second one installed destroys the first. The ``bench`` extra has lapx; lap goes into a folder of its own and is loaded
from there under another name::

    pip install -c constraints.txt -e ".[test,bench]"
    pip install -c constraints.txt --no-deps --target "$(python -c 'import sys; print(sys.prefix)')/peers" lap

torch-linear-assignment is pure Python and asks for torch ≥ 1.12 and, on Linux, triton; with constraints.txt torch
stays. Where triton is not wanted install it with ``--no-deps``: on the CPU it is a loop over SciPy anyway. src-d's
lapjv is built from source and needs a C++ compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import fastris

TargetList = list[dict[str, Tensor]]
Pairs = list[tuple[Any, Any]]


def _as_it_is(result: Any, *_: Any) -> Any:
    return result


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Attributes:
        name: what tables call it.
        version: of the package it comes from.
        call: what is timed; takes one input of the suite.
        answer: turns ``(result, *input)`` into the form that the suite checks, untimed.
        scipy_indices: whether it promises SciPy's own choice among ties.
        missing: why it cannot run here; empty where it can.
    """

    name: str
    version: str
    call: Callable[..., Any]
    answer: Callable[..., Any] = _as_it_is
    scipy_indices: bool = False
    missing: str = ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _imported(module: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        return None, str(error)


@lru_cache(maxsize=1)
def _original_lap() -> tuple[ModuleType | None, str]:
    """lap beside lapx. The name that its extension registers itself under is taken back: it is lapx's."""
    folder = Path(sys.prefix) / "peers" / "lap"
    spec = importlib.util.spec_from_file_location(
        "original_lap", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if not folder.is_dir() or spec is None or spec.loader is None:
        return None, f"no lap in {folder.parent}"
    module = importlib.util.module_from_spec(spec)
    sys.modules["original_lap"] = module
    lapx = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] == "lap"}
    spec.loader.exec_module(module)
    for name in [name for name in sys.modules if name.split(".")[0] == "lap"]:
        del sys.modules[name]
    sys.modules.update(lapx)
    return module, ""


# Assignment: one input is (cost,), (B, P, G) on the CPU; the answer is col_of_row (B, P), −1 where unmatched


def from_pairs(result: Pairs, cost: Tensor) -> Tensor:
    """(row_ind, col_ind) of every matrix → col_of_row."""
    col_of_row = np.full(cost.shape[:2], -1, np.int64)
    for row, (row_ind, col_ind) in zip(col_of_row, result, strict=True):
        row[row_ind] = col_ind
    return torch.from_numpy(col_of_row)


def scipy_loop(cost: Tensor) -> Pairs:
    return [linear_sum_assignment(matrix) for matrix in cost.numpy()]


def _assignment_operator(cost: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.fastris.assignment(cost)


def _linear_sum_assignment_loop(cost: Tensor) -> Pairs:
    return [fastris.linear_sum_assignment(matrix) for matrix in cost.numpy()]


def _first(result: Any, *_: Any) -> Tensor:
    return result[0]


def _stacked(result: list[np.ndarray], cost: Tensor) -> Tensor:
    """The column of every row; at or beyond G, the padding, means unmatched."""
    columns = torch.from_numpy(np.stack(result).astype(np.int64))
    return torch.where(columns < cost.shape[2], columns, -1)


def _lap(lap: Any) -> Callable[[Tensor], list[np.ndarray]]:
    def loop(cost: Tensor) -> list[np.ndarray]:
        return [lap.lapjv(matrix, extend_cost=True, return_cost=False)[0] for matrix in cost.numpy()]

    return loop


def _lapx(solver: str, **options: Any) -> Peer:
    lap, missing = _imported("lap")

    def batch(cost: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
        solve = getattr(lap, f"{solver}_batch")
        threads = torch.get_num_threads()
        return solve(cost.numpy(), extend_cost=True, return_cost=False, n_threads=threads, **options)

    def answer(result: tuple[list[np.ndarray], list[np.ndarray]], cost: Tensor) -> Tensor:
        return from_pairs(list(zip(*result, strict=True)), cost)

    return Peer(f"lapx {solver}", _version("lapx"), batch, answer, missing=missing)


def _src_d_lapjv(lapjv: Any) -> Callable[[Tensor], list[np.ndarray]]:
    def loop(cost: Tensor) -> list[np.ndarray]:
        rows, cols = cost.shape[1:]
        if rows == cols:
            return [lapjv.lapjv(matrix)[0] for matrix in cost.numpy()]
        square = np.zeros((max(rows, cols),) * 2, cost.numpy().dtype)
        found = []
        for matrix in cost.numpy():
            square[:rows, :cols] = matrix
            found.append(lapjv.lapjv(square)[0][:rows])
        return found

    return loop


def assignment_peers() -> list[Peer]:
    """fastris first, then SciPy, the solvers in C++ and Rust, and torch-linear-assignment."""
    original, no_original = _original_lap()
    lapjv, no_lapjv = _imported("lapjv")
    linear, no_linear = _imported("torch_linear_assignment")
    return [
        Peer("fastris", fastris.__version__, fastris.assignment, _first, scipy_indices=True),
        Peer("SciPy loop", _version("scipy"), scipy_loop, from_pairs, scipy_indices=True),
        Peer("lap", getattr(original, "__version__", "not installed"), _lap(original), _stacked, missing=no_original),
        _lapx("lapjvx"),
        _lapx("lapjvs", prefer_float32=False),
        _lapx("lapjvr"),
        _lapx("lapjvh"),
        Peer("src-d lapjv", _version("lapjv"), _src_d_lapjv(lapjv), _stacked, missing=no_lapjv),
        Peer(
            "torch-linear-assignment",
            _version("torch-linear-assignment"),
            getattr(linear, "batch_linear_assignment", _as_it_is),
            scipy_indices=True,
            missing=no_linear,
        ),
    ]


def overhead_peers() -> list[Peer]:
    """The doors to the same solver, for what a single call costs."""
    return [
        Peer("fastris.assignment", fastris.__version__, fastris.assignment, _first, scipy_indices=True),
        Peer("torch.ops.fastris.assignment", fastris.__version__, _assignment_operator, _first, scipy_indices=True),
        Peer(
            "fastris.linear_sum_assignment",
            fastris.__version__,
            _linear_sum_assignment_loop,
            from_pairs,
            scipy_indices=True,
        ),
        Peer("SciPy", _version("scipy"), scipy_loop, from_pairs, scipy_indices=True),
    ]


def with_threads(peer: Peer, threads: int) -> Peer:
    """The same contestant on its own number of threads; the switch costs about a microsecond."""

    def call(*inputs: Any) -> Any:
        torch.set_num_threads(threads)
        return peer.call(*inputs)

    name = f"{peer.name}, {threads} thread{'s' if threads > 1 else ''}"
    return Peer(name, peer.version, call, peer.answer, peer.scipy_indices, peer.missing)


# Soft IoU: one input is (pred (B, P, H, W), masks (B, G, H, W), labels (B, H, W)); the answer is (B, P, G)


def iou_by_einsum(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    both = torch.einsum("bphw,bghw->bpg", pred, masks)
    union = pred.sum((2, 3)).unsqueeze(2) + masks.sum((2, 3)).unsqueeze(1) - both
    return both / union.clamp_min(1e-12)


def iou_by_bmm(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    pred, masks = pred.flatten(2), masks.flatten(2)
    both = torch.bmm(pred, masks.transpose(1, 2))
    union = pred.sum(2).unsqueeze(2) + masks.sum(2).unsqueeze(1) - both
    return both / union.clamp_min(1e-12)


def iou_by_pairs(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    iou = pred.new_zeros(pred.shape[0], pred.shape[1], masks.shape[1])
    for b, (preds, targets) in enumerate(zip(pred, masks, strict=True)):
        for p, q in enumerate(preds):
            for g, y in enumerate(targets):
                both = (q * y).sum()
                iou[b, p, g] = both / (q.sum() + y.sum() - both).clamp_min(1e-12)
    return iou


def iou_by_broadcasting(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    q, y = pred.unsqueeze(2), masks.unsqueeze(1)  # [B, P, 1, H, W], [B, 1, G, H, W]
    both = (q * y).sum((3, 4))
    return both / (q + y - q * y).sum((3, 4)).clamp_min(1e-12)


def _iou_of_masks(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return fastris.soft_iou(pred, masks)


def _iou_of_labels(number: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
        return fastris.soft_iou(pred, labels, num_labels=number)

    return call


def soft_iou_peers(num_target: int) -> list[Peer]:
    """fastris on masks and on a label map, then what people write."""
    return [
        Peer("fastris", fastris.__version__, _iou_of_masks),
        Peer("fastris, label map", fastris.__version__, _iou_of_labels(num_target)),
        Peer("einsum", torch.__version__, iou_by_einsum),
        Peer("bmm", torch.__version__, iou_by_bmm),
        Peer("pair by pair", torch.__version__, iou_by_pairs),
        Peer("broadcasting", torch.__version__, iou_by_broadcasting),
    ]


# Matchers: one input is (outputs, targets) as DETR passes them; the answer is [(query indices, target indices), …]


def detr_cost(
    outputs: dict[str, Tensor], targets: TargetList, cost_class: float, cost_bbox: float, cost_giou: float
) -> Tensor:
    """λ_class (−p̂(c)) + λ_bbox ‖b − b̂‖₁ + λ_giou (−GIoU) of every query with all targets of the batch: (B, Q, ΣG).

    Source: Carion et al., ECCV 2020, eq. 1–2 and appendix; GIoU: Rezatofighi et al., CVPR 2019.
    """
    batch, queries = outputs["pred_logits"].shape[:2]
    probability = outputs["pred_logits"].flatten(0, 1).softmax(-1)
    box = outputs["pred_boxes"].flatten(0, 1)
    classes = torch.cat([target["labels"] for target in targets])
    target_box = torch.cat([target["boxes"] for target in targets])
    cost = -cost_class * probability[:, classes] + cost_bbox * torch.cdist(box, target_box, p=1)
    return (cost - cost_giou * _generalized_iou(box, target_box)).view(batch, queries, -1)


def _generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """(N, 4), (M, 4) boxes as centre and size → (N, M)."""
    (low_a, high_a), (low_b, high_b) = (
        (box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2) for box in (first, second)
    )
    both = (torch.minimum(high_a[:, None], high_b) - torch.maximum(low_a[:, None], low_b)).clamp_min(0).prod(2)
    union = (high_a - low_a).prod(1)[:, None] + (high_b - low_b).prod(1) - both
    hull = (torch.maximum(high_a[:, None], high_b) - torch.minimum(low_a[:, None], low_b)).prod(2)
    return both / union - (hull - union) / hull


class NaiveDETRMatcher:
    """Every image against all targets of the batch, to the host, then SciPy image by image."""

    def __init__(self, cost_class: float, cost_bbox: float, cost_giou: float) -> None:
        self.weights = (cost_class, cost_bbox, cost_giou)

    @torch.no_grad()
    def __call__(self, outputs: dict[str, Tensor], targets: TargetList) -> Pairs:
        parts = detr_cost(outputs, targets, *self.weights).cpu().split([len(t["labels"]) for t in targets], -1)
        return [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]


def mask_cost(logits: Tensor, mask: Tensor, classes: Tensor, labels: Tensor, weights: Sequence[float]) -> Tensor:
    """λ_class (−p̂(c)) + λ_mask BCE + λ_dice dice, over the points of one image.

    Args:
        logits: (Q, N) mask logits at the points. mask: (G, N) targets there. classes: (Q, K + 1). labels: (G,).

    Source: Cheng et al., CVPR 2022, section 3.3 and supplement; MaskFormer, NeurIPS 2021, eq. 1 for dice.
    """
    points = logits.shape[1]
    cross_entropy = (F.softplus(-logits) @ mask.T + F.softplus(logits) @ (1 - mask).T) / points
    q = logits.sigmoid()
    dice = 1 - (2 * q @ mask.T + 1) / (q.sum(1)[:, None] + mask.sum(1) + 1)
    cost_class, cost_mask, cost_dice = weights
    return -cost_class * classes.softmax(-1)[:, labels] + cost_mask * cross_entropy + cost_dice * dice


class NaiveMask2FormerMatcher:
    """Random points, costs and SciPy, all image by image."""

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int) -> None:
        self.weights = (cost_class, cost_mask, cost_dice)
        self.num_points = num_points

    @torch.no_grad()
    def __call__(self, outputs: dict[str, Tensor], targets: TargetList) -> Pairs:
        pairs = []
        for logits, classes, target in zip(outputs["pred_masks"], outputs["pred_logits"], targets, strict=True):
            points = 2 * torch.rand(1, 1, self.num_points, 2, device=logits.device) - 1
            at_logits = F.grid_sample(logits[None], points, align_corners=False)[0, :, 0]
            at_masks = F.grid_sample(target["masks"][None].to(logits), points, align_corners=False)[0, :, 0]
            cost = mask_cost(at_logits, at_masks, classes, target["labels"], self.weights)
            pairs.append(linear_sum_assignment(cost.cpu()))
        return pairs


DETR_WEIGHTS = {"cost_class": 1.0, "cost_bbox": 5.0, "cost_giou": 2.0}
MASK2FORMER_WEIGHTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}
NUM_POINTS = 12544


def _matcher(name: str, **options: float) -> Peer:
    matcher = getattr(fastris, name, None)
    if matcher is None:
        return Peer("fastris", fastris.__version__, _as_it_is, missing=f"no fastris.{name} in this version")
    return Peer("fastris", fastris.__version__, matcher(**options))


def detr_peers() -> list[Peer]:
    return [
        _matcher("HungarianMatcher", **DETR_WEIGHTS),
        Peer("DETR-style", torch.__version__, NaiveDETRMatcher(**DETR_WEIGHTS)),
    ]


def mask2former_peers() -> list[Peer]:
    options: dict[str, Any] = {**MASK2FORMER_WEIGHTS, "num_points": NUM_POINTS}
    return [
        _matcher("MaskHungarianMatcher", **options),
        Peer("Mask2Former-style", torch.__version__, NaiveMask2FormerMatcher(**options)),
    ]


def _match(pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return fastris.match(pred, labels, num_labels=masks.shape[1]).target_of_pred


def _pairs_of_masks(result: Pairs, pred: Tensor, masks: Tensor, labels: Tensor) -> Tensor:
    return from_pairs(result, pred)


@torch.no_grad()
def _match_naively(pred: Tensor, masks: Tensor, labels: Tensor) -> Pairs:
    return scipy_loop(-iou_by_einsum(pred, masks, labels))


def ris_peers() -> list[Peer]:
    """Inputs are those of soft IoU; the answer is col_of_row."""
    return [
        Peer("fastris", fastris.__version__, _match),
        Peer("einsum + SciPy loop", _version("scipy"), _match_naively, _pairs_of_masks),
    ]
