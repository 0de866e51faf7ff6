"""``convlstm``: a ConvLSTM layer over a whole sequence."""

from __future__ import annotations

from torch import Tensor

from fastris import reference


def convlstm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    steps: int | None = None,
    *,
    peephole: Tensor | None = None,
    dilation: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a ConvLSTM layer; shapes, dtypes and results as in :func:`fastris.reference.convlstm`.

    Raises:
        ValueError: shapes that do not fit; the message names the argument.
    """
    if x.dim() not in (4, 5):
        raise ValueError(f"convlstm: x must be (T, B, Cin, H, W) or (B, Cin, H, W), got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[0] % 4:
        raise ValueError(f"convlstm: weight must be (4C, Cin + C, kh, kw), got {tuple(weight.shape)}")
    if (x.dim() == 4) != (steps is not None):
        raise ValueError("convlstm: steps goes with a constant x of shape (B, Cin, H, W), and is needed there")
    channels = weight.shape[0] // 4
    if weight.shape[1] != x.shape[-3] + channels:
        raise ValueError(
            f"convlstm: weight must have {x.shape[-3]} + {channels} input channels for this x, got {weight.shape[1]}"
        )
    state = (x.shape[-4], channels, *x.shape[-2:])
    for name, value in (("hidden", hidden), ("cell", cell)):
        if value is not None and tuple(value.shape) != state:
            raise ValueError(f"convlstm: {name} must be {state}, got {tuple(value.shape)}")
    return reference.convlstm(x, weight, bias, hidden, cell, steps, peephole=peephole, dilation=dilation)
