"""The matching loss of recurrent instance segmentation.

B = batch, T = predictions (the paper's n̂), G = most instances in an image of the batch, n = instances of one image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.dense import DenseMaps, dense_loss, dense_targets
from fastris.nn.heads import DynamicMaskHead
from fastris.nn.model import RISOutput
from fastris.ops.arguments import describe
from fastris.ops.assignment import assignment
from fastris.ops.autograd import plain, untransformed
from fastris.ops.image_masks import image_masks
from fastris.ops.soft_iou import check_pred_and_target, soft_iou


class Matches(NamedTuple):
    """Which prediction found which target.

    Attributes:
        target_of_pred: (B, T) int64 column of each prediction's target, −1 unmatched.
        iou: (B, T) the soft IoU of each matched pair, 0 where unmatched; carries gradient.
    """

    target_of_pred: Tensor
    iou: Tensor


class LossTerms(NamedTuple):
    """Scalars, means over the batch: ``total`` is what to minimise, the others its parts."""

    total: Tensor
    mask: Tensor
    confidence: Tensor
    place: Tensor
    dense: Tensor


def match(
    pred: Tensor,
    target: Tensor,
    num_pred: Tensor | None = None,
    num_target: Tensor | None = None,
    num_labels: int | None = None,
    bonus: Tensor | None = None,
) -> Matches:
    """Match predicted masks to targets one-to-one so that the total soft IoU is the largest.

    Everything stays on the device: no host sync, one graph under ``torch.compile``. The one exception is a label map
    without ``num_labels``, whose maximum is read.

    Args:
        pred, target, num_pred, num_target, num_labels: as in :func:`fastris.soft_iou`, except that the negative pixels
            of a label map are void: the IoU is that of the others.
        bonus: optional (B, T, G), added to the IoU for the matching alone.
    """
    check_pred_and_target(pred, target)
    void = void_pixels(target)
    if void is not None and not _seen_to_be_empty(void):
        pred = torch.where(void.unsqueeze(1), 0.0, pred)
    return match_known(pred, target, num_pred, num_target, num_labels, bonus)


def void_pixels(target: Tensor) -> Tensor | None:
    """Bool (B, H, W): which pixels of a label map are void. Masks have none."""
    return target < 0 if target.dim() == 3 else None


def _seen_to_be_empty(mask: Tensor) -> bool:
    """Whether it is, where to look is no wait for a device and no break in a graph."""
    return mask.is_cpu and untransformed() and plain([mask]) and not mask.any()


def match_known(
    pred: Tensor,
    target: Tensor,
    num_pred: Tensor | None,
    num_target: Tensor | None,
    num_labels: int | None,
    bonus: Tensor | None,
) -> Matches:
    """:func:`match` of predictions that are 0 where the target is void."""
    iou = soft_iou(pred, target, num_pred, num_target, num_labels)
    cost = -iou.detach() if bonus is None else -(iou.detach() + bonus)
    target_of_pred = assignment(cost, num_pred, num_target).col_of_row
    return Matches(target_of_pred, take_matched(iou, target_of_pred))


def take_matched(values: Tensor, target_of_pred: Tensor) -> Tensor:
    """(B, T, G) and (B, T) → (B, T): each prediction's value at its target, 0 where it has none."""
    if values.shape[2] == 0:
        return values.new_zeros(target_of_pred.shape)
    taken = values.gather(2, target_of_pred.clamp_min(0).unsqueeze(2)).squeeze(2)
    return torch.where(target_of_pred >= 0, taken, 0.0)


class RISLoss(nn.Module):
    """``min_δ −Σ IoU(ŷ_t̂, y_t) δ_t̂t + λ Σ BCE([t̂ ≤ n], s_t̂)``, δ one-to-one.

    Args:
        variant: ``"all"``, the paper: δ ranges over all T predictions. ``"first_n"``, the released code: over the first
            n, and the later masks get no gradient.
        confidence_weight: λ, 1 in the paper.
        place_weight: weight of ``−log p(place on the matched object)``, where p is the spatial softmax. 0 in the paper;
            above 0 it makes the choice of *which* object now a decision instead of a hedge.
        per_instance: divide each image's mask and place terms by its n, and its confidence term by T.
        dense_weight: weight of what a model with ``dense`` maps shows in every cell (:mod:`fastris.nn.dense`).
        resolution: ``"image"``: masks are enlarged to the target's pixels. ``"map"``, the released plants code: the
            target is read at the centres of the masks' cells, which costs less and may overlook small instances.

    ``forward(output, target, counts, num_labels=None)``: target is a label map (B, H, W), integer, with instances 1 … n
    without gaps, 0 = background and −1 = void, or masks (B, G, H, W) of which the first n are an image's own; counts
    (B,), integer, is n. Void pixels neither reward nor punish: a mask gets no gradient there, and the place term is of
    the other cells.

    Everything stays on the device: no host sync, one graph under ``torch.compile``. The one exception is a label map
    without ``num_labels`` (any number ≥ every n; the work grows with it): then the largest count is read.

    Raises:
        ValueError: an unknown ``variant`` or ``resolution``; shapes, dtypes or devices that do not fit; the message
            names the argument.

    Source: Romera-Paredes & Torr, ECCV 2016, eq. 6–8; bernard24/RIS for the variant and the resolution.
    """

    def __init__(
        self,
        variant: str = "all",
        confidence_weight: float = 1.0,
        place_weight: float = 0.0,
        per_instance: bool = False,
        resolution: str = "image",
        dense_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if resolution not in ("image", "map"):
            raise ValueError(f"RISLoss: resolution must be 'image' or 'map', got {resolution!r}")
        if variant not in ("all", "first_n"):
            raise ValueError(f"RISLoss: variant must be 'all' or 'first_n', got {variant!r}")
        self.variant = variant
        self.confidence_weight = confidence_weight
        self.place_weight = place_weight
        self.per_instance = per_instance
        self.resolution = resolution
        self.dense_weight = dense_weight

    def forward(self, output: RISOutput, target: Tensor, counts: Tensor, num_labels: int | None = None) -> LossTerms:
        batch, steps = output.score_logits.shape
        if counts.is_floating_point() or tuple(counts.shape) != (batch,) or counts.device != target.device:
            expected = f"integer ({batch},) on the device of target, {target.device}"
            raise ValueError(
                f"RISLoss: counts must be {expected}, got {counts.dtype} {tuple(counts.shape)} on {counts.device}"
            )
        self._check_target(output, target)
        if target.dim() == 4:
            num_labels = target.shape[1]
        elif num_labels is None:
            num_labels = int(counts.max()) if batch else 0
        dtype = torch.float64 if output.mask_logits.dtype == torch.float64 else torch.float32
        logits = output.mask_logits.to(dtype)
        compared, stride, offset = target, output.stride, output.offset
        if self.resolution == "map":
            compared = at_centres(target, stride, offset, (logits.shape[-2], logits.shape[-1]))
            stride, offset = 1, 0
        size = (compared.shape[-2], compared.shape[-1])
        masks = image_masks(logits, stride, offset, size, void_pixels(compared))
        num_pred = counts.clamp_max(steps) if self.variant == "first_n" else None
        on_target = mass = None
        if self.place_weight:
            margin = (output.offset, 0, output.offset, 0)
            mass = place_on_target(output.log_place.to(dtype), F.pad(target, margin), num_labels)
        matches = match_known(masks, compared, num_pred, counts, num_labels, None if mass is None else mass.detach())
        per_image = counts.clamp_min(1).to(dtype) if self.per_instance else 1.0
        mask = -(matches.iou.sum(1) / per_image).mean()
        place = mask.new_zeros(())
        if mass is not None:
            on_target = take_matched(mass, matches.target_of_pred)
            surprise = torch.where(matches.target_of_pred >= 0, -torch.log(on_target + 1e-6), 0.0)
            place = (surprise.sum(1) / per_image).mean()

        real = torch.arange(steps, device=counts.device) < counts.unsqueeze(1)
        bce = F.binary_cross_entropy_with_logits(output.score_logits.to(dtype), real.to(dtype), reduction="none")
        confidence = (bce.mean(1) if self.per_instance else bce.sum(1)).mean()
        dense = mask.new_zeros(())
        if output.dense is not None:
            dense = _dense_term(output, target, num_labels)
        total = mask + self.confidence_weight * confidence + self.place_weight * place + self.dense_weight * dense
        return LossTerms(total, mask, confidence, place, dense)

    def _check_target(self, output: RISOutput, target: Tensor) -> None:
        logits = output.mask_logits
        height, width = (side * output.stride - output.offset for side in logits.shape[-2:])
        fits = target.dim() in (3, 4) and target.shape[0] == logits.shape[0] and target.device == logits.device
        if fits and self.resolution == "image":
            fits = target.shape[-2] <= height and target.shape[-1] <= width
        if not fits:
            expected = f"of {logits.shape[0]} images of at most {height}×{width} pixels on {logits.device} like output"
            raise ValueError(f"RISLoss: target must be {expected}, got {describe(target)} on {target.device}")


def _dense_term(output: RISOutput, target: Tensor, num_labels: int) -> Tensor:
    """The loss of both dense maps, a mean over images; of masks (B, G, H, W) the last one that has a pixel counts."""
    assert output.dense is not None
    if target.dim() == 4:
        numbers = torch.arange(1, num_labels + 1, device=target.device).view(1, -1, 1, 1)
        target = torch.where(target > 0.5, numbers, 0).amax(1) if num_labels else target.new_zeros(target[:, 0].shape)
    wanted = dense_targets(target, num_labels, DynamicMaskHead.radius * output.stride)
    total = output.mask_logits.new_zeros((), dtype=torch.float32)
    for maps, stride in zip(output.dense, (output.place_stride, output.stride), strict=True):
        size = (maps.offset.shape[-2], maps.offset.shape[-1])
        here = DenseMaps(*(at_centres(one, stride, output.offset, size) for one in wanted))
        known = at_centres(target, stride, output.offset, size) >= 0
        total = total + dense_loss(DenseMaps(*(one.float() for one in maps)), here, known).mean()
    return total


def at_centres(target: Tensor, stride: int, offset: int, size: tuple[int, int]) -> Tensor:
    """The values of a target (…, H, W) at the centres of the cells of a map: (…, h, w), `size` = (h, w)."""
    rows, columns = (
        (torch.arange(cells, device=target.device) * stride + stride // 2 - offset).clamp(0, side - 1)
        for cells, side in zip(size, target.shape[-2:], strict=True)
    )
    return target[..., rows.unsqueeze(1), columns]


def place_on_target(log_place: Tensor, target: Tensor, num_labels: int) -> Tensor:
    """The share of each step's spatial softmax that lies on each instance: (B, T, h, w), target → (B, T, G).

    A cell belongs to the highest label among its pixels, or to every mask that has one of them, so that no instance is
    too small to have a cell. The softmax is that over the cells which are not void throughout.
    """
    maps = target if target.dim() == 4 else target.unsqueeze(1)
    images = maps.to(torch.float32).flatten(0, 1).unsqueeze(1)  # pooling takes no empty dimension but the first
    cells = F.adaptive_max_pool2d(images, log_place.shape[-2:]).view(*maps.shape[:2], *log_place.shape[-2:])
    if target.dim() == 3:
        lowest = torch.finfo(log_place.dtype).min  # not −inf: an image may be all void
        log_place = log_place.masked_fill(cells < 0, lowest).flatten(2).log_softmax(2).view_as(log_place)
        cells = cells == torch.arange(1, num_labels + 1, device=target.device).view(1, -1, 1, 1)
    on_instance = cells.to(log_place.dtype)
    return log_place.exp().flatten(2) @ on_instance.flatten(2).transpose(1, 2)
