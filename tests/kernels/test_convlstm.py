"""The Triton kernels of a ConvLSTM step: run by Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


CODE = """
import sys
import torch
from fastris.ops.convlstm_triton import conv_gates_backward_out, conv_gates_out, pack_weight, supports
from fastris.reference import lstm_gates
from fastris.reference.convlstm import conv2d_same

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.backends.cudnn.allow_tf32 = False
tolerances = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
torch.manual_seed(0)


def channels_last(*shape, dtype=dtype):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def poisoned(like):
    return None if like is None else torch.full_like(like, torch.nan)


def check(found, expected, what):
    tolerance = tolerances[found.dtype]
    close = {"rtol": tolerance, "atol": tolerance, "msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(found.double(), expected, **close)


def check_all(hidden_prev, weight, cell_prev, addend, bias, peephole, dilation, d_hidden, d_cell, d_sum, state):
    assert supports(weight)
    arguments = hidden_prev, weight, cell_prev, addend, bias, peephole
    given = [value is not None for value in (*arguments, d_hidden, d_cell, d_sum)]
    what = f"{tuple(hidden_prev.shape)}, given: {given}"
    packed = pack_weight(weight)
    wide = [None if value is None else value.double() for value in arguments]
    zeros = torch.zeros_like(state, dtype=torch.float64)
    convolved = conv2d_same(wide[0], wide[1], dilation=dilation).requires_grad_()
    wide_cell = (zeros.clone() if wide[2] is None else wide[2]).requires_grad_()
    expected = lstm_gates(convolved, wide_cell, *wide[3:])
    for gates in (None, poisoned(channels_last(*convolved.shape))):
        hidden, cell = poisoned(hidden_prev), poisoned(state)
        conv_gates_out(hidden_prev, packed, *arguments[2:], dilation, hidden, cell, gates)
        check(hidden, expected[0], f"hidden of {what}")
        check(cell, expected[1], f"cell of {what}")
    check(gates, convolved, f"gates of {what}")

    gradients = [zeros if value is None else value.double() for value in (d_hidden, d_cell)]
    d_gates_expected, d_cell_prev_expected = torch.autograd.grad(expected, (convolved, wide_cell), gradients)
    d_gates = poisoned(gates)
    d_cell_prev = d_cell if d_cell is not None else poisoned(cell_prev)
    sum_before = None if d_sum is None else d_sum.double().clone()
    conv_gates_backward_out(
        hidden_prev, packed, *arguments[2:], dilation, d_hidden, d_cell, d_gates, d_cell_prev, d_sum
    )
    check(d_gates, d_gates_expected, f"d_gates of {what}")
    if d_cell_prev is not None:
        check(d_cell_prev, d_cell_prev_expected, f"d_cell_prev of {what}")
    if d_sum is not None:
        check(d_sum, sum_before + d_gates_expected, f"d_sum of {what}")


def cases():  # shape, kernel size, dilation
    yield (2, 30, 5, 7), (3, 3), 1
    yield (1, 1, 1, 1), (1, 1), 1
    yield (3, 1, 4, 5), (5, 3), 2
    yield (0, 8, 3, 3), (3, 3), 1
    yield (2, 16, 1, 1), (3, 3), 2
    yield (1, 61, 3, 11), (1, 3), 3
    yield (2, 64, 9, 9), (3, 1), 1
    yield (1, 4, 2, 3), (7, 7), 1
    if device == "cuda":
        yield (3, 64, 33, 31), (3, 3), 1
        yield (2, 32, 65, 64), (5, 5), 2


for number, (shape, size, dilation) in enumerate(cases()):
    batch, channels, height, width = shape
    gate_shape = batch, 4 * channels, height, width
    weight = torch.randn(4 * channels, channels, *size, device=device)
    weight = (weight / weight[0].numel() ** 0.5).to(dtype)
    state = channels_last(*shape, dtype=torch.float32)
    bias = torch.randn(4 * channels, device=device)
    peephole = torch.randn(3 * channels, device=device)
    narrow = state.to(dtype)
    wide_addend = channels_last(*gate_shape, dtype=torch.float32)
    given = [
        (state.clone(), wide_addend, bias, peephole, narrow, state.clone(), torch.float32),
        (narrow.clone(), channels_last(*gate_shape), bias.to(dtype), None, narrow, None, dtype),
        (None, None, None, None, None, narrow.clone(), None),
    ]
    if device == "cpu" and number > 0:  # the interpreter is slow
        given = given[number % 3 :][:1]
    for cell_prev, addend, bias, peephole, d_hidden, d_cell, d_sum in given:
        d_sum = None if d_sum is None else channels_last(*gate_shape, dtype=d_sum)
        like = narrow if cell_prev is None else cell_prev
        check_all(
            channels_last(*shape), weight, cell_prev, addend, bias, peephole, dilation, d_hidden, d_cell, d_sum, like
        )

for channels, shape, weight_dtype in (
    (8, (32, 8, 2, 3), dtype),  # even
    (8, (32, 8, 9, 9), dtype),  # large
    (8, (32, 9, 3, 3), dtype),  # not the recurrent part alone
    (8, (32, 8, 3, 3), torch.float64),
    (65, (260, 65, 3, 3), dtype),
):
    assert not supports(torch.empty(shape, dtype=weight_dtype, device=device))
"""


SEQUENCE = """
import sys
import torch
from fastris import reference
from fastris.ops import convlstm as layer
from fastris.ops import convlstm_triton

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
called = []


class Counted:
    pack_weight = staticmethod(convlstm_triton.pack_weight)

    def __getattr__(self, name):
        called.append(name)
        return getattr(convlstm_triton, name)


layer.fused_step = lambda weight: Counted()
torch.manual_seed(0)
x = torch.randn(2, 3, 5, 6, device=device).to(dtype).requires_grad_()
weight = (0.3 * torch.randn(24, 9, 3, 3, device=device)).to(dtype).requires_grad_()
bias = torch.randn(24, device=device).to(dtype).requires_grad_()
state = [torch.randn(2, 6, 5, 6, device=device).to(dtype).requires_grad_() for _ in range(2)]
for memory in ("save", "balanced", "recompute"):
    for hidden, cell in ((None, None), state):
        inputs = [one for one in (x, weight, bias, hidden, cell) if one is not None]
        found = layer.convlstm(x, weight, bias, hidden, cell, 4, memory=memory)
        wide = [one.detach().double().requires_grad_() for one in inputs]
        expected = reference.convlstm(*wide, steps=4)
        grads = [torch.randn_like(one) for one in expected]
        found += torch.autograd.grad(found, inputs, [grad.to(one.dtype) for grad, one in zip(grads, found)])
        expected += torch.autograd.grad(expected, wide, grads)
        for ours, truth in zip(found, expected):
            assert (ours.double() - truth).norm() <= tolerance * truth.norm(), (memory, hidden is None)
assert set(called) == {"conv_gates_out", "conv_gates_backward_out"}
"""


def run(device: str, dtype: str, code: str = CODE, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code, device, dtype], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


needs_interpreter = pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 makes scalars of arrays of one element, which NumPy 2.4 refuses",
)


@needs_interpreter
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernels_match_the_reference_in_the_interpreter(dtype: str) -> None:
    """bf16 is left to a GPU: the interpreter computes it wrongly."""
    run("cpu", dtype, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_kernels_match_the_reference_on_a_gpu(dtype: str) -> None:
    run("cuda", dtype)


@needs_interpreter
def test_a_sequence_of_fused_steps_in_the_interpreter() -> None:
    run("cpu", "float32", SEQUENCE, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_a_sequence_of_fused_steps_on_a_gpu() -> None:
    run("cuda", "bfloat16", SEQUENCE)
