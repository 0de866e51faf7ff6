"""What the ConvLSTM modules check alike; ``owner`` is the module that the message names."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastris.ops.arguments import autocast_enabled, describe


def positive_int(owner: str, name: str, value: Any) -> int:
    """``value`` as an int of at least 1.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")
    return int(value)


def kernel_pair(owner: str, value: Any) -> tuple[int, int]:
    """A kernel size, k or (kh, kw), as (kh, kw).

    Raises:
        ValueError: no positive integers, or not two of them.
    """
    sizes = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"{owner}: kernel_size must be k or (kh, kw), got {value!r}")
    return positive_int(owner, "kernel_size", sizes[0]), positive_int(owner, "kernel_size", sizes[1])


def check_input(owner: str, name: str, value: Any, shapes: Mapping[int, str], channels: int, parameter: Tensor) -> None:
    """An input (…, channels, H, W) beside a parameter of the module.

    Args:
        shapes: for each accepted number of dimensions, the shape in words.

    Raises:
        TypeError: no tensor.
        ValueError: another number of dimensions or channels, another device, or, without autocast, another dtype.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() not in shapes or value.shape[-3] != channels:
        raise ValueError(f"{owner}: {name} must be {' or '.join(shapes.values())}, got {describe(value)}")
    _check_kind(f"{owner}: {name}", value, parameter.device, (parameter.dtype,), "the parameters")


def check_state(owner: str, name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """A state ``(h, c)`` beside the input ``like``; c may be fp32 where the input is bf16 or fp16.

    Raises:
        TypeError: no pair of tensors.
        ValueError: another shape or device, or, without autocast, another dtype.
    """
    if not isinstance(value, (tuple, list)) or [isinstance(part, Tensor) for part in value] != [True, True]:
        raise TypeError(f"{owner}: {name} must be a pair of tensors (h, c), got {type(value).__name__}")
    hidden, cell = value
    cell_dtypes = (like.dtype, torch.promote_types(like.dtype, torch.float32))
    for part, tensor, dtypes in (("h", hidden, (like.dtype,)), ("c", cell, cell_dtypes)):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{owner}: {part} of {name} must be {shape}, got {describe(tensor)}")
        _check_kind(f"{owner}: {part} of {name}", tensor, like.device, dtypes, "the input")
    return hidden, cell


def _check_kind(what: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], like: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device} like {like}, got {tensor.device}")
    if tensor.dtype not in dtypes and not autocast_enabled(device.type):
        raise ValueError(f"{what} must be {str(dtypes[0]).removeprefix('torch.')} like {like}, got {describe(tensor)}")
