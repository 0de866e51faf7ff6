"""The gate equations, against scalar arithmetic and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch

from fastris import lstm_gates


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_one_cell_by_hand():
    i, f, o, g, previous = 0.3, -1.2, 0.7, 2.0, 0.5
    gates = torch.tensor([i, f, o, g], dtype=torch.float64).view(1, 4, 1, 1)
    hidden, cell = lstm_gates(gates, torch.full((1, 1, 1, 1), previous, dtype=torch.float64))
    expected_cell = sigmoid(f) * previous + sigmoid(i) * math.tanh(g)
    assert cell.item() == pytest.approx(expected_cell, rel=1e-14)
    assert hidden.item() == pytest.approx(sigmoid(o) * math.tanh(expected_cell), rel=1e-14)


def test_addend_and_bias_are_added_before_the_activations():
    gates, addend = torch.randn(2, 2, 12, 3, 5, dtype=torch.float64)
    bias, previous = torch.randn(12, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)
    together = lstm_gates(gates, previous, addend, bias)
    before = lstm_gates(gates + addend + bias.view(1, -1, 1, 1), previous)
    torch.testing.assert_close(together, before, rtol=0, atol=0)


def test_gradients_in_fp64():
    gates = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    addend = torch.randn(2, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    previous = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lstm_gates, (gates, previous, addend, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gates_keep_an_fp32_cell(dtype):
    gates, previous = torch.randn(1, 8, 4, 4, dtype=dtype), torch.randn(1, 2, 4, 4)
    hidden, cell = lstm_gates(gates, previous)
    assert (hidden.dtype, cell.dtype) == (dtype, torch.float32)
    exact = lstm_gates(gates.double(), previous.double())
    torch.testing.assert_close(cell.double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 120, 1, 1), (2, 8, 0, 3)])
def test_shapes_that_break_things(shape):
    batch, channels, height, width = shape
    hidden, cell = lstm_gates(torch.randn(shape), torch.randn(batch, channels // 4, height, width))
    assert hidden.shape == cell.shape == (batch, channels // 4, height, width)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(1, 6, 2, 2), torch.zeros(1, 1, 2, 2)), "gates"),
        ((torch.zeros(1, 8, 2, 2), torch.zeros(1, 1, 2, 2)), "cell_prev"),
        ((torch.zeros(1, 8, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 8, 2, 3)), "addend"),
        ((torch.zeros(1, 8, 2, 2), torch.zeros(1, 2, 2, 2), None, torch.zeros(2)), "bias"),
    ],
)
def test_a_wrong_argument_is_named(arguments, name):
    with pytest.raises(ValueError, match=f"lstm_gates: {name}"):
        lstm_gates(*arguments)
