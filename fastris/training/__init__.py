"""Training: the configuration, the curriculum, checkpoints and the loop."""

from __future__ import annotations

from fastris.training.config import PRESETS, TrainConfig
from fastris.training.curriculum import Curriculum, Stage
from fastris.training.trainer import DivergedError, Trainer

__all__ = ["PRESETS", "Curriculum", "DivergedError", "Stage", "TrainConfig", "Trainer"]
