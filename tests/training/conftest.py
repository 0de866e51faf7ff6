"""A run small enough for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastris.training import TrainConfig

SMALL_MODEL = {"feature_channels": 8, "backbone_channels": [8, 8, 8, 8], "hidden_channels": 8, "layers": 1}
SMALL = {
    "data": "leaves:6",
    "max_steps": 6,
    "instances": [2, 4],
    "crop": [32, 32],
    "batch_size": [2, 2],
    "stage_limit": [0.5, 1.0],
    "validate_every": 2,
    "validation_crops": 2,
    "warmup": 2,
    "model": {**SMALL_MODEL, "max_steps": 6},
}


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig.from_dict(SMALL)


@pytest.fixture
def write_settings(tmp_path) -> Callable[..., Path]:
    """Write the small run's settings, with changes, as a TOML file."""

    def write(**changes: Any) -> Path:
        settings = {**SMALL, **changes}
        model = settings.pop("model")
        # JSON writes these values as TOML does
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in model.items())]
        path = tmp_path / "run.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
