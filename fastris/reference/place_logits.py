"""How likely each cell of a map is the place to look at."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def place_logits(
    hidden: Tensor, base: Tensor, found: Tensor | None, weight: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    """Two 1×1 convolutions, the inner one rectified: ``last · relu(base + weight · [hidden, found]) + last_bias``.

    Args:
        hidden: (B, C, H, W).
        base: (B, N, H, W), the inner layer's part that is the same at every step, bias included.
        found: optional (B, K, H, W); gets no gradient.
        weight: (N, C + F + K): C columns for ``hidden``, at the end K for ``found``, and F that ``base`` was made with.
        last: (N,).
        last_bias: (1,).

    Returns:
        (B, H, W) logits.
    """
    channels = hidden.shape[1]
    inner = cells(base) + F.linear(cells(hidden), weight[:, :channels])
    if found is not None:
        inner = inner + F.linear(cells(found.detach()), weight[:, weight.shape[1] - found.shape[1] :])
    return F.linear(inner.relu(), last.unsqueeze(0), last_bias).view(hidden.shape[0], *hidden.shape[2:])


def cells(maps: Tensor) -> Tensor:
    """(B, C, H, W) → (B, HW, C), of maps in channels_last a view."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)
