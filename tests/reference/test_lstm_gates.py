"""The gate equations, against scalar arithmetic and gradcheck."""

from __future__ import annotations

import math

import pytest
import torch

from fastris import lstm_gates, reference
from fastris.reference.lstm_gates import lstm_gates_backward


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


@pytest.mark.parametrize("given", [(), ("addend",), ("bias",), ("peephole",), ("addend", "bias", "peephole")])
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
def test_the_explicit_backward_is_that_of_autograd(given, used):
    sizes = {"addend": (2, 12, 4, 5), "bias": (12,), "peephole": (9,)}
    gates = torch.randn(2, 12, 4, 5, dtype=torch.float64, requires_grad=True)
    previous = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    optional = [
        torch.randn(size, dtype=torch.float64, requires_grad=True) if name in given else None
        for name, size in sizes.items()
    ]
    arguments = gates, previous, *optional
    results = reference.lstm_gates(*arguments)
    grads = [torch.randn_like(one) if wanted else None for one, wanted in zip(results, used, strict=True)]
    leaves = [one for one in arguments if one is not None]
    outputs = [one for one, wanted in zip(results, used, strict=True) if wanted]
    expected = iter(torch.autograd.grad(outputs, leaves, [one for one in grads if one is not None]))
    d_gates, d_previous, d_bias, d_peephole = lstm_gates_backward(*arguments, *grads)
    d_optional = d_gates, d_bias, d_peephole
    found = [d_gates, d_previous, *(d for d, one in zip(d_optional, optional, strict=True) if one is not None)]
    for ours, truth in zip(found, expected, strict=True):
        rounding = torch.finfo(torch.float64).eps * 64  # twice as many as there are operations on the way
        summed = 2 * 4 * 5 if truth.dim() == 1 else 1
        assert (ours - truth).abs().max() <= rounding * summed * max(1, truth.abs().max())
    assert [one.numel() for one in (d_bias, d_peephole)] == [12 * ("bias" in given), 9 * ("peephole" in given)]


def test_the_explicit_backward_has_the_dtypes_of_the_arguments():
    gates, addend = torch.randn(1, 8, 2, 2).bfloat16(), torch.randn(1, 8, 2, 2)
    previous, bias, peephole = torch.randn(1, 2, 2, 2), torch.randn(8).half(), torch.randn(6).double()
    results = lstm_gates_backward(gates, previous, None, bias, peephole, previous.bfloat16(), None)
    assert [one.dtype for one in results] == [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    assert lstm_gates_backward(gates, previous, addend, None, None, None, previous)[0].dtype == torch.float32
