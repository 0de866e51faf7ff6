"""Times on a GPU beside a floor and beside peers, and the rehearsal of all that on a CPU.

Times are those of the device, between CUDA events: a kernel that sleeps lets the host get ahead, so that what a launch
costs it does not count unless it costs more than the sleep, and the L2 cache is overwritten before each call. On a CPU,
where these numbers mean nothing, the same code runs with small inputs and the host's clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastris
from fastris.imageio import atomic_write
from interleave import spread

MICRO = 1e6
SLEEP_CYCLES = 1_000_000  # about 0.6 ms
FLUSHED_BYTES = 2**28  # four times the L2 cache of an H200
LONG = 5e-3  # seconds: what takes longer is called less often, and needs no sleep

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error beside fp64, relative to the largest value of the tensor."""


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass
class Peer:
    """What a contestant does. ``make`` prepares it, untimed, and returns the call; it may raise :class:`Absent`."""

    make: Callable[[], Callable[[], Any]]
    on_host: bool = False  # it waits for the device by itself


@dataclass
class Row:
    """One kernel on one input, beside its floor and its peers.

    Attributes:
        kernel: what, and on what.
        microseconds: quartiles, or None where it is ``wrong``.
        wrong: what differs from the reference; empty where nothing does.
        floor: microseconds that the hardware needs at least, and ``floor_of`` why.
        peers: by name their quartiles, or a text: "absent: …" or "wrong: …".
        targets: what is asked for, with whether it is met, or None where that cannot be said.
    """

    kernel: str
    microseconds: Sequence[float] | None = None
    wrong: str = ""
    floor: float = 0.0
    floor_of: str = ""
    peers: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, bool | None] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return self.microseconds[1] if self.microseconds else float("nan")

    def best_peer(self) -> tuple[str, float] | None:
        """The quickest one, and how many times as long it takes."""
        timed = {name: result[1] / self.median for name, result in self.peers.items() if not isinstance(result, str)}
        return min(timed.items(), key=lambda item: item[1]) if timed and self.microseconds else None

    def within_floor(self, share: float) -> None:
        """Ask for at least this share of what the floor allows."""
        self.targets[f"{share:.0%} of the floor"] = self.floor >= share * self.median if self.microseconds else None

    def at_most(self, microseconds: float) -> None:
        self.targets[f"≤ {microseconds:g} µs"] = self.median <= microseconds if self.microseconds else None

    def ahead_of(self, peer: str, times: float = 1.0) -> None:
        """Ask for a peer to take at least so many times as long."""
        result = self.peers.get(peer)
        known = self.microseconds is not None and result is not None and not isinstance(result, str)
        self.targets[f"{times:g}× {peer}"] = result[1] >= times * self.median if known else None


class Harness:
    """A device, its clock and its floors; collects the rows of a part in a JSON file, whole after every row."""

    def __init__(self, part: str, out: Path, device: str, tiny: bool) -> None:
        self.part, self.tiny = part, tiny
        self.device = torch.device(device)
        self.path = out / f"{part}.json"
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        self.finished = False
        self._write()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    # Clock

    def time(self, call: Callable[[], Any], on_host: bool = False, flush: bool = True) -> Sequence[float]:
        """Quartiles of the microseconds of a call that has been warmed up."""
        start = time.perf_counter()
        call()
        self.synchronize()
        seconds = time.perf_counter() - start
        if not self.cuda:
            return spread([MICRO * self._host_seconds(call) for _ in range(2)])
        calls = 50 if seconds < LONG else max(7, min(50, int(0.5 / seconds)))
        if on_host or seconds > LONG:
            return spread([MICRO * self._host_seconds(call) for _ in range(calls)])
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for begin, end in events:
            if flush:
                self._flushed.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return spread([1e3 * begin.elapsed_time(end) for begin, end in events])

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _host_seconds(self, call: Callable[[], Any]) -> float:
        if self.cuda:
            self._flushed.zero_()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    @cached_property
    def _flushed(self) -> Tensor:
        return torch.empty(FLUSHED_BYTES // 4, device=self.device)

    # Floors

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        source = torch.empty(2**18 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate = 2 * source.numel() / self.time(lambda: target.copy_(source))[1] * MICRO
        self.facts["copy_bytes_per_second"] = rate
        return rate

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large matrix product; fp32 as TF32, which is what cuDNN's convolutions use."""
        size = 128 if self.tiny else 8192
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            rate = 2 * size**3 / self.time(lambda: a @ b)[1] * MICRO
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        self.facts[f"matmul_flop_per_second_{str(dtype).removeprefix('torch.')}"] = rate
        return rate

    def byte_floor(self, row: Row, count: float) -> None:
        row.floor, row.floor_of = count / self.copy_rate * MICRO, f"{count / 1e6:.3g} MB at the rate of a copy"

    def flop_floor(self, row: Row, count: float, dtype: torch.dtype) -> None:
        row.floor = count / self.matmul_rate(dtype) * MICRO
        row.floor_of = f"{count / 1e9:.3g} GFLOP at the rate of a matrix product"

    # Rows

    def measure(
        self,
        kernel: str,
        call: Callable[[], Any],
        check: Callable[[Any], str],
        peers: Mapping[str, Peer],
        targets: Callable[[Row], None] = lambda row: None,
        floor: Callable[[Row], None] = lambda row: None,
        on_host: bool = False,
    ) -> Row:
        """Check, then time a kernel and its peers; nobody whose answer is wrong is timed.

        ``check`` takes what a call returns and says what is wrong with it. The targets are judged after every peer, so
        that a part that runs out of time leaves what it had.
        """
        row = Row(kernel)
        self.rows.append(row)
        floor(row)
        try:
            row.wrong = check(call())
            row.microseconds = None if row.wrong else self.time(call, on_host)
        except Exception as error:  # the other rows are still worth having
            row.wrong = _said(error)
        targets(row)
        self._write()
        for name, peer in peers.items():
            row.peers[name] = self._time_peer(peer, check)
            targets(row)
            self._write()
        print(f"  {kernel}: {row.median:.4g} µs {row.wrong}", file=sys.stderr, flush=True)
        return row

    def _time_peer(self, peer: Peer, check: Callable[[Any], str]) -> Any:
        try:
            call = peer.make()
            fault = check(call())
            return f"wrong: {fault}" if fault else self.time(call, peer.on_host)
        except Absent as error:
            return f"absent: {error}"
        except Exception as error:
            return f"absent: {_said(error)}"

    def finish(self) -> None:
        self.finished = True
        self._write()

    def _write(self) -> None:
        result = {
            "part": self.part,
            "finished": self.finished,
            "command": f"python -m gpu.measure {self.part}",
            "tiny": self.tiny,
            "device": torch.cuda.get_device_name(self.device)
            if self.cuda
            else "CPU, a rehearsal: the times mean nothing",
            "nvidia_smi": nvidia_smi() if self.cuda else {},
            "fastris": fastris.info(),
            "facts": self.facts,
            "rows": [asdict(row) for row in self.rows],
        }
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks in MHz, power and temperature now; empty without nvidia-smi."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in text.split(",")), strict=False))


def compiled(harness: Harness, function: Callable[..., Any], arguments: Sequence[Any], mode: str = "default") -> Peer:
    """A function under torch.compile."""

    def make() -> Callable[[], Any]:
        if harness.tiny:
            raise Absent("no compilation in a rehearsal")
        torch._dynamo.reset()
        fast = torch.compile(function, mode=mode, dynamic=False)
        return lambda: fast(*arguments)

    return Peer(make)


def ready(call: Callable[[], Any], on_host: bool = False) -> Peer:
    """A contestant that needs no preparation."""
    return Peer(lambda: call, on_host)


def off_by(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str:
    """Which result differs from the truth by more than a share of its largest value; empty if none does."""
    for number, (value, expected) in enumerate(zip(found, truth, strict=True)):
        off = float((value.detach().double() - expected.double()).abs().max() / expected.double().abs().max())
        if not off <= tolerance:  # nor is NaN
            return f"result {number} is off by {off:.1e} of its largest value"
    return ""
