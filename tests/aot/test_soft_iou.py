"""The Triton kernels of soft_iou compiled for GPUs that need not be there: no spills, products where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastris.kernels import soft_iou as kernels  # noqa: E402

from fastris.ops.soft_iou_triton import is_narrow  # noqa: E402

DTYPES = ["fp32", "bf16", "fp16", "fp64"]
MOST_REGISTERS = 168  # three programs of four warps on a multiprocessor
MOST_STACK = 16  # of addresses, outside the loop
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "u8": torch.uint8}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
STRIDES = ("N", "split_size", "pred_stride_b", "pred_stride_p", "target_stride_b", "target_stride_g")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("blocks, aligned", [((16, 16), ()), ((32, 16), ()), ((32, 32), ()), ((32, 32), STRIDES)])
def test_sums(
    dtype: str, labels: bool, blocks: tuple[int, int], aligned: tuple[str, ...], compiled: Callable[..., Any]
) -> None:
    counts = {"num_pred": "*i64", "num_target": "*i64"} if blocks[1] == 32 else {}
    types = {
        "pred": f"*{dtype}",
        "target": "*i64" if labels else f"*{dtype}",
        "sums": "*fp64" if dtype == "fp64" else "*fp32",
        **counts,
    }
    constants = {"pred_stride_x": 1, "target_stride_x": 1, "LABELS": labels, "NARROW": BYTES[dtype] == 2}
    constants |= {"BLOCK_P": blocks[0], "BLOCK_G": blocks[1]}
    constants |= {} if counts else {"num_pred": None, "num_target": None}
    options = kernels.sums_options(BYTES[dtype], bool(aligned), sum(blocks))
    binary = compiled(kernels.soft_iou_sums_kernel, types, constants, options, aligned)
    binary.check_registers(MOST_REGISTERS, 0 if aligned else MOST_STACK)
    assert (".tf32.tf32." in binary.ptx) == (dtype == "fp32")  # of values in two parts
    assert ("HMMA.16816.F32" in binary.sass) == (dtype in ("bf16", "fp16"))  # exact products, sums in fp32
    if aligned and dtype != "fp64":
        assert "LDGSTS.E.BYPASS.128" in binary.sass  # rows are copied to shared memory while others are used


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", ["u8", "fp32"])
def test_products_of_halves_are_narrow_only_where_exact(dtype: str, target: str, compiled: Callable[..., Any]) -> None:
    narrow = is_narrow(TORCH[dtype], TORCH[target], labels=False)
    types = {"pred": f"*{dtype}", "target": f"*{target}", "sums": "*fp32"}
    constants = {"LABELS": False, "NARROW": narrow, "BLOCK_P": 32, "BLOCK_G": 32, "num_pred": None, "num_target": None}
    binary = compiled(
        kernels.soft_iou_sums_kernel, types, constants, kernels.sums_options(2 if narrow else 4, False, 64)
    )
    binary.check_registers(MOST_REGISTERS, MOST_STACK)
    assert ("HMMA.16816" in binary.sass) == (target == "u8")
    assert (".tf32.tf32." in binary.ptx) == (target == "fp32")


@pytest.mark.parametrize("compute", ["fp32", "fp64"])
@pytest.mark.parametrize("constants", [{"BLOCK_S": 64}, {"P": 1, "G": 1, "splits": 1, "BLOCK_S": 1}])
def test_finish(compute: str, constants: dict[str, int], compiled: Callable[..., Any]) -> None:
    pointer = f"*{compute}"
    types = {"sums": pointer, "num_pred": "*i64", "num_target": "*i64", "iou": pointer, "union": pointer}
    constants = {**constants, "BLOCK_G": 32}
    binary = compiled(kernels.soft_iou_finish_kernel, types, constants, kernels.FINISH)
    binary.check_registers(MOST_REGISTERS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["i64", "i32", "u8", "fp32", "bf16"])
def test_backward(dtype: str, target: str, compiled: Callable[..., Any]) -> None:
    compute = "*fp64" if dtype == "fp64" else "*fp32"
    types = {"weight": compute, "offset": compute, "target": f"*{target}", "out": f"*{dtype}"}
    constants = {"target_stride_x": 1, "LABELS": target.startswith("i")}
    binary = compiled(kernels.soft_iou_backward_kernel, types, constants, kernels.BACKWARD)
    binary.check_registers(MOST_REGISTERS)
