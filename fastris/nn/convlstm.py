"""ConvLSTM layers.

T = steps, B = batch, Cin = input channels, C = hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastris.nn.arguments import check_input, check_state, kernel_pair, positive_int
from fastris.ops.conv2d_same import conv2d_same
from fastris.ops.convlstm import convlstm
from fastris.ops.lstm_gates import lstm_gates

State = tuple[Tensor, Tensor]


class ConvLSTMCell(nn.Module):
    """One ConvLSTM step: ``cell(x, (h, c)) -> h, c``.

    The parameters are ``conv.weight`` (4C, input_dim + C, kh, kw) and ``conv.bias`` (4C,), gate order i, f, o, g, so
    the state_dict is that of github.com/ndrplz/ConvLSTM_pytorch; ``peephole`` adds ``peephole_weight`` (3C,).

    Args:
        input_dim, hidden_dim: channels of x and of h.
        kernel_size: k or (kh, kw); an even kernel is padded by one more at the bottom and right.
        bias: whether the convolution has a bias.
        dilation: pixels between the taps of the kernel.
        forget_bias: start value added to the forget gate's bias (0 as in ndrplz's module).
        peephole: whether i, f and o also see the cell state, by one learned weight each per channel, zero at the start
            (Shi et al., *Convolutional LSTM Network*, NIPS 2015, eq. 3, whose weights also vary with the place).

    Raises:
        ValueError: sizes that are no positive integers, or a forget_bias without a bias.
    """

    peephole_weight: nn.Parameter | None

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        *,
        dilation: int = 1,
        forget_bias: float = 0.0,
        peephole: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = positive_int("ConvLSTMCell", "input_dim", input_dim)
        self.hidden_dim = positive_int("ConvLSTMCell", "hidden_dim", hidden_dim)
        self.kernel_size = kernel_pair("ConvLSTMCell", kernel_size)
        self.dilation = positive_int("ConvLSTMCell", "dilation", dilation)
        self.bias = bias
        self.conv = nn.Conv2d(
            self.input_dim + self.hidden_dim,
            4 * self.hidden_dim,
            self.kernel_size,
            padding="same",
            dilation=self.dilation,
            bias=bias,
        )
        if forget_bias:
            if self.conv.bias is None:
                raise ValueError(f"ConvLSTMCell: forget_bias must be 0 without a bias, got {forget_bias}")
            with torch.no_grad():
                self.conv.bias[self.hidden_dim : 2 * self.hidden_dim] += forget_bias
        self.register_parameter("peephole_weight", nn.Parameter(torch.zeros(3 * self.hidden_dim)) if peephole else None)

    def forward(self, input_tensor: Tensor, cur_state: Sequence[Tensor]) -> State:
        """(B, input_dim, H, W) and the state (h, c) → the next (h, c), (B, C, H, W) each.

        Raises:
            TypeError: no tensors.
            ValueError: another shape, device or dtype than the parameters and the input ask for.
        """
        shapes = {4: f"(B, {self.input_dim}, H, W)"}
        check_input("ConvLSTMCell", "input_tensor", input_tensor, shapes, self.input_dim, self.conv.weight)
        shape = (input_tensor.shape[0], self.hidden_dim, *input_tensor.shape[-2:])
        hidden, cell = check_state("ConvLSTMCell", "cur_state", cur_state, shape, input_tensor)
        moving = torch.cat([input_tensor, hidden], dim=1)
        gates = conv2d_same(moving, self.conv.weight, self.conv.bias, self.dilation)
        return lstm_gates(gates, cell, peephole=self.peephole_weight)

    def run(
        self, x: Tensor, hidden: Tensor | None = None, cell: Tensor | None = None, steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every step of a sequence; arguments and results as in :func:`fastris.convlstm`."""
        return convlstm(
            x,
            self.conv.weight,
            self.conv.bias,
            hidden,
            cell,
            steps,
            peephole=self.peephole_weight,
            dilation=self.dilation,
        )

    def init_hidden(self, batch_size: int, image_size: tuple[int, int]) -> State:
        """A zero state on the module's device and in its dtype."""
        zeros = self.conv.weight.new_zeros(batch_size, self.hidden_dim, *image_size)
        return zeros, zeros.clone()


class ConvLSTM(nn.Module):
    """A stack of ConvLSTM layers over a sequence, with ndrplz's constructor, results and state_dict.

    Args:
        input_dim: channels of the input.
        hidden_dim: C, or a list with one per layer.
        kernel_size: k or (kh, kw), or a list with one per layer.
        num_layers: number of layers.
        batch_first: the input is (B, T, …) rather than (T, B, …).
        bias: whether the convolutions have a bias.
        return_all_layers: return every layer's outputs and state, not only the last one's.
        dilation, forget_bias, peephole: as for :class:`ConvLSTMCell`, the same for every layer.

    Raises:
        ValueError: sizes that are no positive integers, or lists that have not one entry per layer.
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
        *,
        dilation: int = 1,
        forget_bias: float = 0.0,
        peephole: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = positive_int("ConvLSTM", "input_dim", input_dim)
        self.num_layers = positive_int("ConvLSTM", "num_layers", num_layers)
        self.hidden_dim = [positive_int("ConvLSTM", "hidden_dim", c) for c in self._per_layer("hidden_dim", hidden_dim)]
        self.kernel_size = [kernel_pair("ConvLSTM", k) for k in self._per_layer("kernel_size", kernel_size)]
        self.batch_first, self.bias, self.return_all_layers = batch_first, bias, return_all_layers
        inputs = [self.input_dim, *self.hidden_dim[:-1]]
        self.cell_list: Sequence[ConvLSTMCell] = nn.ModuleList(  # type: ignore[assignment]
            ConvLSTMCell(*sizes, bias, dilation=dilation, forget_bias=forget_bias, peephole=peephole)
            for sizes in zip(inputs, self.hidden_dim, self.kernel_size, strict=True)
        )

    def _per_layer(self, name: str, value: Any) -> list[Any]:
        values = value if isinstance(value, list) else [value] * self.num_layers
        if len(values) != self.num_layers:
            raise ValueError(
                f"ConvLSTM: {name} must have one entry per layer: expected {self.num_layers}, got {len(values)}"
            )
        return values

    def forward(
        self, input_tensor: Tensor, hidden_state: Sequence[Sequence[Tensor]] | None = None, steps: int | None = None
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run every layer over the sequence.

        Args:
            input_tensor: (T, B, input_dim, H, W), (B, T, …) with ``batch_first``, or one (B, input_dim, H, W) that is
                the input of every step.
            hidden_state: optional (h, c) of every layer, (B, C, H, W) each, as the last states of a module with
                ``return_all_layers``; zero where not given.
            steps: T, for an input of four dimensions.

        Returns:
            ``(layer_outputs, last_states)``: lists of (B, T, C, H, W) — always batch first, as in the original — and
            of [h, c]; of the last layer only, unless ``return_all_layers``.

        Raises:
            TypeError: no tensors.
            ValueError: another shape, count, device or dtype than the parameters and the input ask for.
        """
        cells, channels = self.cell_list, self.input_dim
        lead = "B, T" if self.batch_first else "T, B"
        shapes = {5: f"({lead}, {channels}, H, W)", 4: f"(B, {channels}, H, W)"}
        check_input("ConvLSTM", "input_tensor", input_tensor, shapes, channels, cells[0].conv.weight)
        x = input_tensor
        if x.dim() == 5:
            if steps is not None:
                raise ValueError(f"ConvLSTM: steps goes with one {shapes[4]} input, not with a sequence, got {steps}")
            x = x.transpose(0, 1) if self.batch_first else x
        else:
            steps = positive_int("ConvLSTM", "steps", steps)
        if hidden_state is not None and len(hidden_state) != self.num_layers:
            raise ValueError(
                f"ConvLSTM: hidden_state must have one (h, c) per layer: expected {self.num_layers}, got "
                f"{len(hidden_state)} (return_all_layers=True returns all of them)"
            )
        batch, height, width = x.shape[-4], x.shape[-2], x.shape[-1]
        outputs, states = [], []
        for k, layer in enumerate(cells):
            state: tuple[Tensor | None, Tensor | None] = (None, None)
            if hidden_state is not None:
                shape = (batch, layer.hidden_dim, height, width)
                state = check_state("ConvLSTM", f"hidden_state[{k}]", hidden_state[k], shape, input_tensor)
            x, hidden, cell = layer.run(x, *state, steps=steps)
            steps = None
            outputs.append(x.transpose(0, 1))
            states.append([hidden, cell])
        if self.return_all_layers:
            return outputs, states
        return outputs[-1:], states[-1:]
