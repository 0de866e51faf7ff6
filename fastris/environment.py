"""What is installed and what runs: ``fastris info``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastris import __version__, backend

_PACKAGES = ("numpy", "scipy", "pillow", "safetensors", "triton", "tensorboard", "pycocotools")


def info() -> dict[str, Any]:
    """Versions, devices, and which back end is live for every operator on CPU and CUDA.

    Returns:
        JSON-able dict with ``versions`` (None: not installed), ``device`` (name of the GPU, or None), ``extension``
        (``loaded``, ``error``, ``cuda_archs``), ``backend`` (what was asked for) and ``operators``: for each operator
        and for "cpu" and "cuda" a dict with ``backend`` "native" or "reference", or None where torch itself cannot
        run there, and, where it is not native, ``reason`` and ``remedy``.
    """
    versions: dict[str, str | None] = {
        "fastris": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda or "none",
    }
    versions.update({name: _version(name) for name in _PACKAGES})
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extension": {
            "loaded": backend.native_error() is None,
            "error": backend.native_error(),
            "cuda_archs": backend.cuda_archs(),
        },
        "backend": backend.active_backend(),
        "operators": {
            operator: {device: _live(operator, device) for device in ("cpu", "cuda")}
            for operator in backend.NATIVE_OPERATORS
        },
    }


def format_info() -> str:
    """:func:`info` as text for a terminal."""
    facts = info()
    lines = [f"{name:14} {version or 'not installed'}" for name, version in facts["versions"].items()]
    lines.append(f"{'GPU':14} {facts['device'] or 'none that torch can use'}")
    extension = facts["extension"]
    if extension["loaded"]:
        kernels = f"CPU and CUDA ({extension['cuda_archs']})" if extension["cuda_archs"] else "CPU only"
        lines.append(f"{'extension':14} fastris._C loaded, kernels for {kernels}")
    else:
        lines.append(f"{'extension':14} fastris._C not loaded: {extension['error']}")
    lines += [f"{'back end':14} {facts['backend']}", "", "operators"]
    notes: dict[tuple[str, str], list[str]] = {}
    for operator, devices in facts["operators"].items():
        live = "   ".join(f"{device}: {state['backend'] or 'none':10}" for device, state in devices.items())
        lines.append(f"  {operator:12} {live}".rstrip())
        for device, state in devices.items():
            if "reason" in state:
                notes.setdefault((state["reason"], state["remedy"]), []).append(f"{operator} on {device}")
    lines += ["", "not native"] if notes else []
    for (reason, remedy), places in notes.items():
        lines.append(f"  {', '.join(places)}: {reason}; remedy: {remedy}")
    return "\n".join(lines)


def _live(operator: str, device: str) -> dict[str, str | None]:
    if device == "cuda" and not torch.cuda.is_available():
        missing = backend.why_no_cuda()
        return {"backend": None, "reason": missing[0], "remedy": missing[1]}
    found = backend.why_not_native(operator, device)
    if backend.active_backend() == "reference":
        found = ("the reference back end was asked for", "FASTRIS_BACKEND=auto")
    if found is None:
        return {"backend": "native"}
    return {"backend": "reference", "reason": found[0], "remedy": found[1]}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
