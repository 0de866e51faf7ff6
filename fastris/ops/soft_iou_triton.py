"""Launches the Triton kernels of ``soft_iou``; importing it imports Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastris.kernels import soft_iou as kernels


def soft_iou(
    pred: Tensor, target: Tensor, num_pred: Tensor | None, num_target: Tensor | None, num_labels: int
) -> tuple[Tensor, Tensor]:
    """``torch.ops.fastris.soft_iou`` on the device of its arguments, without a host sync."""
    labels = target.dim() == 3
    batch, preds = pred.shape[:2]
    targets = num_labels if labels else target.shape[1]
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    iou = pred.new_empty((batch, preds, targets), dtype=compute)
    union = torch.empty_like(iou)
    if iou.numel() == 0:
        return iou, union
    pred = pred.flatten(2)  # a view unless the pixels of a row have no single stride
    pixels = pred.shape[2]
    splits, split_size = kernels.splits_of(pixels)
    sums = pred.new_empty((batch, splits, preds * (targets + 1) + targets), dtype=compute)
    target, target_strides = _pixels(target)
    blocks = {"BLOCK_P": kernels.block_of(preds), "BLOCK_G": kernels.block_of(targets)}
    pairs = triton.cdiv(preds, blocks["BLOCK_P"]) * triton.cdiv(targets, blocks["BLOCK_G"])
    narrow = is_narrow(pred.dtype, target.dtype, labels)
    factor_bytes = pred.dtype.itemsize if narrow else compute.itemsize
    aligned = pixels % 16 == 0 and pred.stride(2) == target_strides[2] == 1
    counts = [None if count is None else count.contiguous() for count in (num_pred, num_target)]
    with torch.cuda.device_of(pred):
        kernels.soft_iou_sums_kernel[(batch * splits, pairs)](
            pred,
            target,
            *counts,
            sums,
            preds,
            targets,
            pixels,
            splits,
            split_size,
            *pred.stride(),
            *target_strides,
            LABELS=labels,
            NARROW=narrow,
            **blocks,
            **kernels.sums_options(factor_bytes, aligned, sum(blocks.values())),
        )
        finish = {"BLOCK_G": blocks["BLOCK_G"], "BLOCK_S": triton.next_power_of_2(splits), **kernels.FINISH}
        kernels.soft_iou_finish_kernel[(batch * preds, triton.cdiv(targets, blocks["BLOCK_G"]))](
            sums, *counts, iou, union, preds, targets, splits, **finish
        )
    return iou, union


def soft_iou_backward(weight: Tensor, offset: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.ops.fastris.soft_iou_backward`` on the device of its arguments, without a host sync."""
    batch, preds, targets = weight.shape
    out = weight.new_empty((batch, preds, *target.shape[-2:]), dtype=dtype)
    if out.numel() == 0:
        return out
    labels = target.dim() == 3
    pixels = target.shape[-2] * target.shape[-1]
    target, target_strides = _pixels(target)
    grid = (batch * preds * triton.cdiv(pixels, kernels.BACKWARD["BLOCK_X"]),)
    with torch.cuda.device_of(weight):
        kernels.soft_iou_backward_kernel[grid](
            weight.contiguous(),
            offset.contiguous(),
            target,
            out,
            preds,
            targets,
            pixels,
            *target_strides,
            LABELS=labels,
            **kernels.BACKWARD,
        )
    return out


def is_narrow(pred: torch.dtype, target: torch.dtype, labels: bool) -> bool:
    """Whether predictions have 16 bits, which hold each target: whole numbers up to 255, or values of their dtype."""
    return pred.itemsize == 2 and (labels or target.itemsize == 1 or target == pred)


def _pixels(target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Masks (B, G, N) or labels (B, N), and their strides over image, target and pixel."""
    if target.dim() == 3:
        labels = target.flatten(1)
        return labels, (labels.stride(0), 0, labels.stride(1))
    masks = target.view(torch.uint8) if target.dtype == torch.bool else target
    masks = masks.flatten(2)
    return masks, masks.stride()
