"""Timing of short calls on a CPU or a CUDA device, for benchmarks and for `bigain_kernels.tune`.

CUDA times come from events on the device. Before each measured call a buffer larger than the L2 cache is overwritten,
so that inputs come from memory, as they do in a model. "eager" brackets the call as Python issues it, launch gaps
included; "graph" replays a CUDA graph of it, which leaves the time of the kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
MODES = ("eager", "graph")
_WARM_SECONDS = 0.004


class Timing(NamedTuple):
    """Microseconds: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def summary(microseconds: Sequence[float]) -> Timing:
    """The three numbers that stand for a list of at least two samples."""
    fifths = statistics.quantiles(microseconds, n=5)
    return Timing(statistics.median(microseconds), fifths[0], fifths[3])


def time_cpu(calls: Mapping[str, Call], seconds: float = 1.0, at_least: int = 5) -> dict[str, Timing]:
    """Wall-clock times of several calls on the CPU, which take turns, so that a disturbance hits all of them.

    In a turn each call runs for some milliseconds, at least once, before the run that counts: its inputs are then as
    near to the processor as the call itself leaves them, and not where another call pushed them.

    Args:
        calls: what to run, by name.
        seconds: about how long to go on.
        at_least: turns to take even when they last longer.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or min(map(len, samples.values())) < at_least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            while time.perf_counter() - start < _WARM_SECONDS:
                call()
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: summary(values) for name, values in samples.items()}


def captured(call: Call) -> Call:
    """A call that replays a CUDA graph of `call`, which must have run before; it keeps the graph's memory alive."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_cuda(call: Call, mode: str = "graph", seconds: float = 0.1, at_least: int = 10) -> Timing:
    """Device times of one call with a cold L2 cache on the current CUDA device.

    Args:
        call: what to run; in mode "graph" it must be capturable.
        mode: "eager" or "graph".
        seconds: about how long to go on.
        at_least: calls to measure even when they last longer.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {MODES}")
    call()
    run = captured(call) if mode == "graph" else call
    device = torch.cuda.current_device()
    buffer = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def samples(count: int) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        for start, end in zip(starts, ends, strict=True):
            buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]

    begin = time.perf_counter()
    samples(3)
    each = (time.perf_counter() - begin) / 3
    return summary(samples(max(at_least, min(1000, int(seconds / each)))))
