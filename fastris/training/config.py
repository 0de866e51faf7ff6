"""Everything that a training run depends on, in one dataclass."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastris.errors import InputError
from fastris.nn.config import PLAIN, ModelConfig
from fastris.nn.fcn8s import STAGES


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Tuples have one entry for each stage of the curriculum.

    Attributes:
        data: a DSB2018 zip or folder, a folder of images and label maps, a folder of CVPPP, Pascal VOC, Cityscapes or
            COCO, a COCO JSON file, or "leaves" (generated); see docs/data.md.
        data_class: the class whose objects count, of data with classes, such as "person": images without one are left
            out, and the other objects are background. Empty for the objects of all classes, and all images.
        workers: processes that make batches ahead; 0 for none. The batches are the same whatever their number.
        seed: of the initial weights, the order of images and their transforms.
        max_steps: optimiser steps in all.
        instances: the most instances in a training crop; 0 in the last stage for all. Crowded crops are narrowed until
            they have no more. With ``image_size`` the most recurrent steps instead, on images that show all they have.
        growth: instances that the stages between the first and the last gain at each plateau, until they have the next
            stage's; 0 for none.
        crop: side of the square training crop, pixels.
        image_size: (height, width) of whole images, scaled and padded, to train on instead of crops; else None.
        batch_size: crops in a batch.
        stage_limit: the latest share of ``max_steps`` at which each stage ends.
        patience: a stage ends after this many validations without a lower loss.
        plateau: lower by less than this share of the loss does not count as lower.
        validate_every: steps between validations; a checkpoint is written after each.
        validation_crops: crops of held-out images that a validation looks at; the most images, with ``image_size``.
        extra_steps: recurrent steps beyond the most instances in a batch; 2 in the paper.
        learning_rate: of Adam, reached after ``warmup`` steps, then falling in a straight line to 0 at ``max_steps``.
        decay: false for a learning rate that does not fall.
        warmup: steps.
        gradient_clamp: every element of the gradient is clamped to ± this; 5 in the released code.
        gradient_norm: the whole gradient is scaled to at most this norm; 0 for no limit.
        loss_variant, loss_resolution, confidence_weight, place_weight, dense_weight, per_instance: see
            :class:`fastris.RISLoss`.
        zoom: crops are scaled by a random factor between 1/zoom and zoom; 1 for none.
        rotation: degrees to either side, uniform; 0 for quarter turns.
        vertical_flip: turn images upside down too, not only left to right.
        jitter: how strongly to change brightness, contrast and gamma; 1 for the transform's own ranges, 0 for not.
        grey_probability, invert_probability: how often colours become grey, and dark and bright change places.
        precision: "fp32", "bf16" for mixed precision, or "auto": bf16 where the device multiplies it, else fp32.
        cuda_graph: on a GPU with native operators, replay the steps as CUDA graphs; the CPU takes no notice.
        ema: the weights that are validated and saved are an exponential moving average of those trained, with this
            decay a step; 0 for the weights themselves.
        initial: a model to start from, of the same architecture: a shipped model's name or a file; empty for none.
        backbone_weights: a file of torchvision's VGG16 or of an FCN-8s for the fcn8s backbone to start from (see
            :func:`fastris.nn.load_pretrained`); empty for none.
        frozen: stages of the fcn8s backbone that are not trained (see :class:`fastris.nn.FCN8s`).
        model: the architecture.
    """

    data: str = "leaves"
    data_class: str = ""
    workers: int = 0
    seed: int = 0
    max_steps: int = 4000
    instances: tuple[int, ...] = (2, 20)
    growth: int = 0
    crop: tuple[int, ...] = (64, 128)
    image_size: tuple[int, int] | None = None
    batch_size: tuple[int, ...] = (16, 8)
    stage_limit: tuple[float, ...] = (0.4, 1.0)
    patience: int = 4
    plateau: float = 0.0
    validate_every: int = 200
    validation_crops: int = 64
    extra_steps: int = 2
    learning_rate: float = 1e-3
    decay: bool = True
    warmup: int = 100
    gradient_clamp: float = 5.0
    gradient_norm: float = 5.0
    loss_variant: str = "first_n"
    loss_resolution: str = "image"
    confidence_weight: float = 1.0
    place_weight: float = 0.3
    dense_weight: float = 1.0
    per_instance: bool = True
    zoom: float = 1.0
    rotation: float = 0.0
    vertical_flip: bool = True
    jitter: float = 1.0
    grey_probability: float = 0.0
    invert_probability: float = 0.0
    precision: str = "fp32"
    cuda_graph: bool = True
    ema: float = 0.0
    initial: str = ""
    backbone_weights: str = ""
    frozen: tuple[str, ...] = ()
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        stages = len(self.instances)
        for name in ("instances", "crop", "batch_size", "stage_limit"):
            values = getattr(self, name)
            positive = values[:-1] if name == "instances" and values[-1:] == (0,) else values
            if len(values) != stages or not values or min(positive, default=1) <= 0:
                raise InputError(f"{name}: expected {stages or 1} positive numbers, one a stage, got {list(values)}")
        if list(self.stage_limit) != sorted(self.stage_limit) or self.stage_limit[-1] != 1:
            raise InputError(f"stage_limit: expected shares that rise to 1, got {list(self.stage_limit)}")
        for name in ("max_steps", "patience", "validate_every", "validation_crops", "learning_rate", "gradient_clamp"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in (
            *("seed", "workers", "growth", "plateau", "extra_steps", "warmup", "gradient_norm", "rotation", "jitter"),
            *("confidence_weight", "place_weight", "dense_weight"),
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        for name in ("grey_probability", "invert_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.zoom < 1:
            raise InputError(f"zoom: expected a factor from 1, got {self.zoom}")
        if self.rotation > 180:
            raise InputError(f"rotation: expected at most 180 degrees to either side, got {self.rotation}")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise InputError(f"image_size: expected a height and a width in pixels, got {list(self.image_size)}")
        for name in ("backbone_weights", "frozen"):
            if getattr(self, name) and self.model.backbone != "fcn8s":
                raise InputError(f"{name}: only for model.backbone 'fcn8s', not {self.model.backbone!r}")
        if not self.place_weight and self.model.mask_head == "dynamic" and self.model.hard_place:
            raise InputError("place_weight: must be above 0 with model.hard_place, which learns by that term alone")
        unknown = sorted(set(self.frozen) - set(STAGES))
        if unknown:
            raise InputError(f"frozen: expected names of {', '.join(STAGES)}, got {', '.join(unknown)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema: expected a number from 0, below 1, got {self.ema}")
        for name, allowed in (
            ("loss_variant", ("all", "first_n")),
            ("loss_resolution", ("image", "map")),
            ("precision", ("fp32", "bf16", "auto")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build from a JSON- or TOML-like dict, ``model`` being a dict of its own."""
        return cls().updated(values)

    def updated(self, values: dict[str, Any]) -> TrainConfig:
        """A copy with some settings changed.

        Raises:
            InputError: an unknown setting, or a value of the wrong type; the message names it.
        """
        values = dict(values)
        model = values.pop("model", {})
        if not isinstance(model, dict):
            raise InputError(f"model: expected a table of settings, got {model!r}")
        merged = ModelConfig.from_dict({**self.model.to_dict(), **_checked(ModelConfig, model, "model.")})
        return replace(self, **_checked(TrainConfig, values), model=merged)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values."""
        return asdict(self)


_PAPER: dict[str, Any] = {
    "instances": (2, 4, 0),
    "growth": 2,
    "batch_size": (1, 1, 1),
    "stage_limit": (1.0, 1.0, 1.0),
    "patience": 5,
    "plateau": 0.01,
    "validate_every": 1000,
    "extra_steps": 2,
    "decay": False,
    "warmup": 0,
    "gradient_clamp": 5.0,
    "gradient_norm": 0.0,
    "loss_variant": "all",
    "confidence_weight": 1.0,
    "place_weight": 0.0,
    "per_instance": False,
    "vertical_flip": False,
    "jitter": 0.0,
    "model": {
        "layers": 2,
        "kernel_size": 3,
        "mask_head": "inhibition",
        "inhibition_init": 1.0,
        "initialization": "released",
        "feedback": False,
        **PLAIN,
        "max_steps": 30,
    },
}
_PLANTS: dict[str, Any] = {
    "max_steps": 100_000,
    "crop": (500, 500, 500),
    "image_size": (530, 500),
    "learning_rate": 1e-4,
    "rotation": 180.0,
    "model": {
        "backbone": "plants",
        "feature_channels": 30,
        "hidden_channels": 30,
        "confidence_pool": 0,
        "confidence_map": (106, 100),
    },
}
_PERSON: dict[str, Any] = {
    "max_steps": 1_000_000,
    "crop": (500, 500, 500),
    "image_size": (500, 500),
    "learning_rate": 1e-5,
    "rotation": 22.5,
    "model": {
        "backbone": "fcn8s",
        "feature_channels": 100,
        "hidden_channels": 100,
        "confidence_pool": 2,
        "max_side": 500,
    },
}
_RELEASED: dict[str, Any] = {"loss_variant": "first_n", "extra_steps": 1, "model": {"mask_threshold": 0.9}}


def _merged(*presets: dict[str, Any]) -> dict[str, Any]:
    """The later win."""
    model = {name: value for preset in presets for name, value in preset.get("model", {}).items()}
    return {name: value for preset in presets for name, value in preset.items()} | {"model": model}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper-plants": _merged(_PAPER, _PLANTS),
    "paper-person": _merged(_PAPER, _PERSON),
    "released-plants": _merged(_PAPER, _PLANTS, _RELEASED, {"loss_resolution": "map"}),
    "released-person": _merged(_PAPER, _PERSON, _RELEASED, {"instances": (2, 4, 10), "frozen": STAGES[:-1]}),
    "nuclei": {
        "max_steps": 6000,
        "instances": (9, 14, 20),
        "crop": (128, 192, 256),
        "batch_size": (8, 6, 4),
        "stage_limit": (0.4, 0.6, 1.0),
        "patience": 100,
        "validate_every": 250,
        "learning_rate": 2e-3,
        "zoom": 1.5,
        "grey_probability": 0.2,
        "invert_probability": 0.05,
        "precision": "auto",
        "ema": 0.995,
    },
}
"""Settings by name, as changes to the defaults. ``nuclei`` is for the shipped model, whose card tells how that was
trained: it departs from the paper in the place term of the loss, in dividing an image's loss by its instances, in a
curriculum of three stages with growing crops, and in the architecture (see :class:`~fastris.ModelConfig`).
``paper-plants`` and ``paper-person`` are Romera-Paredes & Torr, ECCV 2016, ``released-*`` the values of the code that
its authors published (bernard24/RIS) where those are others. Neither gives numbers for the growing and the plateaus of
the curriculum: those are ours."""

_UNSTATED = {
    *("data", "data_class", "workers", "seed", "max_steps", "crop", "growth", "patience", "plateau", "validate_every"),
    *("validation_crops", "cuda_graph", "initial", "backbone_weights", "model.max_steps", "model.max_side"),
}  # what the paper says nothing of


def departures(config: TrainConfig) -> tuple[str, list[tuple[str, Any, Any]]]:
    """In what settings a run departs from the paper.

    Returns:
        ``(preset, rows)``: the preset of the paper that is compared with, ``"paper-person"`` for the fcn8s backbone and
        ``"paper-plants"`` for others, and (setting, value, the paper's value) for each that differs.
    """
    preset = "paper-person" if config.model.backbone == "fcn8s" else "paper-plants"
    ours, papers = _flat(config), _flat(TrainConfig().updated(PRESETS[preset]))
    return preset, [(name, ours[name], value) for name, value in papers.items() if ours[name] != value]


def _flat(config: TrainConfig) -> dict[str, Any]:
    settings = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "model"}
    settings |= {f"model.{one.name}": getattr(config.model, one.name) for one in fields(config.model)}
    return {name: value for name, value in settings.items() if name not in _UNSTATED}


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        InputError: no such file, or not TOML; the message names it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None


def _checked(cls: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values with lists as tuples and whole numbers as floats where those are meant, or an InputError."""
    defaults = {one.name: getattr(cls(), one.name) for one in fields(cls)}
    checked = {}
    for name, value in values.items():
        if name not in defaults:
            raise InputError(f"{prefix}{name}: unknown setting; known: {', '.join(sorted(defaults))}")
        checked[name] = _converted(prefix + name, value, defaults[name])
    return checked


def _converted(name: str, value: Any, default: Any) -> Any:
    if default is None:  # a size
        return tuple(value) if isinstance(value, (list, tuple)) else value
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: expected a list of numbers, got {value!r}")
        return tuple(_converted(name, one, default[0] if default else "") for one in value)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise InputError(f"{name}: expected {type(default).__name__}, got {value!r}")
    return value
