"""The recurrent instance segmenter: one object a step, until it is confident that none is left.

B = batch, T = steps, C = hidden channels, h × w = recurrent map, h' × w' = mask map.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.errors import InputError
from fastris.instances import Instances
from fastris.nn.backbone import Backbone, PlantsFCN, SmallFCN
from fastris.nn.config import ModelConfig
from fastris.nn.convlstm import ConvLSTMCell, State
from fastris.nn.dense import DenseMaps
from fastris.nn.fcn8s import FCN8s
from fastris.nn.heads import ConfidenceHead, DynamicMaskHead, Evidence, SpatialInhibition
from fastris.ops.conv2d_same import RepeatedWeight, conv2d_same
from fastris.ops.lstm_gates import lstm_gates
from fastris.reference.image_masks import at_pixels
from fastris.tiling import check_tiling, stitch, tile_boxes

if TYPE_CHECKING:
    from fastris.crf import DenseCRF

TILE_PIXELS = 2**19  # of the tiles that are looked at together: 8 of 256 × 256


class RISOutput(NamedTuple):
    """What T steps found.

    Attributes:
        mask_logits: (B, T, h', w') whose sigmoid is the mask.
        score_logits: (B, T) whose sigmoid is the confidence.
        log_place: (B, T, h, w) log-probabilities of the spatial softmax.
        stride: pixels per cell of the masks.
        place_stride: pixels per cell of ``log_place``.
        offset: pixels by which both maps begin above and left of the image.
        dense: what features and detail show of every cell, at ``place_stride`` and ``stride``; of a ``dense`` model.
    """

    mask_logits: Tensor
    score_logits: Tensor
    log_place: Tensor
    stride: int
    place_stride: int
    offset: int = 0
    dense: tuple[DenseMaps, DenseMaps] | None = None

    @property
    def masks(self) -> Tensor:
        """(B, T, h', w') in [0, 1]."""
        return self.mask_logits.sigmoid()

    @property
    def scores(self) -> Tensor:
        """(B, T) in [0, 1]."""
        return self.score_logits.sigmoid()


class Trace(NamedTuple):
    """What each step of a prediction on one image of H × W pixels saw and said, the one that stopped it included.

    Attributes:
        masks: bool (T, H, W), where the step's mask is above the threshold.
        scores: float32 (T,), the confidences.
        log_place: float32 (T, h, w), log-probabilities of the spatial softmax: where the step looked.
        cell: height and width of a cell of ``log_place`` in pixels of the image.
        found: bool (T,), whether ``predict`` counts the step as an instance.
        stopped: whether the last step ended it; otherwise the limit on steps did.
    """

    masks: np.ndarray
    scores: np.ndarray
    log_place: np.ndarray
    cell: tuple[float, float]
    found: np.ndarray
    stopped: bool


class _Step(NamedTuple):
    mask_logits: Tensor
    log_place: Tensor
    evidence: Evidence


class _Memory(NamedTuple):
    """What one step hands to the next."""

    states: list[State] | None
    found: Tensor | None  # [B, 2, h, w], the union of the masks and of the places so far


class _Context(NamedTuple):
    """What is computed once per image."""

    features: Tensor
    hoisted: Tensor  # the input half of the first layer's gates
    detail: Tensor
    place_base: Tensor | None = None  # of a dynamic mask head

    def select(self, images: Tensor) -> _Context:
        features, hoisted, detail = (tensor[images] for tensor in self[:3])
        return _Context(features, hoisted, detail, None if self.place_base is None else self.place_base[images])


class RecurrentInstanceSegmenter(nn.Module):
    """Features once, then a ConvLSTM that finds one object a step, its mask and the confidence that it is one.

    Source: Romera-Paredes & Torr, *Recurrent Instance Segmentation*, ECCV 2016.
    :class:`ModelConfig` says what each part is and where a choice departs from the paper.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.backbone = _build_backbone(config)
        self.stride = self.backbone.detail_stride if config.mask_head == "dynamic" else self.backbone.stride
        features = self.backbone.channels
        inputs = [features + 2 * int(config.feedback)] + [config.hidden_channels] * (config.layers - 1)
        self.cells: Sequence[ConvLSTMCell] = nn.ModuleList(  # type: ignore[assignment]
            ConvLSTMCell(channels, config.hidden_channels, config.kernel_size, forget_bias=1.0) for channels in inputs
        )
        self.mask_head: DynamicMaskHead | SpatialInhibition
        if config.mask_head == "dynamic":
            found = 2 * int(config.feedback and config.inhibit_found)
            detail = self.backbone.detail_channels
            self.mask_head = DynamicMaskHead(
                config.hidden_channels, features, detail, found, config.dense, config.hard_place
            )
        else:
            self.mask_head = SpatialInhibition(config.hidden_channels, config.inhibition_init)
        attended = 0
        if config.confidence_attends and isinstance(self.mask_head, DynamicMaskHead):
            attended = self.mask_head.attended_channels
        self.confidence_head = ConfidenceHead(
            config.hidden_channels, config.confidence_pool, config.confidence_map, attended_channels=attended
        )
        if self.input_size is not None:
            multiple = self.backbone.multiple
            if self.backbone.offset:
                raise InputError("confidence_map: an unpooled confidence head needs padding 'same'")
            if any(side % multiple for side in self.input_size):
                raise InputError(f"confidence_map: must be of an image with sides of multiples of {multiple} pixels")
        if config.initialization == "released":
            self._initialize_as_released()

    def forward(self, images: Tensor, steps: int) -> RISOutput:
        """Run a fixed number of steps.

        Args:
            images: (B, 3, H, W), RGB in [0, 1], any size, or at most :attr:`input_size`; the maps are cropped to the
                cells that show some of the image.
            steps: T ≥ 1.
        """
        height, width = images.shape[-2:]
        context = self._encode(images)
        memory, weights = _Memory(None, None), self._repeated_weights()
        results = []
        for _ in range(steps):
            result, memory = self._step(context, memory, weights)
            results.append(result)
        masks = torch.stack([one.mask_logits for one in results], dim=1)
        places = torch.stack([one.log_place for one in results], dim=1)
        scores = self.confidence_head.judge(Evidence.joined([one.evidence for one in results]))  # [T · B]
        offset, place_stride = self.backbone.offset, self.backbone.stride
        bottom, right = height + offset, width + offset
        fine = ..., slice(-(-bottom // self.stride)), slice(-(-right // self.stride))
        coarse = ..., slice(-(-bottom // place_stride)), slice(-(-right // place_stride))
        dense = None
        if isinstance(self.mask_head, DynamicMaskHead):
            dense = self.mask_head.dense_maps(context.features[coarse], context.detail[fine])
        scores = scores.view(steps, -1).t().contiguous()
        return RISOutput(masks[fine], scores, places[coarse], self.stride, place_stride, offset, dense)

    def _initialize_as_released(self) -> None:
        """All after the backbone as in bernard24/RIS, whose gates are two convolutions, each with a bias."""
        with torch.no_grad():
            for layer in self.cells:
                conv = layer.conv
                assert conv.bias is not None
                conv.weight.uniform_(-0.08, 0.08)
                into_gates = torch.empty_like(conv.bias).uniform_(-0.08, 0.08)
                into_gates[: 3 * layer.hidden_dim] = 1.0
                conv.bias.uniform_(-0.08, 0.08).add_(into_gates)
            if isinstance(self.mask_head, SpatialInhibition):
                self.mask_head.project.weight.uniform_(-0.08, 0.08)
            self.confidence_head.linear.weight.uniform_(-0.08, 0.08)
            self.confidence_head.linear.bias.fill_(10.0)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(H, W) of the images of a model whose confidence head is unpooled: smaller ones are padded; else None."""
        if self.config.confidence_map is None or self.config.confidence_pool:
            return None
        height, width = self.config.confidence_map
        return height * self.backbone.stride, width * self.backbone.stride

    def _encode(self, images: Tensor) -> _Context:
        images = self.backbone.normalize(images)
        height, width = images.shape[-2:]
        if self.input_size is None:
            multiple = self.backbone.multiple  # as a sum and not as -height % multiple, which torch.export cannot solve
            below = (height + multiple - 1) // multiple * multiple - height
            right = (width + multiple - 1) // multiple * multiple - width
        else:
            below, right = self.input_size[0] - height, self.input_size[1] - width
            if min(below, right) < 0:
                size = "×".join(map(str, self.input_size))
                raise ValueError(f"images: this model takes at most {size} pixels, got {height}×{width}")
        images = F.pad(images, (0, right, 0, below)).contiguous(memory_format=torch.channels_last)
        features, detail = self.backbone(images)
        cell = self.cells[0]
        hoisted = conv2d_same(features, cell.conv.weight[:, : features.shape[1]], cell.conv.bias)
        if not isinstance(self.mask_head, DynamicMaskHead):
            return _Context(features, hoisted, detail)
        return _Context(features, hoisted, self.mask_head.prepare(detail), self.mask_head.place_base(features))

    def _repeated_weights(self) -> list[RepeatedWeight]:
        """Of every layer what is convolved with at every step: all but the features' part of the first."""
        first, *others = (layer.conv.weight for layer in self.cells)
        return [RepeatedWeight(first[:, self.backbone.channels :]), *map(RepeatedWeight, others)]

    def _step(self, context: _Context, memory: _Memory, weights: Sequence[RepeatedWeight]) -> tuple[_Step, _Memory]:
        features, hoisted, detail, place_base = context
        states: list[State] = []
        for k, (layer, weight) in enumerate(zip(self.cells, weights, strict=True)):
            bias = layer.conv.bias
            previous = memory.states[k] if memory.states is not None else None
            if k == 0:
                gates, addend, bias = hoisted, None, None
                if previous is not None:  # a zero state needs no convolution
                    gates = conv2d_same(previous[0], weight, before=memory.found)
                    addend = hoisted
            elif previous is None:
                below, addend = states[-1][0], None
                gates = conv2d_same(below, weight.weight[:, : below.shape[1]])
            else:
                gates, addend = conv2d_same(torch.cat([states[-1][0], previous[0]], dim=1), weight), None
            if previous is None:
                shape = (gates.shape[0], *gates.shape[-2:], self.config.hidden_channels)
                dtype = torch.promote_types(gates.dtype, torch.float32)
                cell = torch.zeros(shape, device=gates.device, dtype=dtype).permute(0, 3, 1, 2)
            else:
                cell = previous[1]
            states.append(lstm_gates(gates, cell, addend, bias))
        hidden = states[-1][0]

        if isinstance(self.mask_head, DynamicMaskHead):
            mask_logits, log_place, place, attended = self.mask_head(hidden, features, detail, memory.found, place_base)
        else:
            mask_logits, log_place = self.mask_head(hidden)
            place, attended = log_place.exp(), None
        found = None
        if self.config.feedback:
            mask = mask_logits.detach().sigmoid()
            if mask.shape[-2:] != hidden.shape[-2:]:
                mask = F.avg_pool2d(mask, self.backbone.stride // self.stride)
            found = torch.stack([mask, place.detach()], dim=3).permute(0, 3, 1, 2).to(hidden.dtype)
            if memory.found is not None:
                found = torch.maximum(memory.found, found)
        return _Step(mask_logits, log_place, self.confidence_head.evidence(hidden, attended)), _Memory(states, found)

    @torch.inference_mode()
    def predict(
        self,
        image: Any,
        max_steps: int | None = None,
        threshold: float = 0.5,
        mask_threshold: float | None = None,
        min_area: int = 4,
        crf: DenseCRF | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Instances | list[Instances]:
        """Find the objects of one image or of several.

        Args:
            image: a path; a PIL image; an (H, W) or (H, W, C) array; an (H, W), (C, H, W) or (B, C, H, W) tensor; or a
                list of these, which gives a list of results. C is 1, 3, or 4, of which the alpha is dropped; values are
                uint8, floating in [0, 1], or other integers, which are stretched from their minimum … maximum.
            max_steps: the most objects per image, or per tile; the configuration's where not given.
            threshold: stop at the first confidence below this (0.5 in the paper).
            mask_threshold: a pixel belongs to the object where the mask is above this; the configuration's where not
                given.
            min_area: an object of fewer pixels is dropped.
            crf: refines all masks of an image, or of a tile, together, after which no two overlap; an object that it
                leaves no pixel is dropped.
            tile: look at square tiles of this side in pixels, a few at a time, and stitch what they show
                (:func:`fastris.tiling.stitch`), so that neither the size of the image nor the number of its objects is
                limited by the model. By default the image is looked at as a whole.
            overlap: pixels that neighbouring tiles share at least; a quarter of the tile where not given.

        Returns:
            :class:`~fastris.Instances` in order of finding, tile by tile, or a list of them. Tiles that used all their
            steps, and may show more objects than were found, are warned of and named in ``warnings``.

        Raises:
            InputError: an image, or a tile or overlap, that cannot be used.
        """
        from fastris.nn.inputs import as_images

        limit = max_steps or self.config.max_steps
        if mask_threshold is None:
            mask_threshold = self.config.mask_threshold
        overlap = check_tiling(tile, overlap, self.config.max_side)
        cut = mask_threshold if crf is None else None
        if crf is not None:
            min_area = max(min_area, 1)
        images, names, single = as_images(image)
        results = []
        for pixels, name in zip(images, names, strict=True):
            if tile is None:
                size = (pixels.shape[1], pixels.shape[2])
                looked_at = self._fit(pixels.unsqueeze(0), name)
                masks, scores = self._find(looked_at, limit, threshold, cut, size)[0]
                if crf is not None:
                    masks = crf.refine(masks, pixels, mask_threshold)
                found = Instances(masks.numpy(), scores.numpy(), size, name)
            else:
                found = self._find_in_tiles(pixels, tile, overlap, limit, threshold, mask_threshold, crf, name)
            results.append(found[found.areas >= min_area])
        return results[0] if single else results

    @torch.inference_mode()
    def trace(
        self,
        image: Any,
        max_steps: int | None = None,
        threshold: float = 0.5,
        mask_threshold: float | None = None,
        min_area: int = 4,
    ) -> Trace:
        """The steps of :meth:`predict`, with the same arguments, on one image."""
        from fastris.nn.inputs import as_images

        images, names, single = as_images(image)
        if not single:
            raise InputError("image: expected one image, not a list or a batch")
        if mask_threshold is None:
            mask_threshold = self.config.mask_threshold
        looked_at = self._fit(images[0].unsqueeze(0), names[0])
        (full_height, full_width), (height, width) = images[0].shape[-2:], looked_at.shape[-2:]
        parameter = self.confidence_head.linear.weight
        context = self._encode(looked_at.to(parameter.device, parameter.dtype))
        memory, weights = _Memory(None, None), self._repeated_weights()
        masks: list[Tensor] = []
        scores: list[Tensor] = []
        places: list[Tensor] = []
        going = True
        while going and len(scores) < (max_steps or self.config.max_steps):
            step, memory = self._step(context, memory, weights)
            masks.append(self._masks(step.mask_logits, (height, width), (full_height, full_width), mask_threshold)[0])
            scores.append(self.confidence_head.judge(step.evidence)[0].float().sigmoid().cpu())
            places.append(step.log_place[0].float().cpu())
            going = bool(scores[-1] >= threshold)
        drawn, confidence = torch.stack(masks), torch.stack(scores)
        found = (confidence >= threshold) & (drawn.flatten(1).sum(1) >= min_area)
        log_place, stride, offset = torch.stack(places), self.backbone.stride, self.backbone.offset
        if offset:  # cells that begin outside the image: a value a pixel
            log_place = log_place.repeat_interleave(stride, 1).repeat_interleave(stride, 2)[:, offset:, offset:]
            stride = 1
        log_place = log_place[:, : -(-height // stride), : -(-width // stride)]
        cell = stride * full_height / height, stride * full_width / width
        return Trace(drawn.numpy(), confidence.numpy(), log_place.numpy(), cell, found.numpy(), not going)

    def _fit(self, images: Tensor, name: str) -> Tensor:
        """Shrink images whose longer side is over the model's limit; scale them to a model's one size."""
        height, width = images.shape[-2:]
        if self.input_size is not None:
            scale = min(self.input_size[0] / height, self.input_size[1] / width)
            size = [max(1, round(height * scale)), max(1, round(width * scale))]
            return F.interpolate(images, size=size, mode="bilinear", antialias=True)
        longest = max(height, width)
        if longest <= self.config.max_side:
            return images
        size = [max(1, side * self.config.max_side // longest) for side in (height, width)]
        warnings.warn(
            f"{name or 'image'}: {images.shape[-1]}x{images.shape[-2]} pixels are looked at as {size[1]}x{size[0]}; "
            "look at it in tiles (tile=, --tile) if its objects are small",
            stacklevel=3,
        )
        return F.interpolate(images, size=size, mode="bilinear", antialias=True)

    def _find_in_tiles(
        self,
        image: Tensor,
        tile: int,
        overlap: int,
        limit: int,
        threshold: float,
        mask_threshold: float,
        crf: DenseCRF | None,
        name: str,
    ) -> Instances:
        """The instances of one (3, H, W) image from overlapping tiles of it."""
        size = (image.shape[1], image.shape[2])
        boxes = tile_boxes(size, tile, overlap)
        together = max(1, TILE_PIXELS // tile**2)
        found: list[Instances] = []
        for start in range(0, len(boxes), together):
            chosen = boxes[start : start + together]
            tiles = torch.stack([image[(slice(None), *box.slices)] for box in chosen])
            cut = mask_threshold if crf is None else None
            results = self._find(self._fit(tiles, name), limit, threshold, cut, chosen[0].size)
            for pixels, (masks, scores) in zip(tiles, results, strict=True):
                if crf is not None:
                    masks = crf.refine(masks, pixels, mask_threshold)
                found.append(Instances(masks.numpy(), scores.numpy(), chosen[0].size))
        stitched = stitch(boxes, found, size)
        stitched.name = name
        crowded = sum(len(one) == limit for one in found)
        if crowded:
            message = (
                f"{crowded} of {len(boxes)} tiles used all {limit} steps and may show more objects; use smaller tiles"
            )
            stitched.warnings = (message,)
            warnings.warn(f"{name or 'image'}: {message}", stacklevel=3)
        return stitched

    def _find(
        self,
        images: Tensor,
        limit: int,
        threshold: float,
        mask_threshold: float | None,
        size: tuple[int, int] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Per image, masks (N, H, W) bool and scores (N,); an image that has stopped costs nothing more.

        ``size`` is the (H, W) of the masks, that of ``images`` where not given; without a threshold they are logits.
        """
        height, width = images.shape[-2:]
        size = size or (height, width)
        parameter = self.confidence_head.linear.weight
        context = self._encode(images.to(parameter.device, parameter.dtype))
        memory, weights = _Memory(None, None), self._repeated_weights()
        active = torch.arange(images.shape[0])
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(images.shape[0])]
        for _ in range(limit):
            step, memory = self._step(context, memory, weights)
            scores = self.confidence_head.judge(step.evidence).float().sigmoid().cpu()
            going = scores >= threshold
            chosen = going.nonzero().squeeze(1)
            if chosen.numel() == 0:
                break
            logits = step.mask_logits[chosen.to(step.mask_logits.device)]
            masks = self._masks(logits, (height, width), size, mask_threshold)
            for row, mask in zip(chosen.tolist(), masks, strict=True):
                found[int(active[row])].append((mask, scores[row]))
            if chosen.numel() < going.numel():
                active = active[chosen]
                rows = chosen.to(step.mask_logits.device)
                context = context.select(rows)
                assert memory.states is not None
                memory = _Memory(
                    [(hidden[rows], cell[rows]) for hidden, cell in memory.states],
                    None if memory.found is None else memory.found[rows],
                )
        empty = (torch.zeros(0, *size, dtype=torch.float32 if mask_threshold is None else torch.bool), torch.zeros(0))
        return [
            (torch.stack([mask for mask, _ in one]), torch.stack([score for _, score in one])) if one else empty
            for one in found
        ]

    def _masks(
        self, logits: Tensor, looked_at: tuple[int, int], size: tuple[int, int], mask_threshold: float | None
    ) -> Tensor:
        """Logits (N, h', w') that cover a padded image of ``looked_at`` (H, W) as bool masks (N, *size) on the CPU.

        Without a threshold they stay fp32 logits.
        """
        logits = at_pixels(logits.float().unsqueeze(1), self.stride, self.backbone.offset, looked_at)
        if size != looked_at:
            logits = F.interpolate(logits, size=size, mode="bilinear")
        masks = logits if mask_threshold is None else logits.sigmoid() > mask_threshold
        return masks.squeeze(1).cpu()


def _build_backbone(config: ModelConfig) -> Backbone:
    if config.backbone == "plants":
        return PlantsFCN(config.feature_channels)
    if config.backbone == "fcn8s":
        return FCN8s(config.feature_channels, config.padding, config.dropout, fc_channels=config.fc_channels)
    return SmallFCN(
        config.backbone_channels, config.feature_channels, config.recurrent_stride, config.mask_head == "dynamic"
    )
