"""Model files: one safetensors file that holds the weights and, in its header, what they are for."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastris.errors import InputError
from fastris.nn.config import PLAIN, ModelConfig
from fastris.nn.model import RecurrentInstanceSegmenter

HEADER = "fastris"


def load(name_or_path: str | os.PathLike[str]) -> RecurrentInstanceSegmenter:
    """A shipped or saved model, in evaluation mode on the CPU.

    Args:
        name_or_path: the name of a shipped model (``"nuclei"``) or a ``.safetensors`` file written by :func:`save` or
            ``fastris train``.

    Raises:
        InputError: no such model or file; not a fastris model; damaged, of another architecture, or with weights that
            are not finite. The message names the file.
    """
    path = _find(name_or_path)
    config, tensors = _read(path)
    model = RecurrentInstanceSegmenter(config)
    expected = model.state_dict()
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise InputError(f"{path}: weights of another architecture: {what} {_some(names)}")
    shapes = [name for name in expected if expected[name].shape != tensors[name].shape]
    if shapes:
        raise InputError(f"{path}: weights of another architecture: other shapes for {_some(shapes)}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(f"{path}: weights are not finite (NaN or infinite) in {_some(broken)}")
    model.load_state_dict(tensors)
    return model.eval()


def save(
    path: str | os.PathLike[str], model: RecurrentInstanceSegmenter, metadata: dict[str, Any] | None = None
) -> None:
    """Write a model file; a reader sees the old file or the whole new one.

    Args:
        path: the ``.safetensors`` file.
        model: its configuration and weights are stored.
        metadata: JSON-able facts to keep with it (data, seed, metrics …), read back by :func:`read_metadata`.
    """
    from safetensors.torch import save_file

    path = Path(path)
    header = {"config": model.config.to_dict(), "metadata": metadata or {}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path.parent}: cannot write here: {error.strerror}") from None
    os.close(handle)
    try:
        save_file(tensors, temporary, {HEADER: json.dumps(header)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_metadata(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts that :func:`save` stored with a model."""
    return _header(_find(name_or_path))["metadata"]


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    folder = resources.files("fastris") / "weights"
    if not folder.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(".safetensors") for entry in folder.iterdir() if entry.name.endswith(".safetensors")
    )


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    if isinstance(name_or_path, str) and name_or_path in shipped():
        return Path(str(resources.files("fastris") / "weights" / f"{name_or_path}.safetensors"))
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(f"{path}: no such model file; shipped models: {', '.join(shipped()) or 'none'}")
    return path


def _header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            return {"config": header["config"], "metadata": header["metadata"]}
    except KeyError:
        raise InputError(f"{path}: not a fastris model (its header has no '{HEADER}' entry)") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file: {_one_line(error)}") from None


def _read(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = _header(path)
    try:
        config = ModelConfig.from_dict({**PLAIN, **header["config"]})
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: {_one_line(error)}") from None
    try:
        return config, load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged: {_one_line(error)}") from None


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
