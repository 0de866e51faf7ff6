"""``soft_iou``: overlap of every predicted mask with every target mask."""

from __future__ import annotations

import torch
from torch import Tensor

from fastris import reference


def soft_iou(
    pred: Tensor,
    target: Tensor,
    num_pred: Tensor | None = None,
    num_target: Tensor | None = None,
    num_labels: int | None = None,
) -> Tensor:
    """Soft IoU of every pair; shapes, dtypes and source as in :func:`fastris.reference.soft_iou`.

    Raises:
        ValueError: shapes or dtypes that do not fit; the message names the argument.
    """
    if pred.dim() != 4 or not pred.is_floating_point():
        raise ValueError(f"soft_iou: pred must be floating (B,P,H,W), got {_describe(pred)}")
    if target.dim() == 3:
        if target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(f"soft_iou: target labels must be integer (B,H,W), got {_describe(target)}")
    elif target.dim() != 4:
        raise ValueError(f"soft_iou: target must be masks (B,G,H,W) or labels (B,H,W), got {_describe(target)}")
    if target.shape[0] != pred.shape[0] or target.shape[-2:] != pred.shape[-2:]:
        raise ValueError(f"soft_iou: target must match pred {_describe(pred)} in B, H and W, got {_describe(target)}")
    for name, counts in (("num_pred", num_pred), ("num_target", num_target)):
        if counts is not None and tuple(counts.shape) != (pred.shape[0],):
            raise ValueError(f"soft_iou: {name} must be ({pred.shape[0]},), got {_describe(counts)}")
    return reference.soft_iou(pred, target, num_pred, num_target, num_labels)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} ({','.join(map(str, tensor.shape))})"
