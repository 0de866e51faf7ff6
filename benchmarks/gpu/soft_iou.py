"""``soft_iou`` of masks and of a label map, beside the time to read the masks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import costs
import fastris
from fastris import reference
from gpu.harness import Harness, Row, compiled, off_by, ready
from peers import iou_by_bmm, iou_by_einsum


def measure(harness: Harness) -> None:
    batch, preds, targets, side = (2, 5, 4, 16) if harness.tiny else (32, 22, 20, 256)
    size = f"B{batch} {preds}×{targets} {side}²"
    made, labels_made = costs.masks(batch, preds, targets, side, costs.generator("gpu", batch, side))
    labels = labels_made.to(harness.device)
    numbers = torch.arange(1, targets + 1, device=harness.device).view(1, -1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        pred = made.to(harness.device, dtype)
        masks = (labels.unsqueeze(1) == numbers).to(dtype)
        truth = reference.soft_iou(pred[[0, -1]].double(), masks[[0, -1]].double())

        def check(found: Tensor, truth: Tensor = truth, dtype: torch.dtype = dtype) -> str:
            return off_by([found[[0, -1]]], [truth], 1e-5 if dtype == torch.float32 else 1e-2)

        def asked(row: Row) -> None:
            row.within_floor(1 / 1.5)

        arguments = pred, masks, labels
        peers = {
            "bmm": ready(partial(iou_by_bmm, *arguments)),
            "einsum": ready(partial(iou_by_einsum, *arguments)),
            "torch.compile": compiled(harness, iou_by_bmm, arguments),
            "torch.compile max-autotune": compiled(harness, iou_by_bmm, arguments, "max-autotune-no-cudagraphs"),
        }
        kind = str(dtype).removeprefix("torch.")
        read = pred.numel() * dtype.itemsize
        with torch.no_grad():
            harness.measure(
                f"soft_iou {size} {kind}",
                partial(fastris.soft_iou, pred, masks),
                check,
                peers,
                asked,
                partial(harness.byte_floor, count=read + masks.numel() * dtype.itemsize),
            )
            harness.measure(
                f"soft_iou labels {size} {kind}",
                partial(fastris.soft_iou, pred, labels, num_labels=targets),
                check,
                peers,
                asked,
                partial(harness.byte_floor, count=read + labels.numel() * 8),
            )
