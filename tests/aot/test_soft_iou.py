"""The Triton kernels of soft_iou compiled for GPUs that need not be there: no spills, no TF32."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from fastris.kernels import soft_iou as kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHITECTURES = [80, 90]
DTYPES = ["fp32", "bf16", "fp16", "fp64"]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], arch: int) -> Any:
    """Arguments that are neither a pointer nor a constant are 32-bit integers; pointers are aligned, as torch's are."""
    options = dict(options)
    constants = {**constants, **{name: options.pop(name) for name in ("BLOCK_X",) if name in options}}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check_no_spills(binary: Any, path: Path) -> None:
    cubin = path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    assert int(match[1]) <= 168, usage  # three programs of four warps on a multiprocessor
    assert int(match[2]) == 0, usage


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("rows", [16, 17])
def test_sums(dtype: str, labels: bool, rows: int, arch: int, tmp_path: Path) -> None:
    counts = {"num_pred": "*i64", "num_target": "*i64"} if rows > 16 else {}
    types = {
        "pred": f"*{dtype}",
        "target": "*i64" if labels else f"*{dtype}",
        "sums": "*fp64" if dtype == "fp64" else "*fp32",
        **counts,
    }
    constants = {"pred_stride_x": 1, "target_stride_x": 1, "LABELS": labels}
    constants |= {"BLOCK_P": kernels.block_of(rows), "BLOCK_G": kernels.block_of(rows)}
    constants |= {} if counts else {"num_pred": None, "num_target": None}
    options = kernels.LABEL_SUMS if labels else kernels.MASK_SUMS
    binary = compiled(kernels.soft_iou_sums_kernel, types, constants, options, arch)
    check_no_spills(binary, tmp_path)
    assert "tf32" not in binary.asm["ptx"]


@pytest.mark.parametrize("compute", ["fp32", "fp64"])
@pytest.mark.parametrize("constants", [{}, {"P": 1, "G": 1, "splits": 1}])
def test_finish(compute: str, constants: dict[str, int], arch: int, tmp_path: Path) -> None:
    pointer = f"*{compute}"
    types = {"sums": pointer, "num_pred": "*i64", "num_target": "*i64", "iou": pointer, "union": pointer}
    constants = {**constants, "BLOCK_P": 32, "BLOCK_G": 32}
    check_no_spills(compiled(kernels.soft_iou_finish_kernel, types, constants, kernels.FINISH, arch), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["i64", "i32", "u8", "fp32", "bf16"])
def test_backward(dtype: str, target: str, arch: int, tmp_path: Path) -> None:
    compute = "*fp64" if dtype == "fp64" else "*fp32"
    types = {"weight": compute, "offset": compute, "target": f"*{target}", "out": f"*{dtype}"}
    constants = {"target_stride_x": 1, "LABELS": target.startswith("i")}
    check_no_spills(compiled(kernels.soft_iou_backward_kernel, types, constants, kernels.BACKWARD, arch), tmp_path)
