"""The Triton kernels of lstm_gates: run by Triton's interpreter on the CPU, and on a GPU where there is one."""

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
from fastris.ops.lstm_gates_triton import lstm_gates_backward_out, lstm_gates_out
from fastris.reference import lstm_gates

device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
tolerances = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
torch.manual_seed(0)


def channels_last(*shape, dtype=dtype):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def poisoned(like):
    return None if like is None else torch.full_like(like, torch.nan)


def check(found, expected, what):
    tolerance = tolerances[found.dtype]
    close = {"rtol": tolerance, "atol": tolerance, "msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(found.double(), expected, **close)


def check_all(gates, cell_prev, addend, bias, peephole, d_hidden, d_cell, d_sum, state):
    arguments = gates, cell_prev, addend, bias, peephole
    what = f"{tuple(gates.shape)}, given: {[value is not None for value in (*arguments, d_hidden, d_cell, d_sum)]}"
    wide = [None if value is None else value.double().requires_grad_() for value in arguments]
    zeros = torch.zeros_like(state, dtype=torch.float64)
    if wide[1] is None:
        wide[1] = zeros.clone().requires_grad_()
    expected = lstm_gates(*wide)
    hidden, cell = poisoned(state.to(dtype)), poisoned(state)
    lstm_gates_out(*arguments, hidden, cell)
    check(hidden, expected[0], f"hidden of {what}")
    check(cell, expected[1], f"cell of {what}")

    gradients = [zeros if value is None else value.double() for value in (d_hidden, d_cell)]
    d_gates_expected, d_cell_prev_expected = torch.autograd.grad(expected, wide[:2], gradients)
    in_place = d_cell is not None
    d_gates = gates if in_place else poisoned(gates)
    d_cell_prev = d_cell if in_place else poisoned(cell_prev)
    sum_before = None if d_sum is None else d_sum.double().clone()
    lstm_gates_backward_out(*arguments, d_hidden, d_cell, d_gates, d_cell_prev, d_sum)
    check(d_gates, d_gates_expected, f"d_gates of {what}")
    if d_cell_prev is not None:
        check(d_cell_prev, d_cell_prev_expected, f"d_cell_prev of {what}")
    if d_sum is not None:
        check(d_sum, sum_before + d_gates_expected, f"d_sum of {what}")


def shapes():
    yield from ((2, 30, 5, 7), (1, 1, 1, 1), (3, 1, 4, 5), (0, 8, 3, 3), (2, 16, 0, 3), (1, 72, 3, 5), (1, 8, 9, 17))
    if device == "cuda":
        yield (2, 64, 33, 31)


for shape in shapes():
    batch, channels, height, width = shape
    gate_shape = batch, 4 * channels, height, width
    for state_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        state = channels_last(*shape, dtype=state_dtype)
        bias = torch.randn(4 * channels, device=device)
        peephole = torch.randn(3 * channels, device=device)
        for cell_prev, addend, bias, peephole, d_hidden, d_cell, d_sum in (
            (state.clone(), channels_last(*gate_shape), bias, peephole, state.to(dtype), state.clone(), state_dtype),
            (state.clone(), None, None, None, state.to(dtype), None, dtype),
            (None, channels_last(*gate_shape), bias.to(dtype), None, None, state.clone(), None),
            (None, None, None, peephole.to(dtype), state.to(dtype), None, None),
        ):
            d_sum = None if d_sum is None else channels_last(*gate_shape, dtype=d_sum)
            gates = channels_last(*gate_shape)
            check_all(gates, cell_prev, addend, bias, peephole, d_hidden, d_cell, d_sum, state)

# Pre-activations that overflow a careless sigmoid or tanh, or vanish in one.
values = torch.tensor([-3e4, -50, -20, -0.55, -1e-3, -1e-7, 0, 1e-7, 1e-3, 0.54, 20, 50, 3e4], device=device)
grid = torch.cartesian_prod(values, values).T
gates = torch.stack([grid[0], grid[1], grid[1], grid[0]]).reshape(1, 4, 1, -1).to(dtype)
gates = gates.contiguous(memory_format=torch.channels_last)
state = grid[:1].reshape(1, 1, 1, -1).clamp(-50, 50).to(dtype)
check_all(gates, state, None, None, None, torch.ones_like(state), None, None, state)

if dtype in (torch.float32, torch.float64):  # relative accuracy near 0
    gates = torch.zeros(1, 4, 1, 400, dtype=dtype, device=device)
    gates[:, 3] = torch.logspace(-30, 0, 400, device=device)
    gates = gates.contiguous(memory_format=torch.channels_last)
    hidden, cell = poisoned(gates[:, :1].contiguous()), poisoned(gates[:, :1].contiguous())
    lstm_gates_out(gates, None, None, None, None, hidden, cell)
    expected = gates[:, 3:].double().tanh() / 2
    torch.testing.assert_close(cell.double(), expected, rtol=tolerances[dtype] / 4, atol=0)
    torch.testing.assert_close(hidden.double(), expected.tanh() / 2, rtol=tolerances[dtype] / 4, atol=0)
"""


def run(device: str, dtype: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE, device, dtype], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 makes scalars of arrays of one element, which NumPy 2.4 refuses",
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_kernels_match_the_reference_in_the_interpreter(dtype: str) -> None:
    """bf16 is left to a GPU: the interpreter computes it wrongly."""
    run("cpu", dtype, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_kernels_match_the_reference_on_a_gpu(dtype: str) -> None:
    run("cuda", dtype)
