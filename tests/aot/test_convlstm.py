"""The Triton kernels of a ConvLSTM step compiled for GPUs that need not be there: tensor cores, no spills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from fastris.kernels import convlstm as kernels  # noqa: E402

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIONAL = {"gates", "peephole", "d_sum"}
MOST_STACK = 8  # two registers, which ptxas spills in some


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("dtype", "state", "channels", "precision", "given"),
    [
        ("bf16", "bf16", 64, "ieee", "all"),
        ("bf16", "fp32", 64, "ieee", "some"),
        ("fp16", "fp32", 32, "ieee", "some"),
        ("bf16", "fp32", 30, "ieee", "all"),
        ("fp16", "fp16", 1, "ieee", "all"),
        ("fp32", "fp32", 64, "tf32", "all"),
        ("fp32", "fp32", 61, "ieee", "all"),
    ],
)
def test_conv_gates(
    direction: str,
    dtype: str,
    state: str,
    channels: int,
    precision: str,
    given: str,
    arch: int,
    compiled: Callable[..., Any],
) -> None:
    kernel = kernels.conv_gates_kernel if direction == "forward" else kernels.conv_gates_backward_kernel
    types = {
        **dict.fromkeys(("hidden_prev", "weight", "hidden", "gates", "d_hidden", "d_gates"), f"*{dtype}"),
        **dict.fromkeys(("cell_prev", "cell", "d_cell", "d_cell_prev"), f"*{state}"),
        **dict.fromkeys(("addend", "bias", "peephole", "d_sum"), "*fp32"),
    }
    missing = OPTIONAL.intersection(kernel.arg_names) if given == "some" else set()
    tile = kernels.tile_of(channels, BYTES[dtype], precision, given == "all", direction == "backward")
    constants = {"C": channels, "K": kernels.padded(channels), "PRECISION": precision, **dict.fromkeys(missing)}
    if channels == 1:  # sizes of 1 are constants
        constants |= dict.fromkeys(("H", "W", "KH", "KW", "dilation"), 1)
    binary = compiled(kernel, types, constants, {**tile, **kernels.OPTIONS})
    binary.check_registers(128, MOST_STACK)  # two programs of eight warps on a multiprocessor
    assert ("tf32" in binary.ptx) == (precision == "tf32")
    if dtype != "fp32" or precision == "tf32":
        assert ("HGMMA" if arch == 90 else "HMMA") in binary.sass
    if channels % 8 == 0:
        assert "LDG.E.128" in binary.sass and "STG.E.128" in binary.sass and "LDGSTS.E.BYPASS.128" in binary.sass
