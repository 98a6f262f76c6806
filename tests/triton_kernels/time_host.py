"""How long a layer's calls take on the host: `python -m tests.triton_kernels.time_host [--through-triton]`.

Plan, merge and unmerge of 2 x 4,096 tokens of 320 channels in bfloat16, through the public functions, on a machine
without a GPU: Triton and its launchers as they are, on a libcuda that does nothing (libcuda_stub.c). Tokens are on the
CPU; memory is kept by the process, as PyTorch does on a GPU, in place of going back to the system at each call.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

import bigain_kernels as bk
from bigain_kernels import backends, methods
from bigain_kernels.triton_kernels import configs, direct
from bigain_kernels.triton_kernels.report.capture import MULTIPROCESSORS

from .stub_driver import stub_driver

GRID, RATIO, CHANNELS = (64, 64), 0.7, 320
# glibc's malloc: from which size memory comes from the system by itself, and what it may keep.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}


def median(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median and 20th percentile of a call's times, in microseconds."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times), sorted(times)[len(times) // 5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--through-triton", action="store_true", help="launch all kernels by Triton's own binding")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    options = parser.parse_args()
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    configs._multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[assignment]
    if options.through_triton:
        direct.reason = lambda: "asked for"  # type: ignore[assignment]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(stub_driver(Path(folder)))
        stack.enter_context(backends.registered(backends.get("triton")._replace(devices=("cpu",), priority=100)))
        stack.enter_context(torch.no_grad())
        x = torch.randn(2, GRID[0] * GRID[1], CHANNELS).to(torch.bfloat16)
        plan = methods.lgtm_plan(x, GRID, RATIO)
        y = bk.token_merge(x, plan)

        def layer() -> torch.Tensor:
            plan = methods.lgtm_plan(x, GRID, RATIO)
            return bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x)

        calls = {
            "plan": lambda: methods.lgtm_plan(x, GRID, RATIO),
            "merge": lambda: bk.token_merge(x, plan),
            "unmerge": lambda: bk.token_unmerge(y, plan, residual=x),
            "all three": layer,
        }
        layer()
        gc.disable()
        how = f"by Triton, {direct.reason()}" if direct.reason() else "direct"
        sys.stdout.write(f"launches {how}; medians (20th percentiles)\n")
        for name, call in calls.items():
            sys.stdout.write("{:10} {:6.1f} us ({:.1f})\n".format(name, *median(call, options.seconds)))


if __name__ == "__main__":
    main()
