"""Choosing a back end, and telling which one is live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fastris
from fastris import backend
from fastris.environment import format_info, info

needs_extension = pytest.mark.skipif(backend.native_error() is not None, reason="fastris._C is not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_use_backend_restores_the_one_before_even_after_an_error() -> None:
    before = backend.active_backend()
    with pytest.raises(KeyError), fastris.use_backend("reference"):
        assert backend.active_backend() == "reference"
        raise KeyError
    assert backend.active_backend() == before


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="auto, reference, native, got 'fast'"), fastris.use_backend("fast"):
        pass


def test_the_environment_sets_the_backend() -> None:
    code = "from fastris import backend; print(backend.active_backend())"
    assert run_python(code, FASTRIS_BACKEND="reference").stdout.strip() == "reference"
    assert "FASTRIS_BACKEND must be one of" in run_python(code, FASTRIS_BACKEND="quick").stderr


def test_native_raises_for_an_operator_without_a_kernel() -> None:
    if backend.native_error() is None:
        with fastris.use_backend("native"), pytest.raises(RuntimeError, match="convlstm: no native kernel on mps"):
            backend.runs_native("convlstm", "mps")
    else:
        with pytest.raises(RuntimeError, match="not loaded"), fastris.use_backend("native"):
            pass


@needs_extension
def test_the_backend_decides_which_operator_runs() -> None:
    cost = torch.rand(2, 3, 4)
    for name, expected in (("reference", "fastris::assignment_reference"), ("native", "fastris::assignment")):
        with fastris.use_backend(name), torch.profiler.profile(acc_events=True) as profile:
            fastris.assignment(cost)
        assert expected in {event.key for event in profile.key_averages()}


def test_without_the_extension_everything_still_works_and_says_why() -> None:
    result = run_python(
        """
        import sys, json
        sys.modules["fastris._C"] = None
        import torch, fastris
        print(fastris.assignment(torch.eye(2)[None]).col_of_row.tolist())
        print(torch.ops.fastris.assignment(torch.eye(2)[None], None, None, False)[0].tolist())
        print(json.dumps(fastris.info()))
        """
    )
    first, second, facts = result.stdout.splitlines()
    assert first == second == "[[1, 0]]"
    state = json.loads(facts)
    assert not state["extension"]["loaded"]
    assert state["operators"]["assignment"]["cpu"]["backend"] == "reference"
    assert "compiler" in state["operators"]["assignment"]["cpu"]["remedy"]


def test_info_is_json_and_lists_every_operator() -> None:
    facts = json.loads(json.dumps(info()))
    assert set(facts["operators"]) == {
        "assignment",
        "conv2d_same",
        "convlstm",
        "dynamic_mask",
        "group_norm_relu",
        "image_masks",
        "look",
        "lstm_gates",
        "permutohedral",
        "place_logits",
        "soft_iou",
    }
    for devices in facts["operators"].values():
        for state in devices.values():
            assert state["backend"] == "native" or (state["reason"] and state["remedy"])
    assert facts["versions"]["torch"] == torch.__version__


@needs_extension
def test_info_tells_native_from_reference() -> None:
    with fastris.use_backend("auto"):
        operators = info()["operators"]
        assert all(devices["cpu"] == {"backend": "native"} for devices in operators.values())
        assert "fastris._C loaded" in format_info()
    with fastris.use_backend("reference"):
        assert info()["operators"]["assignment"]["cpu"]["backend"] == "reference"
        assert "lstm_gates on cpu" in format_info()


def test_importing_fastris_is_light() -> None:
    heavy = ("scipy", "PIL", "triton", "matplotlib")
    code = f"import sys, fastris; fastris.assignment; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_importing_the_operators_registers_all_of_them() -> None:
    code = """
        import fastris.ops, pathlib, torch
        files = pathlib.Path(fastris.ops.__file__).parent.glob("*.py")
        defining = {file.stem for file in files if "_library.define" in file.read_text()}
        print(sorted(defining ^ set(fastris.backend.NATIVE_OPERATORS)))
        print([name for name in defining if not any(op.startswith(name) for op in dir(torch.ops.fastris))])
        """
    result = run_python(code)
    assert result.stdout.splitlines() == ["[]", "[]"], result.stderr


def test_public_names_survive_the_import_of_every_module() -> None:
    result = run_python(
        """
        import importlib, pkgutil, types
        import fastris
        for module in pkgutil.walk_packages(fastris.__path__, "fastris."):
            if module.name not in ("fastris.__main__", "fastris._C") and not module.name.startswith("fastris.kernels"):
                importlib.import_module(module.name)
        print([name for name in fastris.__all__ if isinstance(getattr(fastris, name), types.ModuleType)])
        """
    )
    assert result.stdout.strip() == "[]"
