"""The most memory a call held at once, beyond what was there before it.

The kernel's own high-water mark of the process (``VmHWM``, reset through ``/proc/self/clear_refs``) after the C heap
gave back what it had cached: no sampling, so that no peak is missed, and whoever allocates is counted: torch, NumPy,
C++ or Rust. Linux counts pages in per-CPU batches; differences below a quarter of a MiB mean nothing.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_extra(call: Callable[[], object]) -> int | None:
    """Bytes; None where the system has no such mark (no Linux, no glibc, no permission). Warm the call up before."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        gc.collect()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
