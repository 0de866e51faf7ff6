"""Soft intersection over union of every predicted mask with every target mask."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_iou(
    pred: Tensor,
    target: Tensor,
    num_pred: Tensor | None = None,
    num_target: Tensor | None = None,
    num_labels: int | None = None,
) -> Tensor:
    """``Σqy / (Σq + Σy − Σqy)`` over the pixels, for every pair; 0/0 is 0.

    B = batch, P = predictions, G = targets.

    Args:
        pred: (B, P, H, W) in [0, 1], floating.
        target: masks (B, G, H, W) in [0, 1], or an integer label map (B, H, W) with 0 = background and
            k = instance k.
        num_pred, num_target: optional (B,) counts; rows and columns past an image's count are 0.
        num_labels: G for a label map; its maximum where not given (reads the device). Labels above it and below 0 are
            background.

    Returns:
        (B, P, G) in the dtype of ``pred``, summed in fp64 for fp64 and in fp32 otherwise.

    Source: Romera-Paredes & Torr, ECCV 2016, eq. 7 (after Krähenbühl & Koltun, ICML 2013).
    """
    if target.dim() == 3 and num_labels is None:
        num_labels = most_labels(target)
    return soft_iou_and_union(pred, target, num_pred, num_target, num_labels or 0)[0].to(pred.dtype)


def soft_iou_and_union(
    pred: Tensor, target: Tensor, num_pred: Tensor | None, num_target: Tensor | None, num_labels: int
) -> tuple[Tensor, Tensor]:
    """The twin of ``torch.ops.fastris.soft_iou``: IoU and union, (B, P, G) each in the dtype of the sums.

    Both are 0 where the union is not positive and past the counts.
    """
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    q = pred.to(compute).flatten(2)  # [B, P, HW]
    y = _masks(target, num_labels).to(compute).flatten(2)  # [B, G, HW]
    intersection = q @ y.transpose(1, 2)  # [B, P, G]
    union = q.sum(-1).unsqueeze(2) + y.sum(-1).unsqueeze(1) - intersection
    counted = union > 0
    for counts, dim in ((num_pred, 1), (num_target, 2)):
        if counts is not None:
            inside = torch.arange(union.shape[dim], device=union.device) < counts.to(union.device).unsqueeze(1)
            counted = counted & inside.unsqueeze(3 - dim)
    iou = torch.where(counted, intersection / union.clamp_min(torch.finfo(compute).tiny), 0.0)
    return iou, torch.where(counted, union, 0.0)


def soft_iou_backward(weight: Tensor, offset: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of ``torch.ops.fastris.soft_iou_backward``: ``offset[p] + Σ_g weight[p, g] · y_g`` for every pixel.

    Args:
        weight: (B, P, G) fp32 or fp64.
        offset: (B, P) in the same dtype.
        target: masks (B, G, H, W) or labels (B, H, W).
        dtype: of the (B, P, H, W) result.
    """
    masks = _masks(target, weight.shape[2]).to(weight.dtype).flatten(2)  # [B, G, HW]
    rows = offset.unsqueeze(2) + weight @ masks
    return rows.view(*weight.shape[:2], *target.shape[-2:]).to(dtype)


def most_labels(labels: Tensor) -> int:
    """The largest label of a map, 0 where there is none; reads the device."""
    return max(int(labels.max()), 0) if labels.numel() else 0


def _masks(target: Tensor, num_labels: int) -> Tensor:
    if target.dim() == 4:
        return target
    ids = torch.arange(1, num_labels + 1, device=target.device, dtype=target.dtype)
    return target.unsqueeze(1) == ids.view(1, -1, 1, 1)
