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
        num_labels: G for a label map; its maximum where not given (reads the device). Labels above it are
            background.

    Returns:
        (B, P, G) in the dtype of ``pred``, summed in fp64 for fp64 and in fp32 otherwise.

    Source: Romera-Paredes & Torr, ECCV 2016, eq. 7 (after Krähenbühl & Koltun, ICML 2013).
    """
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if target.dim() == 3:
        if num_labels is None:
            num_labels = int(target.max()) if target.numel() else 0
        ids = torch.arange(1, num_labels + 1, device=target.device, dtype=target.dtype)
        masks = target.unsqueeze(1) == ids.view(1, -1, 1, 1)
    else:
        masks = target
    q = pred.to(compute).flatten(2)  # [B, P, HW]
    y = masks.to(compute).flatten(2)  # [B, G, HW]
    intersection = q @ y.transpose(1, 2)  # [B, P, G]
    union = q.sum(-1).unsqueeze(2) + y.sum(-1).unsqueeze(1) - intersection
    iou = torch.where(union > 0, intersection / union.clamp_min(torch.finfo(compute).tiny), 0.0)
    for counts, dim in ((num_pred, 1), (num_target, 2)):
        if counts is not None:
            inside = torch.arange(iou.shape[dim], device=iou.device) < counts.to(iou.device).unsqueeze(1)
            iou = torch.where(inside.unsqueeze(3 - dim), iou, 0.0)
    return iou.to(pred.dtype)
