"""Kernels compiled for GPUs that need not be there, and what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest


class Binary:
    """A compiled kernel: its PTX, its machine code, and the registers and bytes of stack of a thread."""

    def __init__(self, asm: dict[str, Any], tools: Path, folder: Path) -> None:
        self.ptx: str = asm["ptx"]
        self._tool = tools / "cuobjdump"
        self._cubin = folder / "kernel.cubin"
        self._cubin.write_bytes(asm["cubin"])
        usage = self._dump("-res-usage")
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert match is not None, usage
        self.registers, self.stack = int(match[1]), int(match[2])

    def _dump(self, option: str) -> str:
        return subprocess.run([self._tool, option, self._cubin], capture_output=True, text=True, check=True).stdout

    @cached_property
    def sass(self) -> str:
        return self._dump("-sass")

    def check_registers(self, most: int, most_stack: int = 0) -> None:
        """No more registers than ``most``, and no more than ``most_stack`` bytes of them spilled."""
        assert self.registers <= most
        assert self.stack <= most_stack


@pytest.fixture(params=[80, 90])
def arch(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def compiled(arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Binary]:
    """``compiled(kernel, types, constants, options)`` for a Triton kernel, the pointers of ``types``, the values of
    ``constants``, and options that may also name constants; other arguments are 32-bit integers.

    Pointers are aligned, as torch's are; so are the integers that ``aligned`` names, multiples of 16.
    """
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"

    def compiled(
        kernel: Any,
        types: dict[str, str],
        constants: dict[str, Any],
        options: dict[str, int],
        aligned: Collection[str] = (),
    ) -> Binary:
        names = kernel.arg_names
        constants = constants | {name: value for name, value in options.items() if name in names}
        options = {name: value for name, value in options.items() if name not in names}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        attributes = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name][0] == "*" or name in aligned
        }
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        return Binary(triton.compile(source, target=target, options=options).asm, tools, tmp_path)

    return compiled
