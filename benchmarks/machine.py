"""The CPU that a benchmark runs on: what it is, what it can do, and whether it is left alone."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

# Instruction sets that the kernels of this package or of PyTorch choose by.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16")
ARM_FLAGS = ("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2")
# A core that others use for more than this share of the time is not quiet.
QUIET = 0.97
_ROUNDS = 200_000


class Spin(NamedTuple):
    """What threads that only count got.

    Attributes:
        share: of the time that all threads were asked for, the part that the system gave them; 1 when nobody else runs.
        milliseconds: how long the slowest took for its fixed work; grows when the clock slows down as well.
        load: runnable processes over the last minute, as the system counts them, this one included.
    """

    share: float
    milliseconds: float
    load: float

    @property
    def is_quiet(self) -> bool:
        return self.share >= QUIET

    def __str__(self) -> str:
        verdict = "quiet" if self.is_quiet else "NOT QUIET, times are worth little"
        return f"{verdict}: {100 * self.share:.0f} % of the cores to spare, load {self.load:.2f}"


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Those of the processor's flags that the kernels choose by; empty where the system does not list them."""
    info = _cpuinfo()
    listed = set(info.get("flags", info.get("Features", "")).split())
    return [flag for flag in (*FLAGS, *ARM_FLAGS) if flag in listed]


def spin(threads: int | None = None, rounds: int = _ROUNDS) -> Spin:
    """Give each of the threads (those of torch by default) the same fixed work, at once, and see what it gets."""

    def work(_: int) -> tuple[float, float]:
        wall, own = time.perf_counter(), time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"spin", b"salt", rounds)  # releases the lock of the interpreter
        return time.perf_counter() - wall, time.thread_time() - own

    count = threads or torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:
        times = list(pool.map(work, range(count)))
    wall, own = (sum(column) for column in zip(*times, strict=True))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return Spin(min(own / wall, 1.0), 1e3 * max(time for time, _ in times), load)
