"""What a model is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from fastris.errors import InputError

PLAIN = {"inhibit_found": False, "confidence_attends": False, "dense": False, "hard_place": False}
"""A decoder without what helped the shipped model (docs/nuclei.md): the paper's, and that of files from before."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a :class:`~fastris.nn.RecurrentInstanceSegmenter`.

    Attributes:
        backbone: the feature network. ``"small"``: :class:`~fastris.nn.SmallFCN`. ``"plants"``: the released plants
            network (:class:`~fastris.nn.PlantsFCN`, stride 5). ``"fcn8s"``: VGG16 as in the paper's person network
            (:class:`~fastris.nn.FCN8s`, stride 8).
        feature_channels: channels of the image features that enter the ConvLSTM at every step.
        backbone_channels: widths of the small backbone at strides 2, 4, 8 and 16.
        fc_channels, padding, dropout: of the fcn8s backbone.
        hidden_channels: channels of each ConvLSTM layer.
        layers: number of ConvLSTM layers.
        kernel_size: ConvLSTM kernel, odd.
        recurrent_stride: pixels per cell of the recurrent maps of the small backbone, 2 or 4.
        mask_head: ``"inhibition"`` is the paper's head: 1×1 conv, log-softmax over the map, one learned scalar,
            sigmoid. ``"dynamic"`` uses that same spatial softmax to choose *where* the next object is, and draws
            the object at stride 2 with a small filter generated from what is there (conditional convolutions,
            Tian et al., ECCV 2020).
        inhibition_init: start value of the learned scalar (the released code's is 1).
        confidence_pool: the confidence head sees the recurrent state max-pooled to a grid of this side.
            0 means unpooled, as in the released plants network: it then needs ``confidence_map``.
        confidence_map: (height, width) of the recurrent map of the unpooled confidence head, else None.
        initialization: of what follows the backbone. ``"default"``, or ``"released"``, the released code's: weights
            uniform in ±0.08, biases of the gates i, f and o around 1, that of the confidence head 10.
        feedback: feed the union of the masks and of the places so far back into the first ConvLSTM layer.
        inhibit_found: show that union to the dynamic head's choice of the next place, too.
        confidence_attends: the confidence head sees what is at the place that the dynamic head chose, too.
        hard_place: the dynamic head looks at the most likely cell, and not at the mean of all cells. Which that is, it
            learns by the place term of :class:`~fastris.RISLoss` alone.
        dense: train the features to show in every cell whether it is an object, and where that has its middle, which
            the dynamic head then draws by.
        max_steps: the most objects that ``predict`` looks for in one image.
        mask_threshold: a pixel belongs to the object where the mask is above this; 0.9 in the released code.
        max_side: ``predict`` looks at a longer image shrunk to this many pixels, and scales the masks back.
    """

    backbone: str = "small"
    feature_channels: int = 48
    backbone_channels: tuple[int, int, int, int] = (32, 64, 96, 128)
    fc_channels: int = 4096
    padding: str = "100"
    dropout: float = 0.5
    hidden_channels: int = 32
    layers: int = 1
    kernel_size: int = 3
    recurrent_stride: int = 4
    mask_head: str = "dynamic"
    inhibition_init: float = 6.0
    confidence_pool: int = 2
    confidence_map: tuple[int, int] | None = None
    initialization: str = "default"
    feedback: bool = True
    inhibit_found: bool = True
    confidence_attends: bool = True
    dense: bool = True
    hard_place: bool = True
    max_steps: int = 60
    mask_threshold: float = 0.5
    max_side: int = 1024

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backbone", ("small", "plants", "fcn8s")),
            ("padding", ("100", "same")),
            ("mask_head", ("inhibition", "dynamic")),
            ("initialization", ("default", "released")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.recurrent_stride not in (2, 4):
            raise InputError(f"recurrent_stride: expected 2 or 4, got {self.recurrent_stride}")
        if self.kernel_size % 2 == 0:
            raise InputError(f"kernel_size: expected an odd number, got {self.kernel_size}")
        if self.confidence_pool == 0 and self.confidence_map is None:
            raise InputError("confidence_map: an unpooled confidence head needs the size of its map")
        for name in ("dropout", "mask_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected a number from 0, below 1, got {getattr(self, name)}")
        for name in ("feature_channels", "fc_channels", "hidden_channels", "layers", "max_steps", "max_side"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from a JSON-like dict; unknown keys raise an :class:`~fastris.errors.InputError`."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"model configuration: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        converted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**converted)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)
