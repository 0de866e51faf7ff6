"""ndrplz's modules against their equations and parameter names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastris.compat.ndrplz import ConvLSTM, ConvLSTMCell


class NaiveCell(nn.Module):
    def __init__(self, input_dim, hidden_dim, kernel_size, bias):
        super().__init__()
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=padding, bias=bias)

    def forward(self, x, state):
        h, c = state
        i, f, o, g = self.conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class NaiveStack(nn.Module):
    """Batch first, every layer's outputs and states."""

    def __init__(self, input_dim, hidden_dims, kernel_sizes, bias):
        super().__init__()
        self.hidden_dims = hidden_dims
        sizes = zip([input_dim, *hidden_dims[:-1]], hidden_dims, kernel_sizes, strict=True)
        self.cell_list = nn.ModuleList(NaiveCell(*size, bias) for size in sizes)

    def forward(self, x, states=None):
        outputs, last = [], []
        for k, cell in enumerate(self.cell_list):
            zeros = x.new_zeros(x.shape[0], self.hidden_dims[k], *x.shape[-2:])
            h, c = states[k] if states is not None else (zeros, zeros)
            steps = []
            for t in range(x.shape[1]):
                h, c = cell(x[:, t], (h, c))
                steps.append(h)
            x = torch.stack(steps, dim=1)
            outputs.append(x)
            last.append([h, c])
        return outputs, last


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernels", [[(3, 3), (3, 3)], [(1, 5), (3, 1)]])
def test_a_stack_is_the_original_with_its_positional_arguments(assert_same_module, kernels, bias):
    original = NaiveStack(2, [3, 4], kernels, bias)
    module = ConvLSTM(2, [3, 4], kernels, 2, True, bias, True)
    assert_same_module(original, module, torch.randn(2, 3, 2, 7, 6))


def test_a_state_continues_where_the_original_raises(assert_same_module):
    original = NaiveStack(2, [3, 4], [(3, 3), (3, 3)], True)
    module = ConvLSTM(2, [3, 4], (3, 3), 2, batch_first=True, return_all_layers=True)
    states = [[torch.randn(2, c, 5, 4) for _ in "hc"] for c in (3, 4)]
    assert_same_module(original, module, torch.randn(2, 3, 2, 5, 4), states)


def test_the_cell_is_the_original_and_takes_its_keywords(assert_same_module):
    original, cell = NaiveCell(2, 3, (3, 5), True), ConvLSTMCell(2, 3, (3, 5), True)
    x, h, c = torch.randn(2, 2, 6, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    assert_same_module(original, cell, x, [h, c])
    cell.float()
    torch.testing.assert_close(cell(input_tensor=x, cur_state=[h, c]), cell(x, (h, c)))


def test_the_results_are_lists_of_the_last_layer_unless_asked_for_all():
    module = ConvLSTM(input_dim=2, hidden_dim=3, kernel_size=(3, 3), num_layers=2, batch_first=False)
    outputs, states = module(input_tensor=torch.randn(4, 1, 2, 5, 5), hidden_state=None)
    assert isinstance(outputs, list) and [tuple(output.shape) for output in outputs] == [(1, 4, 3, 5, 5)]
    assert isinstance(states, list) and len(states) == 1
    h, c = states[0]
    torch.testing.assert_close(h, outputs[0][:, -1])
    assert c.shape == (1, 3, 5, 5)
