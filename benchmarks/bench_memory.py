"""Peak memory of L-GTM on the CPU, ours against the published algorithm, each in a process of its own.

Linux only: the peak of the resident memory comes from /proc.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import bigain_kernels as bk

from . import published
from .problems import PROBLEMS, RATIO, STRIDE, Problem

TARGET = 3.0
MEASURED = ("sd2_512", "dit_512")
ALGORITHMS = ("kernels", "published")


def once(algorithm: str, problem: Problem, x: torch.Tensor) -> None:
    """Plan, merge and unmerge one time."""
    if algorithm == "published":
        published.lgtm(x, problem.grid, RATIO, STRIDE)
    else:
        plan = bk.lgtm_plan(x, problem.grid, RATIO, STRIDE)
        bk.token_unmerge(bk.token_merge(x, plan), plan)


def resident(field: str) -> float:
    """MiB that /proc/self/status tells: VmRSS is now, VmHWM the peak since it was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak(algorithm: str, name: str) -> float:
    """MiB that one call needs at its peak on top of its input and its output; run it in a fresh process."""
    torch.set_grad_enabled(False)
    problem = PROBLEMS[name]
    # Libraries and thread pools first.
    once(algorithm, problem._replace(grid=(8, 8)), torch.randn(1, 64, problem.channels))
    x = problem.make("cpu", torch.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    once(algorithm, problem, x)
    return resident("VmHWM") - before - x.numel() * x.element_size() / 2**20


def measured(algorithm: str, name: str) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", algorithm, name]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(run.stdout)


def compare() -> list[str]:
    """Print the comparison; returns the targets that were missed."""
    if not Path("/proc/self/clear_refs").exists():
        print("memory: not measured, this system has no /proc/self/clear_refs")
        return []
    missed = []
    for name in MEASURED:
        ours, theirs = (measured(algorithm, name) for algorithm in ALGORITHMS)
        line = f"memory {name}: on top of input and output, kernels {ours:.1f} MiB, published {theirs:.1f} MiB"
        print(f"{line}: {theirs / ours:.2f}x less, target {TARGET:g}x", flush=True)
        if theirs / ours < TARGET:
            missed.append(f"memory {name}: {theirs / ours:.2f}x less than published, target {TARGET:g}x")
    return missed


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak(*sys.argv[1:]))
    else:
        sys.exit(1 if compare() else 0)
