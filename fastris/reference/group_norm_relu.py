"""Group normalisation and the rectifier after it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Rectify what :func:`torch.nn.functional.group_norm` makes of x.

    Args:
        x: (B, C, H, W).
        weight: (C,), what the normalised channels are multiplied by.
        bias: (C,), what is added to them.
        groups: of channels that have a mean and a variance together; divides C.
        eps: added to the variance.

    Returns:
        (B, C, H, W).
    """
    return F.group_norm(x, groups, weight, bias, eps).relu()
