"""OpenSTL's cell against its equations and parameter names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastris.compat.openstl import ConvLSTMCell


class NaiveCell(nn.Module):
    """conv_o and conv_last are part of the state_dict and of nothing else."""

    def __init__(self, in_channel, num_hidden, height, width, filter_size, layer_norm):
        super().__init__()

        def branch(inputs, outputs):
            conv = nn.Conv2d(inputs, outputs, filter_size, padding=filter_size // 2, bias=False)
            return nn.Sequential(conv, *([nn.LayerNorm([outputs, height, width])] if layer_norm else []))

        self.conv_x, self.conv_h = branch(in_channel, 4 * num_hidden), branch(num_hidden, 4 * num_hidden)
        self.conv_o = branch(2 * num_hidden, num_hidden)
        self.conv_last = nn.Conv2d(2 * num_hidden, num_hidden, 1, bias=False)

    def forward(self, x, h, c):
        i, f, g, o = (self.conv_x(x) + self.conv_h(h)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("layer_norm", [0, 1])
@pytest.mark.parametrize("filter_size", [1, 5])
def test_the_cell_is_the_original_with_its_positional_arguments(assert_same_module, filter_size, layer_norm):
    original = NaiveCell(3, 4, 6, 5, filter_size, layer_norm)
    if layer_norm:  # no gate order hides behind equal weights
        for branch in (original.conv_x, original.conv_h):
            nn.init.normal_(branch[1].weight)
            nn.init.normal_(branch[1].bias)
    cell = ConvLSTMCell(3, 4, 6, 5, filter_size, 1, layer_norm)
    assert_same_module(original, cell, torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5))


def test_without_layer_norm_any_size_goes():
    cell = ConvLSTMCell(3, 4, 6, 5, 3, 1, False)
    state = torch.zeros(1, 4, 8, 9)
    assert cell(torch.zeros(1, 3, 8, 9), state, state)[0].shape == (1, 4, 8, 9)


def test_an_even_filter_keeps_the_size():
    state = torch.zeros(1, 4, 6, 5)
    assert ConvLSTMCell(3, 4, 6, 5, 4, 1, True)(torch.zeros(1, 3, 6, 5), state, state)[0].shape == (1, 4, 6, 5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="stride must be 1, got 2"):
        ConvLSTMCell(3, 4, 6, 5, 3, 2, False)
    with pytest.raises(ValueError, match=r"filter_size must be a positive integer, got \(3, 3\)"):
        ConvLSTMCell(3, 4, 6, 5, (3, 3), 1, False)
    cell, state = ConvLSTMCell(3, 4, 6, 5, 3, 1, True), torch.zeros(1, 4, 6, 5)
    with pytest.raises(ValueError, match=r"x_t must be \(B, 3, 6, 5\), got float32 \(1,4,6,5\)"):
        cell(state, state, state)
    with pytest.raises(ValueError, match=r"x_t must be \(B, 3, 6, 5\) for the LayerNorm, got"):
        cell(torch.zeros(1, 3, 8, 8), state, state)
    with pytest.raises(ValueError, match=r"c of the state must be \(1, 4, 6, 5\), got float32 \(1,3,6,5\)"):
        cell(torch.zeros(1, 3, 6, 5), state, torch.zeros(1, 3, 6, 5))
