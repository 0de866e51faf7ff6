"""The matchers of DETR, RT-DETR and Mask2Former: the same indices, without the host in the path.

B = batch, Q = queries, K = classes, n = targets of one image, G = the largest n of the batch, P = sampled points.

The costs keep the originals' order of floating-point operations, so that rounding, and with it the choice among near
ties, is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.ops.arguments import describe
from fastris.ops.assignment import assignment


class QueryMatches(NamedTuple):
    """Which query found which target, on the device of the predictions.

    Attributes:
        target_of_query: (B, Q) int64, the target of each query, −1 unmatched.
        status: (B,) int32 as in :func:`fastris.assignment`: 0, or a sum of 1 (infinite costs left fewer than
            min(Q, n) pairs) and 2 (NaN was replaced by the worst finite cost).
    """

    target_of_query: Tensor
    status: Tensor

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The originals' form: per image ``(query, target)``, int64 on the CPU, queries ascending. One host sync."""
        pairs = []
        for targets in self.target_of_query.cpu():
            queries = (targets >= 0).nonzero().squeeze(1)
            pairs.append((queries, targets[queries]))
        return pairs


class _Matcher(nn.Module):
    """What the matchers share: the arguments' checks, one assignment for the batch, the two forms of the result."""

    geometry: ClassVar[tuple[str, str]]
    """What is compared beside classes: its key in ``outputs``, and in each target."""
    geometry_shape: ClassVar[tuple[str, str]]

    def __init__(self, batched: bool, **weights: float) -> None:
        super().__init__()
        if not any(weights.values()):  # the originals' own type and words
            raise AssertionError(f"{type(self).__name__}: all costs cant be 0: {', '.join(weights)}")
        self.batched = batched

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]] | QueryMatches:
        self._check(outputs, targets)
        pred, geometry = outputs["pred_logits"], outputs[self.geometry[0]]
        dtype = torch.float64 if torch.float64 in (pred.dtype, geometry.dtype) else torch.float32
        lengths = [target["labels"].shape[0] for target in targets]
        counts = torch.zeros(len(lengths), dtype=torch.int64, device=pred.device)
        for image, length in enumerate(lengths):
            counts[image].fill_(length)  # torch.tensor(lengths, device="cuda") would wait for its copy
        cost = self._cost(pred.to(dtype), geometry.to(dtype), targets, max(lengths) if lengths else 0)
        matches = QueryMatches(*assignment(cost, num_cols=counts))
        return matches if self.batched else matches.pairs()

    def _cost(self, logits: Tensor, geometry: Tensor, targets: Sequence[Mapping[str, Tensor]], most: int) -> Tensor:
        """(B, Q, G = most), arbitrary past an image's n."""
        raise NotImplementedError

    def _check(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
        pred_key, target_key = self.geometry
        pred_shape, target_shape = self.geometry_shape
        logits = self._take(outputs, "outputs", "pred_logits", "floating (B,Q,K)")
        pred = self._take(outputs, "outputs", pred_key, f"floating {pred_shape}")
        if logits.dim() != 3 or not logits.is_floating_point():
            self._refuse("outputs['pred_logits']", "floating (B,Q,K)", logits)
        if not _fits(pred, pred_shape) or not pred.is_floating_point() or pred.shape[:2] != logits.shape[:2]:
            self._refuse(f"outputs['{pred_key}']", f"floating {pred_shape} with the B and Q of pred_logits", pred)
        if pred.device != logits.device:
            self._refuse(f"outputs['{pred_key}']", "on the device of pred_logits", pred)
        if len(targets) != logits.shape[0]:
            name = type(self).__name__
            raise ValueError(f"{name}: targets must have one entry per image, {logits.shape[0]}, got {len(targets)}")
        for image, target in enumerate(targets):
            place = f"targets[{image}]"
            labels = self._take(target, place, "labels", "integer (n,)")
            item = self._take(target, place, target_key, target_shape)
            if labels.dim() != 1 or labels.dtype not in _INTEGERS:
                self._refuse(f"{place}['labels']", "integer (n,)", labels)
            if not _fits(item, target_shape) or item.is_complex() or item.shape[0] != labels.shape[0]:
                self._refuse(f"{place}['{target_key}']", f"{target_shape} with the n of labels", item)
            for key, tensor in (("labels", labels), (target_key, item)):
                if tensor.device != logits.device:
                    self._refuse(f"{place}['{key}']", "on the device of pred_logits", tensor)

    def _take(self, holder: Mapping[str, Tensor], place: str, key: str, expected: str) -> Tensor:
        tensor = holder.get(key)
        if not isinstance(tensor, Tensor):
            name = f"{type(self).__name__}: {place}[{key!r}]"
            raise ValueError(f"{name} must be a tensor, {expected}, got {type(tensor).__name__}")
        return tensor

    def _refuse(self, name: str, expected: str, got: Tensor) -> None:
        raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {describe(got)} on {got.device}")


class HungarianMatcher(_Matcher):
    """DETR's matcher: cheapest pairs of queries and boxes by class, L1 distance and generalised IoU.

    Each image is compared with its own targets alone, in one padded (B, Q, G) cost. Costs are computed in fp32 (fp64
    for fp64). A NaN is the worst edge and +inf a forbidden one; neither raises.

    Args:
        cost_class, cost_bbox, cost_giou: weights of −p(class of the target), of the L1 distance, and of −GIoU.
        batched: return the device-only :class:`QueryMatches`, without a host sync and in one graph under
            ``torch.compile``, instead of the list of pairs.
        use_focal_loss, alpha, gamma: RT-DETR's and Deformable DETR's class cost, the focal loss of a sigmoid, instead
            of DETR's −softmax.

    ``forward(outputs, targets)``: outputs has ``"pred_logits"`` (B, Q, K) and ``"pred_boxes"`` (B, Q, 4) as centre x,
    centre y, width, height; targets is a list of B dicts with ``"labels"`` (n,) integer in [0, K) and ``"boxes"``
    (n, 4). Returns per image ``(query, target)``, int64 on the CPU, queries ascending, min(Q, n) long each.

    Raises:
        AssertionError: all weights are 0.
        ValueError: shapes, dtypes or devices that do not fit; the message names the argument.

    Source: Carion et al., ECCV 2020, eq. 1; Lin et al., ICCV 2017, eq. 5, for the focal cost; Rezatofighi et al., CVPR
    2019, for GIoU.

    Example:
        >>> matcher = fastris.HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
        >>> outputs = {"pred_logits": torch.zeros(1, 2, 3), "pred_boxes": torch.tensor([[[0.2] * 4, [0.7] * 4]])}
        >>> matcher(outputs, [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.7] * 4])}])
        [(tensor([1]), tensor([0]))]
    """

    geometry = ("pred_boxes", "boxes")
    geometry_shape = ("(B,Q,4)", "(n,4)")

    def __init__(
        self,
        cost_class: float = 1,
        cost_bbox: float = 1,
        cost_giou: float = 1,
        batched: bool = False,
        *,
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(batched, cost_class=cost_class, cost_bbox=cost_bbox, cost_giou=cost_giou)
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.use_focal_loss = use_focal_loss
        self.alpha = alpha
        self.gamma = gamma

    def _cost(self, logits: Tensor, geometry: Tensor, targets: Sequence[Mapping[str, Tensor]], most: int) -> Tensor:
        labels = torch.zeros((len(targets), most), dtype=torch.int64, device=logits.device)
        boxes = geometry.new_zeros((len(targets), most, 4))
        for image, target in enumerate(targets):
            count = target["labels"].shape[0]
            labels[image, :count] = target["labels"]
            boxes[image, :count] = target["boxes"]

        class_of_pair = labels.unsqueeze(1).expand(-1, logits.shape[1], -1)  # [B, Q, G]
        if self.use_focal_loss:
            prob = logits.sigmoid().gather(2, class_of_pair)
            negative = (1 - self.alpha) * prob**self.gamma * -(1 - prob + 1e-8).log()
            positive = self.alpha * (1 - prob) ** self.gamma * -(prob + 1e-8).log()
            cost_class = positive - negative
        else:
            cost_class = -logits.softmax(-1).gather(2, class_of_pair)
        cost_bbox = torch.cdist(geometry, boxes, p=1)
        cost_giou = -_generalised_iou(_corners(geometry).unsqueeze(2), _corners(boxes).unsqueeze(1))
        return self.cost_bbox * cost_bbox + self.cost_class * cost_class + self.cost_giou * cost_giou

    def extra_repr(self) -> str:
        costs = f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"
        focal = f", use_focal_loss=True, alpha={self.alpha}, gamma={self.gamma}" if self.use_focal_loss else ""
        return f"{costs}, batched={self.batched}{focal}"


class MaskHungarianMatcher(_Matcher):
    """Mask2Former's matcher: cheapest pairs of queries and masks by class, binary cross-entropy and Dice.

    The masks of an image are compared at P random points that they share. The points are drawn image by image as
    Mask2Former draws them, so that one seed gives its indices. Costs are computed in fp32 (fp64 for fp64), under
    autocast too. A NaN is the worst edge and +inf a forbidden one; neither raises.

    Args:
        cost_class, cost_mask, cost_dice: weights of −p(class of the target), of the cross-entropy per point, and of the
            Dice loss.
        num_points: P. Mask2Former's configurations have 12544; its signature's default, 0, compares nothing.
        batched: return the device-only :class:`QueryMatches`, without a host sync and in one graph under
            ``torch.compile``, instead of the list of pairs.

    ``forward(outputs, targets)``: outputs has ``"pred_logits"`` (B, Q, K) and ``"pred_masks"`` (B, Q, h, w) logits;
    targets is a list of B dicts with ``"labels"`` (n,) integer in [0, K) and ``"masks"`` (n, H, W), 0 or 1, in any real
    dtype and at any resolution. Returns per image ``(query, target)``, int64 on the CPU, queries ascending, min(Q, n)
    long each.

    Raises:
        AssertionError: all weights are 0.
        ValueError: ``num_points`` below 1; shapes, dtypes or devices that do not fit; the message names the argument.

    Source: Cheng et al., CVPR 2022, section 3.3; Milletari et al., 3DV 2016, for Dice, with 1 added to both sides.

    Example:
        >>> matcher = fastris.MaskHungarianMatcher(cost_class=2, cost_mask=5, cost_dice=5, num_points=12544)
        >>> left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> outputs = {"pred_logits": torch.zeros(1, 2, 3), "pred_masks": torch.stack([-left, left]).mul(9)[None]}
        >>> matcher(outputs, [{"labels": torch.tensor([0]), "masks": left[None]}])
        [(tensor([1]), tensor([0]))]
    """

    geometry = ("pred_masks", "masks")
    geometry_shape = ("(B,Q,h,w)", "(n,H,W)")

    def __init__(
        self,
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 12544,
        batched: bool = False,
    ) -> None:
        super().__init__(batched, cost_class=cost_class, cost_mask=cost_mask, cost_dice=cost_dice)
        if num_points < 1:
            raise ValueError(f"MaskHungarianMatcher: num_points must be at least 1, got {num_points}")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def _cost(self, logits: Tensor, geometry: Tensor, targets: Sequence[Mapping[str, Tensor]], most: int) -> Tensor:
        cost = logits.new_zeros((*logits.shape[:2], most))
        with torch.autocast(logits.device.type, enabled=False):
            for image, target in enumerate(targets):
                points = torch.rand(1, self.num_points, 2, device=logits.device)
                count = target["labels"].shape[0]
                if count and logits.shape[1]:
                    cost[image, :, :count] = self._image_cost(logits[image], geometry[image], target, points)
        return cost

    def _image_cost(self, logits: Tensor, masks: Tensor, target: Mapping[str, Tensor], points: Tensor) -> Tensor:
        """(Q, K), (Q, h, w), n targets, (1, P, 2) in [0, 1) → (Q, n).

        One matrix product per image, not one padded product per batch: its rounding is Mask2Former's own.
        """
        cost_class = -logits.softmax(-1)[:, target["labels"].long()]
        pred = _sample(masks, points)  # [Q, P]
        true = _sample(target["masks"].to(masks.dtype), points)  # [n, P]
        # The cross-entropies with 1 and with 0 are −log_prob and pred − log_prob, to the bit.
        log_prob = F.logsigmoid(pred)
        cost_mask = (_products(-log_prob, true) + _products(pred - log_prob, 1 - true)) / self.num_points
        prob = pred.sigmoid()
        areas = prob.sum(-1).unsqueeze(1) + true.sum(-1).unsqueeze(0)
        cost_dice = 1 - (2 * _products(prob, true) + 1) / (areas + 1)
        return self.cost_mask * cost_mask + self.cost_class * cost_class + self.cost_dice * cost_dice

    def extra_repr(self) -> str:
        costs = f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}"
        return f"{costs}, num_points={self.num_points}, batched={self.batched}"


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _fits(tensor: Tensor, shape: str) -> bool:
    """Whether a tensor has as many dimensions as a shape like "(n,4)", and its numbers."""
    sides = shape.strip("()").split(",")
    return tensor.dim() == len(sides) and all(
        length == int(side) for length, side in zip(tensor.shape, sides, strict=True) if side.isdigit()
    )


def _corners(boxes: Tensor) -> Tensor:
    """(…, 4) centre x, centre y, width, height → left, top, right, bottom."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height), dim=-1)


def _generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """(…, 4) and (…, 4) corners that broadcast → (…): IoU − the share of the enclosing box that neither covers."""
    low, high = torch.minimum(boxes, others), torch.maximum(boxes, others)
    overlap = _area(high[..., :2], low[..., 2:])
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - overlap
    enclosing = _area(low[..., :2], high[..., 2:])
    return overlap / union - (enclosing - union) / enclosing


def _area(low: Tensor, high: Tensor) -> Tensor:
    """(…, 2) and (…, 2) opposite corners → (…), 0 where they are the wrong way round."""
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def _sample(masks: Tensor, points: Tensor) -> Tensor:
    """(N, H, W) and (1, P, 2) x, y in [0, 1] → (N, P), bilinear."""
    grid = 2.0 * points.to(masks.dtype).unsqueeze(2) - 1.0  # [1, P, 1, 2]
    return F.grid_sample(masks.unsqueeze(1), grid.expand(masks.shape[0], -1, -1, -1), align_corners=False)[:, 0, :, 0]


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """(N, P), (M, P) → (N, M)."""
    return torch.einsum("np,mp->nm", rows, others)
