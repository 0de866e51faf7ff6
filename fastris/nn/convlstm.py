"""ConvLSTM layers.

T = steps, B = batch, C = hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastris.ops.convlstm import convlstm
from fastris.ops.lstm_gates import lstm_gates
from fastris.reference.convlstm import conv2d_same

State = tuple[Tensor, Tensor]


def _pair(kernel_size: int | tuple[int, int]) -> tuple[int, int]:
    return (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size


class ConvLSTMCell(nn.Module):
    """One ConvLSTM step: ``cell(x, (h, c)) -> h, c``.

    Args:
        input_dim, hidden_dim: channels of x and of h.
        kernel_size: int or (kh, kw).
        bias: whether the convolution has a bias.
        forget_bias: start value added to the forget gate's bias (0 as in ndrplz's module).

    The parameters are ``conv.weight`` (4C, input_dim + C, kh, kw) and ``conv.bias`` (4C,), gate order i, f, o, g, so
    the state_dict is that of github.com/ndrplz/ConvLSTM_pytorch.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_dim, self.hidden_dim = input_dim, hidden_dim
        self.kernel_size = _pair(kernel_size)
        self.bias = bias
        self.conv = nn.Conv2d(input_dim + hidden_dim, 4 * hidden_dim, self.kernel_size, bias=bias)
        if bias and forget_bias:
            with torch.no_grad():
                assert self.conv.bias is not None
                self.conv.bias[hidden_dim : 2 * hidden_dim] += forget_bias

    def forward(self, x: Tensor, cur_state: State) -> State:
        """(B, input_dim, H, W) and the state (h, c) → the next (h, c), (B, C, H, W) each."""
        hidden, cell = cur_state
        gates = conv2d_same(torch.cat([x, hidden], dim=1), self.conv.weight)
        return lstm_gates(gates, cell, bias=self.conv.bias)

    def init_hidden(self, batch_size: int, image_size: tuple[int, int]) -> State:
        """A zero state on the module's device and dtype."""
        zeros = self.conv.weight.new_zeros(batch_size, self.hidden_dim, *image_size)
        return zeros, zeros.clone()


class ConvLSTM(nn.Module):
    """A stack of ConvLSTM layers over a sequence, with ndrplz's constructor, results and state_dict.

    Args:
        input_dim: channels of the input.
        hidden_dim: C, or one per layer.
        kernel_size: int or (kh, kw), or a list with one per layer.
        num_layers: number of layers.
        batch_first: the input is (B, T, …) rather than (T, B, …).
        bias: whether the convolutions have a bias.
        return_all_layers: return every layer's outputs and state, not only the last one's.

    ``forward(x, hidden_state=None, steps=None)`` takes (T, B, input_dim, H, W), (B, T, …) with ``batch_first``, or one
    (B, input_dim, H, W) used at each of ``steps`` steps. ``hidden_state`` is a list of (h, c), one per layer. It gives
    ``(layer_outputs, last_states)``: lists of (B, T, C, H, W) — always batch first, as in the original — and of [h, c].
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | list[int],
        kernel_size: int | tuple[int, int] | list[tuple[int, int]] | list[int],
        num_layers: int,
        batch_first: bool = False,
        bias: bool = True,
        return_all_layers: bool = False,
    ) -> None:
        super().__init__()
        dims = hidden_dim if isinstance(hidden_dim, list) else [hidden_dim] * num_layers
        kernels = kernel_size if isinstance(kernel_size, list) else [kernel_size] * num_layers
        if not len(dims) == len(kernels) == num_layers:
            raise ValueError(
                f"ConvLSTM: hidden_dim and kernel_size must have one entry per layer: expected {num_layers}, "
                f"got {len(dims)} and {len(kernels)}"
            )
        self.input_dim, self.hidden_dim, self.kernel_size = input_dim, dims, [_pair(k) for k in kernels]
        self.num_layers, self.batch_first, self.bias = num_layers, batch_first, bias
        self.return_all_layers = return_all_layers
        inputs = [input_dim, *dims[:-1]]
        self.cell_list: Sequence[ConvLSTMCell] = nn.ModuleList(  # type: ignore[assignment]
            ConvLSTMCell(inputs[k], dims[k], self.kernel_size[k], bias) for k in range(num_layers)
        )

    def forward(
        self, x: Tensor, hidden_state: list[State] | None = None, steps: int | None = None
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        if x.dim() not in (4, 5):
            raise ValueError(f"ConvLSTM: x must have 4 or 5 dimensions, got shape {tuple(x.shape)}")
        if hidden_state is not None and len(hidden_state) != self.num_layers:
            raise ValueError(f"ConvLSTM: hidden_state must have {self.num_layers} entries, got {len(hidden_state)}")
        if x.dim() == 5:
            x = x.transpose(0, 1) if self.batch_first else x
            steps = None
        outputs, states = [], []
        for k, layer in enumerate(self.cell_list):
            hidden, cell = hidden_state[k] if hidden_state is not None else (None, None)
            x, hidden, cell = convlstm(x, layer.conv.weight, layer.conv.bias, hidden, cell, steps)
            steps = None
            outputs.append(x.transpose(0, 1))
            states.append([hidden, cell])
        if self.return_all_layers:
            return outputs, states
        return outputs[-1:], states[-1:]
