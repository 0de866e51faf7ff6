"""The Triton kernels of lstm_gates compiled for GPUs that need not be there: no spills, 128-bit accesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastris.kernels import lstm_gates as kernels  # noqa: E402

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
OPTIONAL = {"addend", "bias", "peephole", "d_sum"}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("gates", "state", "channels", "given"),
    [
        ("bf16", "bf16", 64, "all"),
        ("bf16", "bf16", 64, "none"),
        ("fp16", "fp16", 8, "none"),
        ("bf16", "fp32", 24, "all"),
        ("fp32", "fp32", 100, "all"),
        ("fp32", "fp32", 30, "none"),
        ("bf16", "fp32", 30, "all"),
        ("fp16", "fp16", 1, "all"),
        ("fp64", "fp64", 64, "all"),
    ],
)
def test_lstm_gates(
    direction: str, gates: str, state: str, channels: int, given: str, arch: int, compiled: Callable[..., Any]
) -> None:
    kernel = kernels.lstm_gates_kernel if direction == "forward" else kernels.lstm_gates_backward_kernel
    types = {
        **dict.fromkeys(("gates", "hidden", "d_hidden", "d_gates"), f"*{gates}"),
        **dict.fromkeys(("cell_prev", "addend", "cell", "d_cell", "d_cell_prev"), f"*{state}"),
        **dict.fromkeys(("bias", "peephole"), "*fp32"),
        "d_sum": "*fp64" if gates == "fp64" else "*fp32",
    }
    missing = OPTIONAL.intersection(kernel.arg_names) if given == "none" else set()
    constants = {"C": channels, **kernels.tile_of(channels, BYTES[gates]), **dict.fromkeys(missing)}
    binary = compiled(kernel, types, constants, {"num_warps": kernels.NUM_WARPS})
    # Three programs of four warps on a multiprocessor. For sm_80 ptxas spills a register in one, to stay at 64.
    binary.check_registers(168, 8 if arch == 80 else 0)
    assert "div.full" not in binary.ptx and ("rcp.approx.ftz" in binary.ptx) == (gates != "fp64")
    if channels * BYTES[gates] % 16 == 0:
        tensors = 5 if direction == "forward" else 7  # four gates and the states read
        assert binary.sass.count("LDG.E.128") >= tensors
        assert binary.sass.count("STG.E.128") >= (2 if direction == "forward" else 5)
        for narrow in ("LDG.E.64", "LDG.E.U16", "STG.E.64", "STG.E.U16", "STG.E "):
            assert narrow not in binary.sass or gates == "fp64"  # bias and peephole are fp32 beside fp64
