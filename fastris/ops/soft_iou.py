"""``soft_iou``: overlap of every predicted mask with every target mask, ``torch.ops.fastris.soft_iou``.

B = batch, P = predictions, G = targets.

With I = Σqy, U = Σq + Σy − I and the gradient D of I/U, the gradient of q_p is ``Σ_g A_pg y_g + C_p`` at every pixel,
where ``A = D (U + I) / U²`` and ``C_p = −Σ_g D I / U²``: a weighted sum of masks, ``soft_iou_backward``. That of y_g is
the same with the roles exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastris import backend, reference
from fastris.ops.arguments import check_counts, describe
from fastris.ops.autograd import with_gradients
from fastris.reference.soft_iou import most_labels, soft_iou_and_union, soft_iou_backward

# Schema: a target of three dimensions is a label map with num_labels labels. The results are in the dtype of the sums,
# fp64 for fp64 and fp32 otherwise; both are 0 where the union is not positive and past the counts.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "soft_iou(Tensor pred, Tensor target, Tensor? num_pred, Tensor? num_target, SymInt num_labels)"
    " -> (Tensor iou, Tensor union)"
)
_library.define("soft_iou_backward(Tensor weight, Tensor offset, Tensor target, ScalarType dtype) -> Tensor")

# Kernels: csrc/ registers those for the CPU, Triton has those for CUDA; elsewhere the reference runs

_library.impl("soft_iou", soft_iou_and_union, "CompositeExplicitAutograd")
_library.impl("soft_iou_backward", soft_iou_backward, "CompositeExplicitAutograd")


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastris.ops import soft_iou_triton

    return soft_iou_triton.soft_iou(*arguments)


def _cuda_backward(*arguments: Any) -> Tensor:
    from fastris.ops import soft_iou_triton

    return soft_iou_triton.soft_iou_backward(*arguments)


if backend.TRITON_FOUND:
    _library.impl("soft_iou", _cuda, "CUDA")
    _library.impl("soft_iou_backward", _cuda_backward, "CUDA")

# Fake kernels


def _fake(
    pred: Tensor, target: Tensor, num_pred: Tensor | None, num_target: Tensor | None, num_labels: int
) -> tuple[Tensor, Tensor]:
    batch, preds = pred.shape[:2]
    targets = num_labels if target.dim() == 3 else target.shape[1]
    compute = torch.float64 if pred.dtype == torch.float64 else torch.float32
    iou = pred.new_empty((batch, preds, targets), dtype=compute)
    return iou, torch.empty_like(iou)


def _fake_backward(weight: Tensor, offset: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty((*weight.shape[:2], *target.shape[-2:]), dtype=dtype)


torch.library.register_fake("fastris::soft_iou", _fake, lib=_library)
torch.library.register_fake("fastris::soft_iou_backward", _fake_backward, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, target = inputs[:2]
    iou, union = output
    ctx.mark_non_differentiable(union)
    ctx.dtypes = pred.dtype, target.dtype
    ctx.save_for_backward(pred if target.requires_grad else None, target, iou, union)


def _gradients(ctx: Any, grad: Tensor, grad_union: Tensor | None) -> tuple[Tensor | None, ...]:
    pred, target, iou, union = ctx.saved_tensors
    slope = torch.where(union > 0, grad / union.clamp_min(torch.finfo(union.dtype).tiny), 0.0)  # D / U
    weight = slope * (1 + iou)
    offset = -slope * iou
    grad_pred = grad_target = None
    if ctx.needs_input_grad[0]:
        grad_pred = torch.ops.fastris.soft_iou_backward(weight, offset.sum(2), target, ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        grad_target = torch.ops.fastris.soft_iou_backward(weight.mT, offset.sum(1), pred, ctx.dtypes[1])
    return grad_pred, grad_target, None, None, None


with_gradients(_library, "soft_iou", _gradients, _setup_context)

# The door

_MASK_DTYPES = (torch.bool, torch.uint8, torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_pred_and_target(pred: Tensor, target: Tensor) -> None:
    """The first two arguments of :func:`soft_iou`, with its errors."""
    for name, tensor in (("pred", pred), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"soft_iou: {name} must be a tensor, got {type(tensor).__name__}")
    if pred.dim() != 4 or not pred.is_floating_point():
        raise ValueError(f"soft_iou: pred must be floating (B,P,H,W), got {describe(pred)}")
    if target.dim() == 3:
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"soft_iou: target labels must be integer (B,H,W), got {describe(target)}")
    elif target.dim() != 4 or target.is_complex():
        raise ValueError(f"soft_iou: target must be masks (B,G,H,W) or labels (B,H,W), got {describe(target)}")
    if target.shape[0] != pred.shape[0] or target.shape[-2:] != pred.shape[-2:]:
        raise ValueError(f"soft_iou: target must match pred {describe(pred)} in B, H and W, got {describe(target)}")
    if target.device != pred.device:
        raise ValueError(f"soft_iou: target must be on {pred.device} like pred, got {target.device}")


def soft_iou(
    pred: Tensor,
    target: Tensor,
    num_pred: Tensor | None = None,
    num_target: Tensor | None = None,
    num_labels: int | None = None,
) -> Tensor:
    """Soft IoU ``Σqy / (Σq + Σy − Σqy)`` of every pair over the pixels, on the device of the masks; 0/0 is 0.

    Needs memory for arguments, result and a few tiles, O(P) work a pixel for label maps, and no host sync where
    ``num_labels`` is given. Deterministic. Differentiable once in ``pred`` and in floating masks; the gradient reads
    only the targets of pairs that have one.

    Args:
        pred: (B, P, H, W) in [0, 1], floating.
        target: masks (B, G, H, W) in [0, 1], floating, bool or integer; or an integer label map (B, H, W), k = instance
            k and whatever is not in 1 … G = background.
        num_pred, num_target: (B,) integers, how many leading rows and columns of each image count; the others are 0
            and get no gradient. By default P and G.
        num_labels: G of a label map; by default its maximum, which reads the device.

    Returns:
        (B, P, G) in the dtype of ``pred``; summed in fp64 for fp64, in fp32 and fp64 otherwise.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.

    Source: Romera-Paredes & Torr, ECCV 2016, eq. 7 (after Krähenbühl & Koltun, ICML 2013).

    Example:
        >>> labels = torch.tensor([[[1, 1, 0, 2]]])
        >>> fastris.soft_iou(torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]]), labels, num_labels=2)
        tensor([[[0.3333, 0.5000]]])
    """
    check_pred_and_target(pred, target)
    num_pred = check_counts("soft_iou", "num_pred", num_pred, pred, "pred")
    num_target = check_counts("soft_iou", "num_target", num_target, pred, "pred")
    if target.dim() == 4:
        num_labels = 0
        if target.dtype not in _MASK_DTYPES:
            target = target.to(torch.float64 if pred.dtype == torch.float64 else torch.float32)
    else:
        if target.dtype not in (torch.int32, torch.int64):
            target = target.to(torch.int32 if target.dtype.itemsize < 4 else torch.int64)
        if num_labels is None:
            num_labels = most_labels(target)
        elif num_labels < 0:
            raise ValueError(f"soft_iou: num_labels must not be negative, got {num_labels}")
    if not backend.runs_native("soft_iou", pred.device.type):
        return reference.soft_iou(pred, target, num_pred, num_target, num_labels)
    iou, _ = torch.ops.fastris.soft_iou(pred, target, num_pred, num_target, num_labels)
    return iou.to(pred.dtype)
