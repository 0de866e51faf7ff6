"""A 1×1 convolution as a matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastris.nn.pointwise import Pointwise


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_torchs_convolution(layout: torch.memory_format) -> None:
    theirs = nn.Conv2d(5, 7, 1).double()
    ours = Pointwise(5, 7).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    results = [
        (y, *torch.autograd.grad(y, (x, *conv.parameters()), grad)) for conv in (ours, theirs) for y in (conv(x),)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_channels_last() -> None:
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = Pointwise(5, 7)(x)
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert d_x.is_contiguous(memory_format=torch.channels_last)
