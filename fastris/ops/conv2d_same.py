"""``conv2d_same``: the convolution of a ConvLSTM, ``torch.ops.fastris.conv2d_same``.

B = batch. Stride 1, H and W kept. On the CPU a 3×3 convolution in fp32 goes by Winograd's minimal filtering, with 2¼ or
4 products for a result where there were 9 (csrc/cpu/winograd.cpp). So does one in bf16, whose arithmetic is then fp32,
unless the processor multiplies matrices of bf16 by itself (AMX). All others, as those of CUDA, go to torch's own
libraries. All results are channels_last.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastris import backend, reference
from fastris.ops.arguments import native_in
from fastris.ops.autograd import untransformed, with_gradients

WINOGRAD_DTYPES = (torch.float32,) if torch.cpu._is_amx_tile_supported() else (torch.float32, torch.bfloat16)
"""Of the convolutions that are filtered; processors that multiply matrices of bf16 (AMX) convolve in it by torch."""
LEAST_CHANNELS = 8
"""Fewer than this on either side are no work for matrix products."""
LEAST_SIDE = 8
"""On smaller maps much of a tile is padding, which costs time and digits."""
LEAST_PIXELS = 1024
"""Of a batch: fewer do not make up for the transformation of the weight."""

LEAST_SUMMED = 25
"""In sums this long, tiles of 4×4 results err less than twice as much as the direct way; in shorter ones, more."""

# Schema. `whole`, where given, is what is convolved: other channels and then those of x, which alone get a gradient;
# `skip` says how many come before them. The weight of `winograd_convolve_out` is what `winograd_weight` makes of a
# (out, in, 3, 3) weight, `turned` for the gradient of the input, for tiles of side × side results; `for_results` and
# `for_gradients` are these two where they are there already.

_library = torch.library.Library("fastris", "FRAGMENT")
_library.define(
    "conv2d_same(Tensor x, Tensor weight, Tensor? bias, int dilation, Tensor? whole=None, Tensor? for_results=None,"
    " Tensor? for_gradients=None) -> Tensor"
)
_library.define(
    "conv2d_same_backward(Tensor grad, Tensor x, Tensor weight, int dilation, bool need_x, bool need_weight,"
    " int skip=0, Tensor? for_gradients=None) -> (Tensor d_x, Tensor d_weight)"
)
_library.define("winograd_weight(Tensor weight, bool turned, int side) -> Tensor")
_library.define("winograd_convolve_out(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()")
_library.define("winograd_weight_gradient(Tensor x, Tensor grad, int side) -> Tensor")


class SameConvolution:
    """One weight (out, in, kh, kw) for several calls, which transform it once; all below autograd.

    Tiles of 4×4 results err up to twice as much as torch on channels_last tensors (3.4 times as much as torch on
    contiguous ones, whose gradient of x is its most accurate), tiles of 2×2 as much as torch or less: ``largest``.
    """

    def __init__(self, weight: Tensor, dilation: int = 1, largest: int = 4) -> None:
        self.weight, self.dilation, self.largest = weight, dilation, largest
        self.out, self.inputs, *kernel = weight.shape
        self._by_winograd = (
            weight.is_cpu
            and weight.dtype in WINOGRAD_DTYPES
            and kernel == [3, 3]
            and dilation == 1
            and self.out >= LEAST_CHANNELS
            and self.inputs >= LEAST_CHANNELS
            and backend.has_native("conv2d_same", "cpu")
        )
        self._transformed: dict[tuple[bool, int, int], Tensor] = {}

    def by_winograd(self, x: Tensor) -> bool:
        batch, _, height, width = x.shape
        large = height >= LEAST_SIDE and width >= LEAST_SIDE and batch * height * width >= LEAST_PIXELS
        return self._by_winograd and large

    def side(self, summed: int) -> int:
        """Of the largest tiles that keep the digits where so many products are summed."""
        return min(self.largest, 4 if summed >= LEAST_SUMMED else 2)

    def transformed(self, turned: bool, side: int, skip: int = 0) -> Tensor:
        """All of the weight but its first ``skip`` input channels, as ``winograd_convolve_out`` takes it."""
        key = turned, side, skip
        if key not in self._transformed:
            self._transformed[key] = torch.ops.fastris.winograd_weight.default(
                self.weight[:, skip:].float(), turned, side
            )
        return self._transformed[key]

    def for_results(self) -> Tensor:
        return self.transformed(False, self.side(self.inputs))

    def for_gradients(self, skip: int) -> Tensor:
        return self.transformed(True, self.side(self.out), skip)

    @cached_property
    def channels_last(self) -> Tensor:
        return channels_last(self.weight)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, room: Tensor | None = None, transformed: Tensor | None = None
    ) -> Tensor:
        """(B, in, H, W) → (B, out, H, W), in the ``room`` given unless torch convolves, which takes its own."""
        x = channels_last(x)
        if not self.by_winograd(x):
            return channels_last(reference.conv2d_same(x, self.channels_last, bias, self.dilation))
        y = empty_channels_last(x, self.out) if room is None else room
        bias = None if bias is None else bias.float().contiguous()
        transformed = self.for_results() if transformed is None else transformed
        torch.ops.fastris.winograd_convolve_out.default(x, transformed, bias, y)
        return y

    def backward(
        self, grad: Tensor, x: Tensor, need_x: bool, need_weight: bool, skip: int = 0, transformed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x, but for its first ``skip`` channels, and of the weight, which may be in fp32 where the weight
        is not; those not needed are empty."""
        grad, x = channels_last(grad), channels_last(x)
        if not (need_x or need_weight):
            return grad.new_empty(0), grad.new_empty(0)
        if not self.by_winograd(x):
            d_x, d_weight = self._backward_by_torch(grad, x, need_x, need_weight)
            return channels_last(d_x[:, skip:]) if need_x and skip else d_x, d_weight
        batch, channels, height, width = x.shape
        d_x = empty_channels_last(x, channels - skip if need_x else 0)
        if need_x:
            transformed = self.for_gradients(skip) if transformed is None else transformed
            torch.ops.fastris.winograd_convolve_out.default(grad, transformed, None, d_x)
        if need_weight:
            return d_x, torch.ops.fastris.winograd_weight_gradient.default(x, grad, self.side(batch * height * width))
        return d_x, grad.new_empty(0)

    def _backward_by_torch(self, grad: Tensor, x: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
        down, across = (self.dilation * (size - 1) for size in self.weight.shape[-2:])
        top, left, (height, width) = down // 2, across // 2, x.shape[-2:]
        uneven = down % 2 or across % 2
        if uneven:
            x = channels_last(F.pad(x, (left, across - left, top, down - top)))
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            self.channels_last,
            None,
            [1, 1],
            [0, 0] if uneven else [top, left],
            [self.dilation] * 2,
            False,
            [0, 0],
            1,
            [need_x, need_weight, False],
        )
        empty = grad.new_empty(0)
        if need_x and uneven:
            d_x = d_x[..., top : top + height, left : left + width]
        return channels_last(d_x) if need_x else empty, d_weight if need_weight else empty


def channels_last(tensor: Tensor) -> Tensor:
    """(B, C, H, W) with the channels of a pixel side by side; the tensor itself where they are."""
    return tensor.contiguous(memory_format=torch.channels_last)


def empty_channels_last(maps: Tensor, channels: int) -> Tensor:
    """Memory for (B, channels, H, W), channels_last, of maps (B, ·, H, W)."""
    batch, _, *size = maps.shape
    return torch.empty(
        (batch, channels, *size), dtype=maps.dtype, device=maps.device, memory_format=torch.channels_last
    )


# Kernels


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    whole: Tensor | None = None,
    for_results: Tensor | None = None,
    for_gradients: Tensor | None = None,
) -> Tensor:
    return SameConvolution(weight, dilation).forward(x if whole is None else whole, bias, transformed=for_results)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dilation: int,
    need_x: bool,
    need_weight: bool,
    skip: int = 0,
    for_gradients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    d_x, d_weight = SameConvolution(weight, dilation).backward(grad, x, need_x, need_weight, skip, for_gradients)
    return d_x, d_weight.to(weight.dtype)


_library.impl("conv2d_same", _forward, "CompositeExplicitAutograd")
_library.impl("conv2d_same_backward", _backward, "CompositeExplicitAutograd")

# Fake kernels


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return empty_channels_last(x, weight.shape[0])


def _fake_weight(weight: Tensor, turned: bool, side: int) -> Tensor:
    out, inputs = (weight.shape[1], weight.shape[0]) if turned else weight.shape[:2]
    return weight.new_empty(side + 2, side + 2, inputs * ((out + 15) // 16 * 16))


def _fake_convolve_out(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    return None


def _fake_weight_gradient(x: Tensor, grad: Tensor, side: int) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3, dtype=torch.float32)


torch.library.register_fake("fastris::conv2d_same", _fake, lib=_library)
torch.library.register_fake("fastris::conv2d_same_backward", _backward, lib=_library)
torch.library.register_fake("fastris::winograd_weight", _fake_weight, lib=_library)
torch.library.register_fake("fastris::winograd_convolve_out", _fake_convolve_out, lib=_library)
torch.library.register_fake("fastris::winograd_weight_gradient", _fake_weight_gradient, lib=_library)

# Autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.dilation, whole, _, for_gradients = inputs
    ctx.skip = 0 if whole is None else whole.shape[1] - x.shape[1]
    ctx.save_for_backward(x if whole is None else whole, weight, for_gradients)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, for_gradients = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    d_x, d_weight = _operator_backward(grad, x, weight, ctx.dilation, need_x, need_weight, ctx.skip, for_gradients)
    d_bias = grad.sum((0, 2, 3)) if need_bias else None
    return d_x if need_x else None, d_weight if need_weight else None, d_bias, None, None, None, None


_operator, _operator_backward = with_gradients(
    _library, "conv2d_same", _gradients, _setup_context, (_forward, _backward)
)

# The door


class RepeatedWeight:
    """A weight (out, in, kh, kw) of several calls, such as the steps of a recurrence, which transform it once.

    Make it anew after every change of the weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @cached_property
    def _convolution(self) -> SameConvolution:
        return SameConvolution(self.weight.detach())

    def transformed(self, x: Tensor, skip: int, differentiated: bool) -> tuple[Tensor | None, Tensor | None]:
        """``for_results`` and ``for_gradients`` of the schema, where they are of use for this x."""
        if not untransformed() or not self._convolution.by_winograd(x):  # where sizes are symbols, asking binds them
            return None, None
        with torch.no_grad():
            return self._convolution.for_results(), self._convolution.for_gradients(skip) if differentiated else None


def conv2d_same(
    x: Tensor,
    weight: Tensor | RepeatedWeight,
    bias: Tensor | None = None,
    dilation: int = 1,
    before: Tensor | None = None,
) -> Tensor:
    """Convolve as :func:`fastris.reference.conv2d_same`, the quickest way there is for the device and dtype.

    Args:
        x: (B, in, H, W).
        weight: (out, in, kh, kw), or (out, K + in, kh, kw) with ``before``; a :class:`RepeatedWeight` where several
            calls have it in common.
        bias: optional (out,).
        dilation: pixels between the taps of the kernel.
        before: optional (B, K, H, W), channels ahead of those of x, which get no gradient.
    """
    repeated, weight = (weight, weight.weight) if isinstance(weight, RepeatedWeight) else (None, weight)
    if not native_in(WINOGRAD_DTYPES, "conv2d_same", x, weight, bias, before):
        return reference.conv2d_same(x, weight, bias, dilation, before)
    whole = None if before is None else channels_last(torch.cat([before.detach(), x.detach()], dim=1))
    for_results = for_gradients = None
    if repeated is not None and dilation == 1:
        seen = x if whole is None else whole
        differentiated = torch.is_grad_enabled() and x.requires_grad
        for_results, for_gradients = repeated.transformed(seen, seen.shape[1] - x.shape[1], differentiated)
    return _operator(x, weight, bias, dilation, whole, for_results, for_gradients)
