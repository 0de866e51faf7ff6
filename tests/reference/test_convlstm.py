"""The sequence operator against a loop written from the equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastris import convlstm


def naive(x, weight, bias, hidden, cell):
    outputs = []
    height, width = weight.shape[-2:]
    padding = ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2)  # left, right, top, bottom
    for x_t in x:
        gates = F.conv2d(F.pad(torch.cat([x_t, hidden], 1), padding), weight, bias)
        i, f, o, g = gates.chunk(4, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs), hidden, cell


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3), (2, 2), (4, 3)])
def test_equals_the_equations(kernel):
    x = torch.randn(4, 2, 3, 7, 6, dtype=torch.float64)
    weight, bias = torch.randn(20, 8, *kernel, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    hidden, cell = torch.randn(2, 2, 5, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(
        convlstm(x, weight, bias, hidden, cell), naive(x, weight, bias, hidden, cell), rtol=1e-12, atol=1e-12
    )


def test_a_constant_input_is_the_input_repeated_and_the_state_starts_at_zero():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    weight = torch.randn(8, 5, 3, 3, dtype=torch.float64)
    zeros = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    constant = convlstm(x, weight, steps=3)
    torch.testing.assert_close(constant, convlstm(x.expand(3, -1, -1, -1, -1), weight, None, zeros, zeros))


def test_gradients_in_fp64():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: convlstm(*a, steps=2), (x, weight, bias))


@pytest.mark.parametrize(
    ("arguments", "keywords", "name"),
    [
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, 3)), {}, "x"),
        ((torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 3, 3)), {}, "steps"),
        ((torch.zeros(2, 1, 3, 4, 4), torch.zeros(4, 5, 3, 3)), {}, "weight"),
        ((torch.zeros(2, 1, 3, 4, 4), torch.zeros(4, 4, 3, 3), None, torch.zeros(1, 2, 4, 4)), {}, "hidden"),
    ],
)
def test_a_wrong_argument_is_named(arguments, keywords, name):
    with pytest.raises(ValueError, match=f"convlstm: {name}"):
        convlstm(*arguments, **keywords)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 2, 3, 5, 4)])
def test_no_steps_give_the_state_that_was_given(shape):
    weight = torch.randn(8, 5, 3, 3)
    hidden, cell = torch.randn(2, 2, 2, 5, 4)
    steps = 0 if len(shape) == 4 else None
    outputs, last_hidden, last_cell = convlstm(torch.randn(shape), weight, None, hidden, cell, steps)
    assert outputs.shape == (0, 2, 2, 5, 4)
    assert torch.equal(last_hidden, hidden) and torch.equal(last_cell, cell)
    assert all(one.eq(0).all() for one in convlstm(torch.randn(shape), weight, steps=steps)[1:])
