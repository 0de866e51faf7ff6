"""The modules of github.com/automan000/Convolutional_LSTM_PyTorch.

The original's peepholes Wci, Wcf and Wco are zeros that are neither trained nor saved, so by default there are none
here and a state_dict of either loads into the other. With ``peephole=True`` they are parameters of shape (1, C, 1, 1).

What differs beside that: nothing is moved to a GPU unasked, the size of the images may change from call to call, and
``hidden_channels`` may be odd and ``kernel_size`` even or (kh, kw).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastris.nn.arguments import check_input, check_state, kernel_pair, positive_int
from fastris.ops.convlstm import convlstm

__all__ = ["ConvLSTM", "ConvLSTMCell"]


class ConvLSTMCell(nn.Module):
    """One step: ``cell(x, h, c) -> h, c``.

    The parameters are convolutions named Wxi, Whi, Wxf, Whf, Wxc, Whc, Wxo and Who, where the Wx have a bias and the Wh
    none.

    Args:
        input_channels, hidden_channels: channels of x and of h.
        kernel_size: k or (kh, kw).
        bias: without effect, as in the original.
        peephole: whether the gates also see the cell state, by learned weights Wci, Wcf and Wco, zero at the start.

    Raises:
        ValueError: sizes that are no positive integers.
    """

    Wci: nn.Parameter | None
    Wcf: nn.Parameter | None
    Wco: nn.Parameter | None

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        *,
        peephole: bool = False,
    ) -> None:
        super().__init__()
        self.input_channels = positive_int("ConvLSTMCell", "input_channels", input_channels)
        self.hidden_channels = positive_int("ConvLSTMCell", "hidden_channels", hidden_channels)
        self.kernel_size, self.bias = kernel_size, bias
        kernel = kernel_pair("ConvLSTMCell", kernel_size)

        def x_conv() -> nn.Conv2d:
            return nn.Conv2d(self.input_channels, self.hidden_channels, kernel, padding="same")

        def h_conv() -> nn.Conv2d:
            return nn.Conv2d(self.hidden_channels, self.hidden_channels, kernel, padding="same", bias=False)

        self.Wxi, self.Whi = x_conv(), h_conv()
        self.Wxf, self.Whf = x_conv(), h_conv()
        self.Wxc, self.Whc = x_conv(), h_conv()
        self.Wxo, self.Who = x_conv(), h_conv()
        for gate in "ifo":
            zeros = torch.zeros(1, self.hidden_channels, 1, 1)
            self.register_parameter(f"Wc{gate}", nn.Parameter(zeros) if peephole else None)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(B, input_channels, H, W) and the state → the next (h, c), (B, C, H, W) each.

        Raises:
            TypeError: no tensors.
            ValueError: another shape, device or dtype than the parameters and the input ask for.
        """
        shapes = {4: f"(B, {self.input_channels}, H, W)"}
        check_input("ConvLSTMCell", "x", x, shapes, self.input_channels, self.Wxi.weight)
        check_state("ConvLSTMCell", "the state", (h, c), (x.shape[0], self.hidden_channels, *x.shape[-2:]), x)
        _, h, c = self.run(x, h, c, steps=1)
        return h, c

    def run(
        self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None, steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every step of a sequence; arguments and results as in :func:`fastris.convlstm`."""
        x_convs = (self.Wxi, self.Wxf, self.Wxo, self.Wxc)
        h_convs = (self.Whi, self.Whf, self.Who, self.Whc)
        weights = [torch.cat([conv.weight for conv in convs]) for convs in (x_convs, h_convs)]
        bias = torch.cat([conv.bias for conv in x_convs if conv.bias is not None])
        peepholes = [weight.flatten() for weight in (self.Wci, self.Wcf, self.Wco) if weight is not None]
        peephole = torch.cat(peepholes) if peepholes else None
        return convlstm(x, torch.cat(weights, dim=1), bias, h, c, steps, peephole=peephole)

    def init_hidden(self, batch_size: int, hidden: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A zero state on the module's device and in its dtype."""
        zeros = self.Wxi.weight.new_zeros(batch_size, hidden, shape[0], shape[1])
        return zeros, zeros.clone()


class ConvLSTM(nn.Module):
    """A stack of layers ``cell0``, ``cell1``, … that sees the same image at each of ``step`` steps.

    Args:
        input_channels: channels of the input.
        hidden_channels: C of each layer.
        kernel_size: k or (kh, kw), the same for every layer.
        step: number of steps.
        effective_step: the steps, counted from 0, whose output is returned; others are ignored. As in the original the
            default [1] returns nothing of a single step.
        bias, peephole: as for :class:`ConvLSTMCell`.

    Raises:
        ValueError: sizes that are no positive integers, or ``hidden_channels`` that is no list of them.
    """

    def __init__(
        self,
        input_channels: int,
        hidden_channels: list[int],
        kernel_size: int | tuple[int, int],
        step: int = 1,
        effective_step: Sequence[int] = (1,),
        bias: bool = True,
        *,
        peephole: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(hidden_channels, (list, tuple)) or not hidden_channels:
            raise ValueError(f"ConvLSTM: hidden_channels must be a list with one per layer, got {hidden_channels!r}")
        self.input_channels = [input_channels, *hidden_channels]
        self.hidden_channels, self.num_layers = hidden_channels, len(hidden_channels)
        self.kernel_size, self.bias, self.effective_step = kernel_size, bias, effective_step
        self.step = positive_int("ConvLSTM", "step", step)
        for k, channels in enumerate(hidden_channels):
            cell = ConvLSTMCell(self.input_channels[k], channels, kernel_size, bias, peephole=peephole)
            self.add_module(f"cell{k}", cell)

    def forward(self, input: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """(B, input_channels, H, W) → ``(outputs, (h, c))``: the last layer's h at the effective steps and last state.

        Raises:
            TypeError: no tensor.
            ValueError: another shape, device or dtype than the parameters ask for.
        """
        cells = [cast(ConvLSTMCell, self.get_submodule(f"cell{k}")) for k in range(self.num_layers)]
        channels = self.input_channels[0]
        check_input("ConvLSTM", "input", input, {4: f"(B, {channels}, H, W)"}, channels, cells[0].Wxi.weight)
        x, h, c = cells[0].run(input, steps=self.step)
        for cell in cells[1:]:
            x, h, c = cell.run(x)
        return [x[step] for step in range(self.step) if step in self.effective_step], (h, c)
