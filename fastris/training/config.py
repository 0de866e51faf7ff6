"""Everything that a training run depends on, in one dataclass."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastris.errors import InputError
from fastris.nn.config import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Tuples have one entry for each stage of the curriculum.

    Attributes:
        data: a DSB2018 zip or folder, a folder of images and label maps, or "leaves" (generated).
        seed: of the initial weights, the order of images and their transforms.
        max_steps: optimiser steps in all.
        instances: the most instances in a training crop. Crowded crops are narrowed until they have no more.
        crop: side of the square training crop, pixels.
        batch_size: crops in a batch.
        stage_limit: the latest share of ``max_steps`` at which each stage ends.
        patience: a stage ends after this many validations without a lower loss.
        validate_every: steps between validations; a checkpoint is written after each.
        validation_crops: crops of held-out images that a validation looks at.
        extra_steps: recurrent steps beyond the most instances in a batch; 2 in the paper.
        learning_rate: of Adam, reached after ``warmup`` steps, then falling in a straight line to 0 at ``max_steps``.
        warmup: steps.
        gradient_clamp: every element of the gradient is clamped to ± this; 5 in the released code.
        gradient_norm: the whole gradient is scaled to at most this norm; 0 for no limit.
        loss_variant, confidence_weight, place_weight, per_instance: see :class:`fastris.RISLoss`.
        jitter: how strongly to change brightness, contrast and gamma; 1 for the transform's own ranges, 0 for not.
        grey_probability, invert_probability: how often colours become grey, and dark and bright change places.
        precision: "fp32", or "bf16" for mixed precision.
        ema: the weights that are validated and saved are an exponential moving average of those trained, with this
            decay a step; 0 for the weights themselves.
        initial: a model to start from, of the same architecture: a shipped model's name or a file; empty for none.
        model: the architecture.
    """

    data: str = "leaves"
    seed: int = 0
    max_steps: int = 4000
    instances: tuple[int, ...] = (2, 20)
    crop: tuple[int, ...] = (64, 128)
    batch_size: tuple[int, ...] = (16, 8)
    stage_limit: tuple[float, ...] = (0.4, 1.0)
    patience: int = 4
    validate_every: int = 200
    validation_crops: int = 64
    extra_steps: int = 2
    learning_rate: float = 1e-3
    warmup: int = 100
    gradient_clamp: float = 5.0
    gradient_norm: float = 5.0
    loss_variant: str = "first_n"
    confidence_weight: float = 1.0
    place_weight: float = 0.3
    per_instance: bool = True
    jitter: float = 1.0
    grey_probability: float = 0.0
    invert_probability: float = 0.0
    precision: str = "fp32"
    ema: float = 0.0
    initial: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        stages = len(self.instances)
        for name in ("instances", "crop", "batch_size", "stage_limit"):
            values = getattr(self, name)
            if len(values) != stages or not values or min(values) <= 0:
                raise InputError(f"{name}: expected {stages or 1} positive numbers, one a stage, got {list(values)}")
        if list(self.stage_limit) != sorted(self.stage_limit) or self.stage_limit[-1] != 1:
            raise InputError(f"stage_limit: expected shares that rise to 1, got {list(self.stage_limit)}")
        for name in ("max_steps", "patience", "validate_every", "validation_crops", "learning_rate", "gradient_clamp"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("seed", "extra_steps", "warmup", "gradient_norm", "jitter", "confidence_weight", "place_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        for name in ("grey_probability", "invert_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema: expected a number from 0, below 1, got {self.ema}")
        for name, allowed in (("loss_variant", ("all", "first_n")), ("precision", ("fp32", "bf16"))):
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


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "nuclei": {
        "max_steps": 9000,
        "instances": (3, 9, 20),
        "crop": (64, 128, 256),
        "batch_size": (16, 8, 4),
        "stage_limit": (0.4, 0.83, 1.0),
        "patience": 6,
        "learning_rate": 1.5e-3,
        "grey_probability": 0.2,
        "invert_probability": 0.05,
        "precision": "bf16",
    },
}
"""Settings by name, as changes to the defaults. ``nuclei`` is what the shipped model was trained with: it departs from
the paper in the place term of the loss, in dividing an image's loss by its instances, in a curriculum of three stages
with growing crops, and in the architecture (see :class:`~fastris.ModelConfig`)."""


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
    if default is None:  # ModelConfig.confidence_map
        return tuple(value) if isinstance(value, (list, tuple)) else value
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: expected a list of numbers, got {value!r}")
        return tuple(_converted(name, one, default[0]) for one in value)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise InputError(f"{name}: expected {type(default).__name__}, got {value!r}")
    return value
