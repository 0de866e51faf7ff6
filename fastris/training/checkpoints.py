"""Checkpoints: a folder a step with ``state.safetensors`` and ``state.json``, there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastris.errors import InputError

KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    average: torch.nn.Module | None = None,
) -> Path:
    """Write the checkpoint of a step and remove all but the newest :data:`KEEP`."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors.update({f"average.{name}": tensor for name, tensor in average.state_dict().items()})
    for index, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()})
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        path = folder / f"step-{step:08d}"
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        InputError: missing or damaged; the message names the file.
    """
    file = path / "state.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot read this checkpoint: {error}") from None


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: torch.nn.Module | None = None
) -> None:
    """Restore model, optimiser and moving average in place.

    Raises:
        InputError: missing, damaged or of another architecture; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "state.safetensors"
    try:
        tensors = load_file(file)
        weights = _part(tensors, "model.")
        model.load_state_dict(weights)
        if average is not None:
            average.load_state_dict(_part(tensors, "average."))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{file}: cannot load this checkpoint: {error}") from None
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
