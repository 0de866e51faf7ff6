"""How likely each cell of a map is, and what is in the most likely one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.reference.dynamic_mask import cell_centres
from fastris.reference.place_logits import cells


class Look(NamedTuple):
    """Where a step looks, and what it sees there.

    Attributes:
        log_place: (B, H, W) log-probabilities of the spatial softmax, in fp32 at least.
        place: (B, H, W), 1 in the most likely cell, in the dtype of ``log_place``; no gradient.
        seen: (B, C + F), the hidden state and the features in that cell.
        attended: (B, C + F + 1), the same and the cell's logit.
        centre: (B, 2), x and y of its middle in cells, in the dtype of ``log_place``; no gradient.
    """

    log_place: Tensor
    place: Tensor
    seen: Tensor
    attended: Tensor
    centre: Tensor


def look(logits: Tensor, hidden: Tensor, features: Tensor) -> Look:
    """Look at the most likely cell.

    Args:
        logits: (B, H, W).
        hidden: (B, C, H, W).
        features: (B, F, H, W).

    Returns:
        A :class:`Look`; of equal cells the first is the most likely.
    """
    flat, log_place = logits.flatten(1), spatial_log_softmax(logits)
    peak, chosen = flat.max(1, keepdim=True)
    place = (torch.arange(flat.shape[1], device=flat.device) == chosen).to(log_place.dtype)
    there = chosen.unsqueeze(2)  # [B, 1, 1]
    both = [cells(one).gather(1, there.expand(-1, -1, one.shape[1])) for one in (hidden, features)]
    seen = torch.cat(both, dim=2).squeeze(1)
    centre = cell_centres(logits.shape[1], logits.shape[2], log_place)[:, chosen.squeeze(1)].t()
    attended = torch.cat([seen, peak], dim=1)
    return Look(log_place, place.view_as(logits), seen, attended, centre)


def spatial_log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over all places of a map: (B, h, w) → (B, h, w), in fp32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(wide.flatten(1), dim=1).view_as(logits)
