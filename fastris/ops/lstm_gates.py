"""``lstm_gates``: the pointwise half of a ConvLSTM cell."""

from __future__ import annotations

from torch import Tensor

from fastris import reference


def lstm_gates(
    gates: Tensor,
    cell_prev: Tensor,
    addend: Tensor | None = None,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM update; shapes, dtypes and source as in :func:`fastris.reference.lstm_gates`.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    if gates.dim() != 4 or gates.shape[1] % 4:
        raise ValueError(f"lstm_gates: gates must be (B, 4C, H, W), got {tuple(gates.shape)}")
    batch, channels, height, width = gates.shape
    expected = (batch, channels // 4, height, width)
    if tuple(cell_prev.shape) != expected:
        raise ValueError(f"lstm_gates: cell_prev must be {expected}, got {tuple(cell_prev.shape)}")
    if addend is not None and addend.shape != gates.shape:
        raise ValueError(f"lstm_gates: addend must be {tuple(gates.shape)}, got {tuple(addend.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"lstm_gates: bias must be ({channels},), got {tuple(bias.shape)}")
    if peephole is not None and tuple(peephole.shape) != (channels // 4 * 3,):
        raise ValueError(f"lstm_gates: peephole must be ({channels // 4 * 3},), got {tuple(peephole.shape)}")
    return reference.lstm_gates(gates, cell_prev, addend, bias, peephole)
