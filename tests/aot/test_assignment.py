"""The CUDA kernels of assignment as they were compiled: registers and spills, read without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastris import backend

MOST_REGISTERS = 128  # launch bounds: four blocks of 128 threads on a multiprocessor


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    beside_triton = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return found or (str(beside_triton) if beside_triton and beside_triton.is_file() else None)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_kernels_do_not_spill(arch: str) -> None:
    if not backend.cuda_archs():
        pytest.skip("fastris._C is built without CUDA kernels")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with triton")
    command = [tool, "-res-usage", "-arch", arch, str(backend.extension_path())]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S*assignment_kernel\S*):\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert len(kernels) == 4, text  # a warp and a block, fp32 and fp64
    for name, registers, stack, local in kernels:
        assert (int(stack), int(local)) == (0, 0), f"{name} spills"
        assert int(registers) <= MOST_REGISTERS, name
