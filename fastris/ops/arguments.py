"""What the operators' doors check alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fastris import backend


def check_counts(operator: str, name: str, counts: Tensor | None, like: Tensor, like_name: str) -> Tensor | None:
    """Optional counts of a batch as int64 (B,), B being the first dimension of ``like``.

    Raises:
        TypeError: no tensor.
        ValueError: no integers, another shape or another device; the message names operator and argument.
    """
    if counts is None:
        return None
    if not isinstance(counts, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor, got {type(counts).__name__}")
    integer = not (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool)
    if not integer or tuple(counts.shape) != (like.shape[0],):
        raise ValueError(f"{operator}: {name} must be integer ({like.shape[0]},), got {describe(counts)}")
    if counts.device != like.device:
        raise ValueError(f"{operator}: {name} must be on {like.device} like {like_name}, got {counts.device}")
    return counts.to(torch.int64)


def wrong(operator: str, name: str, expected: str, value: object) -> Exception:
    """What to raise for an argument that is no tensor (TypeError) or another one than expected (ValueError)."""
    if not isinstance(value, Tensor):
        return TypeError(f"{operator}: {name} must be a tensor, {expected}, got {type(value).__name__}")
    return ValueError(f"{operator}: {name} must be {expected}, got {describe(value)}")


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; never on the meta device, which has none.

    Not torch.amp.is_autocast_available, which the compiler of torch 2.11 cannot trace.
    """
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def native_in_fp32(operator: str, *tensors: Tensor | None) -> bool:
    """Whether an operator whose native kernel is in fp32 alone runs it on these.

    Elsewhere the reference is the way, with ``use_backend("native")`` too.
    """
    return native_in((torch.float32,), operator, *tensors)


def native_in(dtypes: tuple[torch.dtype, ...], operator: str, *tensors: Tensor | None) -> bool:
    """Likewise where the kernel is for these dtypes, one at a time."""
    given = [one for one in tensors if one is not None]
    device, dtype = given[0].device.type, given[0].dtype
    return (
        backend.active_backend() != "reference"
        and backend.has_native(operator, device)
        and dtype in dtypes
        and all(one.dtype == dtype for one in given)
        and not autocast_enabled(device)
    )


def describe(tensor: Tensor) -> str:
    """Dtype and shape for a message, as in "float32 (2,64,64)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} ({','.join(map(str, tensor.shape))})"
