"""What the compilers made of the kernels, read without a GPU: a table, and JSON with ``--out``.

    PYTHONPATH=benchmarks python -m gpu.machine_code
    PYTHONPATH=benchmarks python -m gpu.machine_code --archs 90 --kernels lstm_gates --sass

Registers, spills and shared memory are those that ``cuobjdump`` reports; the occupancy follows from them. Instructions
are counted in the listing, without the padding: the code of ``lstm_gates`` is straight, the others have loops.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from fastris.kernels import convlstm, lstm_gates, soft_iou
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastris import backend
from fastris.imageio import atomic_write

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
MULTIPLES = {"N", "H", "W", "split_size", *(f"{one}_stride_{axis}" for one in ("pred", "target") for axis in "bpg")}
"""Arguments that are multiples of 16 where a side of the map is, which the compiler is told."""
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor


@dataclass
class Kernel:
    """One compiled kernel.

    Attributes:
        registers: of a thread; ``spilled`` its bytes of stack.
        shared: bytes of a program.
        warps: resident on a multiprocessor of 64.
        loads, stores: global ones in instructions of 128 bits, and in narrower ones; ``copies`` go to shared memory.
        products: tensor-core instructions, HGMMA or HMMA.
        instructions: all.
    """

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int
    loads: tuple[int, int]
    stores: tuple[int, int]
    copies: int
    products: int
    instructions: int


def occupancy(arch: int, registers: int, shared: int, warps_of_block: int) -> int:
    """Resident warps: registers go by 8 a thread, and a block takes 1 KiB of shared memory for itself."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // warps_of_block
    by_memory = SHARED_BYTES[arch] // (shared + 1024)
    return warps_of_block * min(by_registers, by_memory, BLOCKS, WARPS // warps_of_block)


def kernel_of(name: str, arch: int, registers: int, spilled: int, shared: int, warps: int, sass: str) -> Kernel:
    code = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", sass, re.MULTILINE)
    used = [one for one in code if one != "NOP"]

    def count(name: str, wide: bool) -> int:
        return sum(one.split(".")[0] == name and ("128" in one) == wide for one in used)

    return Kernel(
        name, arch, registers, spilled, shared, occupancy(arch, registers, shared, warps),
        (count("LDG", True), count("LDG", False)), (count("STG", True), count("STG", False)),
        sum(one.startswith("LDGSTS") for one in used), sum("GMMA" in one or one.startswith("HMMA") for one in used),
        len(used),
    )  # fmt: skip


def compile_triton(
    kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], options: dict[str, int]
) -> Any:
    """As a call with aligned pointers and sides and strides that are multiples of 16 compiles it."""
    names = kernel.arg_names
    constants = constants | {name: value for name, value in options.items() if name in names}
    options = {name: value for name, value in options.items() if name not in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in MULTIPLES
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def of_gates() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        tensors = ("gates", "addend", "hidden", "d_hidden", "d_gates", "cell_prev", "cell", "d_cell", "d_cell_prev")
        types = dict.fromkeys(tensors, f"*{dtype}")
        constants = {"C": 64, **lstm_gates.tile_of(64, size), "bias": None, "peephole": None}
        options = {"num_warps": lstm_gates.NUM_WARPS}
        yield f"lstm_gates {dtype}", lstm_gates.lstm_gates_kernel, types, constants, options
        constants = {**constants, "d_sum": None}
        yield f"lstm_gates backward {dtype}", lstm_gates.lstm_gates_backward_kernel, types, constants, options


def of_convlstm() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    narrow = ("hidden_prev", "weight", "hidden", "gates", "d_hidden", "d_gates")
    for dtype, size, precision in (("bf16", 2, "ieee"), ("fp32", 4, "tf32")):
        types = {**dict.fromkeys(narrow, f"*{dtype}"), "d_sum": "*fp32"}
        types |= dict.fromkeys(("addend", "cell_prev", "cell", "d_cell", "d_cell_prev"), "*fp32")
        for channels in (32, 64):
            for backward in (False, True):
                kernel = convlstm.conv_gates_backward_kernel if backward else convlstm.conv_gates_kernel
                constants = {"C": channels, "K": convlstm.padded(channels), "PRECISION": precision}
                constants |= {"bias": None, "peephole": None, **({} if backward else {"gates": None})}
                tile = convlstm.tile_of(channels, size, precision, False, backward)
                name = f"conv + gates {'backward ' if backward else ''}C{channels} {dtype}"
                yield name, kernel, types, constants, {**tile, **convlstm.OPTIONS}


def of_soft_iou() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    blocks = {"BLOCK_P": soft_iou.block_of(22), "BLOCK_G": soft_iou.block_of(20)}
    none = {"num_pred": None, "num_target": None}
    for dtype, narrow in (("fp32", False), ("bf16", True)):
        for labels in (False, True):
            types = {"pred": f"*{dtype}", "target": "*i64" if labels else f"*{dtype}", "sums": "*fp32"}
            constants = {"pred_stride_x": 1, "target_stride_x": 1, "LABELS": labels, "NARROW": narrow, **blocks, **none}
            options = soft_iou.sums_options(2 if narrow else 4, True, sum(blocks.values()))
            yield (
                f"soft_iou sums {'labels ' if labels else ''}{dtype}",
                soft_iou.soft_iou_sums_kernel,
                types,
                constants,
                options,
            )
    types = dict.fromkeys(("sums", "iou", "union"), "*fp32")
    constants = {"BLOCK_G": blocks["BLOCK_G"], "BLOCK_S": soft_iou.MOST_SPLITS, **none}
    yield "soft_iou finish", soft_iou.soft_iou_finish_kernel, types, constants, soft_iou.FINISH
    types = {"weight": "*fp32", "offset": "*fp32", "target": "*i64", "out": "*fp32"}
    constants = {"target_stride_x": 1, "LABELS": True}
    yield "soft_iou backward labels", soft_iou.soft_iou_backward_kernel, types, constants, soft_iou.BACKWARD


def dump(path: Path, *options: str) -> str:
    return subprocess.run([TOOL, *options, path], capture_output=True, text=True, check=True).stdout


def inspect_triton(arch: int, wanted: str, show: bool) -> Iterator[Kernel]:
    for name, kernel, types, constants, options in (*of_gates(), *of_convlstm(), *of_soft_iou()):
        if wanted not in name:
            continue
        binary = compile_triton(kernel, arch, types, constants, options)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(binary.asm["cubin"])
            usage, sass = dump(cubin, "-res-usage"), dump(cubin, "-sass")
        if show:
            print(sass)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        yield kernel_of(
            name, arch, int(found[1]), int(found[2]), binary.metadata.shared, binary.metadata.num_warps, sass
        )


def inspect_assignment(arch: int, wanted: str, show: bool) -> Iterator[Kernel]:
    """The four kernels in the extension, for a warp or a block a matrix. Their shared memory depends on the matrix."""
    if wanted not in "assignment" or not backend.cuda_archs():
        return
    extension = Path(str(backend.extension_path()))
    usage = dump(extension, "-res-usage", "-arch", f"sm_{arch}")
    for symbol, registers, stack in re.findall(r"Function (\S*assignment_kernel\S*):\s*REG:(\d+) STACK:(\d+)", usage):
        sass = dump(extension, "-sass", "-arch", f"sm_{arch}", "-fun", symbol)
        if show:
            print(sass)
        threads, dtype = re.findall(r"ILi(\d+)E([fd])", symbol)[0]
        name = f"assignment, {threads} threads a matrix, {'fp32' if dtype == 'f' else 'fp64'}"
        yield kernel_of(name, arch, int(registers), int(stack), 0, 4, sass)


HEADER = (
    "kernel", "sm", "registers", "spilled", "shared, KiB", "warps of 64", "128-bit loads", "stores", "other loads",
    "stores", "copies to shared", "HGMMA / HMMA", "instructions",
)  # fmt: skip


def table(kernels: list[Kernel]) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
    for one in kernels:
        (wide_loads, loads), (wide_stores, stores) = one.loads, one.stores
        numbers = (
            one.arch,
            one.registers,
            one.spilled,
            round(one.shared / 1024, 1),
            one.warps,
            wide_loads,
            wide_stores,
        )
        lines.append((one.name, *map(str, (*numbers, loads, stores, one.copies, one.products, one.instructions))))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90], choices=[80, 90])
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--sass", action="store_true", help="print the machine code too")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if shutil.which(TOOL) is None:
        print(f"no {TOOL}", file=sys.stderr)
        return 2
    found: list[Kernel] = []
    for arch in arguments.archs:
        found += inspect_triton(arch, arguments.kernels, arguments.sass)
        found += inspect_assignment(arch, arguments.kernels, arguments.sass)
    print(table(found))
    if arguments.out:
        result = {"triton": triton.__version__, "kernels": [asdict(one) for one in found]}
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
