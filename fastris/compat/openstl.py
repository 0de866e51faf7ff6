"""The ConvLSTM cell of OpenSTL (github.com/chengtan9907/OpenSTL, ``openstl/modules/convlstm_modules.py``).

What differs: a stride other than 1 is refused (the original's state would shrink at every step), and an even
``filter_size`` works. The original sets a forget bias of 1 and never adds it; nor does this.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.arguments import check_input, check_state, positive_int
from fastris.ops.conv2d_same import conv2d_same
from fastris.ops.lstm_gates import lstm_gates

__all__ = ["ConvLSTMCell"]


class ConvLSTMCell(nn.Module):
    """One step: ``cell(x_t, h_t, c_t) -> h_new, c_new``.

    The parameters are ``conv_x.0`` and ``conv_h.0``, without bias, gate order i, f, g, o; with ``layer_norm`` also
    ``conv_x.1`` and ``conv_h.1``. ``conv_o`` and ``conv_last`` are in the state_dict as they are in the original's, and
    take no part in the result in either.

    Args:
        in_channel, num_hidden: channels of x and of h.
        height, width: size of the images, which only ``layer_norm`` needs.
        filter_size: k.
        stride: 1.
        layer_norm: whether each convolution is followed by a LayerNorm over (channels, height, width).

    Raises:
        ValueError: sizes that are no positive integers, or another stride.
    """

    def __init__(
        self,
        in_channel: int,
        num_hidden: int,
        height: int,
        width: int,
        filter_size: int,
        stride: int,
        layer_norm: bool | int,
    ) -> None:
        super().__init__()
        self.in_channel = positive_int("ConvLSTMCell", "in_channel", in_channel)
        self.num_hidden = positive_int("ConvLSTMCell", "num_hidden", num_hidden)
        self.filter_size = positive_int("ConvLSTMCell", "filter_size", filter_size)
        if stride != 1:
            raise ValueError(f"ConvLSTMCell: stride must be 1, got {stride!r}")
        size = positive_int("ConvLSTMCell", "height", height), positive_int("ConvLSTMCell", "width", width)
        self.norm_size = size if layer_norm else None
        self.conv_x = self._branch(self.in_channel, 4 * self.num_hidden)
        self.conv_h = self._branch(self.num_hidden, 4 * self.num_hidden)
        self.conv_o = self._branch(2 * self.num_hidden, self.num_hidden)
        self.conv_last = nn.Conv2d(2 * self.num_hidden, self.num_hidden, 1, bias=False)

    def _branch(self, inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, self.filter_size, padding="same", bias=False)
        if self.norm_size is None:
            return nn.Sequential(conv)
        return nn.Sequential(conv, nn.LayerNorm([outputs, *self.norm_size]))

    def forward(self, x_t: Tensor, h_t: Tensor, c_t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channel, H, W) and the state → the next (h, c), (B, C, H, W) each.

        Raises:
            TypeError: no tensors.
            ValueError: another shape, device or dtype than the parameters and the input ask for.
        """
        height, width = self.norm_size or ("H", "W")
        shapes = {4: f"(B, {self.in_channel}, {height}, {width})"}
        check_input("ConvLSTMCell", "x_t", x_t, shapes, self.in_channel, self.conv_last.weight)
        if self.norm_size is not None and tuple(x_t.shape[-2:]) != self.norm_size:
            raise ValueError(f"ConvLSTMCell: x_t must be {shapes[4]} for the LayerNorm, got {tuple(x_t.shape)}")
        check_state("ConvLSTMCell", "the state", (h_t, c_t), (x_t.shape[0], self.num_hidden, *x_t.shape[-2:]), x_t)
        return lstm_gates(_gates(self.conv_h, h_t), c_t, addend=_gates(self.conv_x, x_t))


def _gates(branch: nn.Sequential, x: Tensor) -> Tensor:
    """The branch's output in the operators' gate order: its parameters are reordered, which costs less."""
    gates = conv2d_same(x, _reordered(cast(Tensor, branch[0].weight)))
    if len(branch) == 1:
        return gates
    norm = cast(nn.LayerNorm, branch[1])
    return F.layer_norm(gates, norm.normalized_shape, _reordered(norm.weight), _reordered(norm.bias), norm.eps)


def _reordered(parameter: Tensor) -> Tensor:
    """i, f, g, o → i, f, o, g along the first dimension."""
    i, f, g, o = parameter.chunk(4)
    return torch.cat([i, f, o, g])
