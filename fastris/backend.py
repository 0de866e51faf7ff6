"""Which implementation of the operators runs: the native one where there is one, or the reference."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

BACKENDS = ("auto", "reference", "native")

NATIVE_OPERATORS: dict[str, frozenset[str]] = {
    "assignment": frozenset({"cpu", "cuda"}),
    "lstm_gates": frozenset({"cpu", "cuda"}),
    "convlstm": frozenset({"cpu", "cuda"}),
    "conv2d_same": frozenset({"cpu"}),
    "dynamic_mask": frozenset({"cpu"}),
    "group_norm_relu": frozenset({"cpu"}),
    "image_masks": frozenset({"cpu"}),
    "look": frozenset({"cpu"}),
    "permutohedral": frozenset({"cpu"}),
    "place_logits": frozenset({"cpu"}),
    "soft_iou": frozenset({"cpu", "cuda"}),
}
"""Every operator, with the device types that there is a native kernel for when all is built and installed."""

TRITON_OPERATORS = frozenset({"convlstm", "lstm_gates", "soft_iou"})
"""Those whose CUDA kernel is written in Triton; all others are in fastris._C."""

TRITON_FOUND = importlib.util.find_spec("triton") is not None

_extension: ModuleType | None = None
_extension_error: str | None = None
try:
    _extension = importlib.import_module("fastris._C")
except ImportError as error:
    _extension_error = str(error)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_active = _checked(os.environ.get("FASTRIS_BACKEND", "") or "auto", "FASTRIS_BACKEND")


def active_backend() -> str:
    """The back end asked for: "auto", "reference" or "native"."""
    return _active


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the back end of every operator for a block, in all threads of the process.

    Args:
        name: "auto" takes the native kernel where there is one for the operator and device, "reference" never does,
            and "native" raises where there is none. The environment variable FASTRIS_BACKEND sets the default.

    Raises:
        ValueError: another name.
        RuntimeError: "native" where the extension is not loaded; the message says why.
    """
    global _active
    _checked(name, "use_backend: name")
    if name == "native" and _extension is None:
        raise RuntimeError(f"use_backend: the native extension is not loaded: {native_error()}")
    before = _active
    _active = name
    try:
        yield
    finally:
        _active = before


def extension() -> ModuleType:
    """``fastris._C``.

    Raises:
        RuntimeError: it is not loaded.
    """
    if _extension is None:
        raise RuntimeError(f"fastris._C is not loaded: {native_error()}")
    return _extension


def native_error() -> str | None:
    """Why ``fastris._C`` is not loaded, or None where it is."""
    if _extension is not None:
        return None
    if _extension_error == "No module named 'fastris._C'":
        return "fastris was installed without a C++ compiler"
    return _extension_error


def extension_path() -> str | None:
    """The file of ``fastris._C``, or None where it is not loaded."""
    return None if _extension is None else _extension.__file__


def cuda_archs() -> str:
    """The architectures that CUDA kernels were compiled for, as in "8.0;9.0+PTX"; empty where none were."""
    return "" if _extension is None else str(_extension.CUDA_ARCHS)


def has_native(operator: str, device_type: str) -> bool:
    """Whether a native kernel of the operator can run on this type of device in this process."""
    return why_not_native(operator, device_type) is None


def why_not_native(operator: str, device_type: str) -> tuple[str, str] | None:
    """Why an operator runs on the reference back end on a type of device, and the remedy; None if it is native."""
    if device_type not in NATIVE_OPERATORS[operator]:
        return f"no native {device_type} kernel in this version", "none needed: the reference is complete"
    if device_type == "cuda" and operator in TRITON_OPERATORS:
        return None if TRITON_FOUND else ("triton is not installed", "pip install triton")
    if _extension is None:
        return native_error() or "", "install a C++ compiler with Python's headers (or set CXX), reinstall fastris"
    if device_type == "cuda" and not cuda_archs():
        return "fastris was built without nvcc", "put nvcc on PATH (or set CUDA_HOME), reinstall with FASTRIS_CUDA=1"
    return None


def why_no_cuda() -> tuple[str, str]:
    """Why nothing at all runs on CUDA here, and the remedy."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA", "install a CUDA build of torch"
    return "torch finds no CUDA device", "check the driver with nvidia-smi"


def runs_native(operator: str, device_type: str) -> bool:
    """Decide for one call, by the active back end.

    Raises:
        RuntimeError: "native" was asked for and there is no such kernel.
    """
    if _active == "reference":
        return False
    reason = why_not_native(operator, device_type)
    if reason is not None and _active == "native":
        raise RuntimeError(f"{operator}: no native kernel on {device_type}: {reason[0]}; {reason[1]}")
    return reason is None
