"""Recurrent instance segmentation, fast ConvLSTMs and batched matching for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastris.backend import use_backend
    from fastris.environment import info
    from fastris.errors import InputError
    from fastris.instances import Instances
    from fastris.loading import load, save
    from fastris.nn.config import ModelConfig
    from fastris.nn.convlstm import ConvLSTM, ConvLSTMCell
    from fastris.nn.loss import RISLoss, match
    from fastris.nn.matcher import HungarianMatcher, MaskHungarianMatcher
    from fastris.nn.model import RecurrentInstanceSegmenter
    from fastris.ops.assignment import assignment, linear_sum_assignment
    from fastris.ops.convlstm import convlstm
    from fastris.ops.lstm_gates import lstm_gates
    from fastris.ops.soft_iou import soft_iou

__version__ = "0.1.0"

_HOME = {
    "ConvLSTM": "fastris.nn.convlstm",
    "ConvLSTMCell": "fastris.nn.convlstm",
    "HungarianMatcher": "fastris.nn.matcher",
    "InputError": "fastris.errors",
    "Instances": "fastris.instances",
    "MaskHungarianMatcher": "fastris.nn.matcher",
    "ModelConfig": "fastris.nn.config",
    "RISLoss": "fastris.nn.loss",
    "RecurrentInstanceSegmenter": "fastris.nn.model",
    "assignment": "fastris.ops.assignment",
    "convlstm": "fastris.ops.convlstm",
    "info": "fastris.environment",
    "linear_sum_assignment": "fastris.ops.assignment",
    "load": "fastris.loading",
    "lstm_gates": "fastris.ops.lstm_gates",
    "match": "fastris.nn.loss",
    "save": "fastris.loading",
    "soft_iou": "fastris.ops.soft_iou",
    "use_backend": "fastris.backend",
}

__all__ = [
    "ConvLSTM",
    "ConvLSTMCell",
    "HungarianMatcher",
    "InputError",
    "Instances",
    "MaskHungarianMatcher",
    "ModelConfig",
    "RISLoss",
    "RecurrentInstanceSegmenter",
    "__version__",
    "assignment",
    "convlstm",
    "info",
    "linear_sum_assignment",
    "load",
    "lstm_gates",
    "match",
    "save",
    "soft_iou",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastris' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
