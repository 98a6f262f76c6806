"""The CPU kernels against the published algorithm in eager PyTorch, tomesd, and the plain PyTorch of each step.

    python benchmarks/bench_cpu.py [--repeats 30] [--csv benchmarks/results/cpu.csv]

Every kernel is checked against the reference first; a shape whose check fails raises instead of giving numbers. The
candidates of a comparison run in turns, so that a disturbance of the machine hits all of them, and after the checks, so
that eager PyTorch finds its large buffers in the allocator instead of getting them page by page from the system.
"""

# ruff: noqa: T201 (a program that prints its results)

from __future__ import annotations

import argparse
import csv
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import native
from bigain_kernels.testing import assert_close, assert_match_is_best

RATIO, STRIDE, ALPHA = 0.7, (2, 2), 0.9
# Name: batch, grid, channels, and how many times faster than the published algorithm the kernels shall be.
SHAPES = {
    "sd2_512": (2, (64, 64), 320, 2.2),
    "dit_512": (2, (32, 32), 1152, 3.0),
}
SCORE_TARGET, POOL_TARGET, MEMORY_TARGET = 8.0, 2.0, 3.0
# What to run, and how many times faster than it the kernels shall be; None where the project asks for nothing.
Candidate = tuple[Callable[[], object], float | None]
CSV_COLUMNS = [
    *("shape", "step", "candidate", "median_ms", "p20_ms", "p80_ms"),
    *("machine", "torch", "commit", "command"),
]

# ---- The published algorithm, written plainly ---------------------------------------------------------------------


def eager_score(x: Tensor, grid: tuple[int, int], contiguous: bool = False) -> Tensor:
    """L1 norm over channels of a depthwise Laplacian convolution, (B, N).

    The published code convolves a (B, C, H, W) view of the tokens, which PyTorch treats as channels-last and is good
    at; `contiguous` makes it the layout that convolutions usually have.
    """
    batch, _, channels = x.shape
    kernel = x.new_tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
    image = x.transpose(1, 2).reshape(batch, channels, *grid)
    image = image.contiguous() if contiguous else image
    response = F.conv2d(image, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
    return response.abs().sum(1).flatten(1)


def eager_lgtm(x: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """Score, match, plan, merge and unmerge in the way of ToMe for diffusion, with L-GTM's destinations."""
    (batch, n, channels), (height, width), (sy, sx) = x.shape, grid, STRIDE
    tiles = eager_score(x, grid).view(batch, height // sy, sy, width // sx, sx).transpose(2, 3).flatten(3)
    inside = tiles.argmin(-1)
    row = torch.arange(height // sy)[:, None] * sy + inside // sx
    column = torch.arange(width // sx) * sx + inside % sx
    marks = torch.zeros(batch, n, 1, dtype=torch.int64)
    marks.scatter_(1, (row * width + column).flatten(1)[..., None], -1)
    order = marks.argsort(dim=1)
    count = (height // sy) * (width // sx)
    dst_index, src_index = order[:, :count], order[:, count:]

    def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
        c = tokens.shape[-1]
        return tokens.gather(1, src_index.expand(-1, -1, c)), tokens.gather(1, dst_index.expand(-1, -1, c))

    sources, destinations = split(x / x.norm(dim=-1, keepdim=True))
    similarity = sources @ destinations.transpose(1, 2)
    best, position = similarity.max(dim=-1)
    edges = best.argsort(dim=-1, descending=True)[..., None]
    r = int(n * ratio)
    merged, kept = edges[:, :r], edges[:, r:]
    target = position[..., None].gather(1, merged)

    src, dst = split(x)
    unmerged = src.gather(1, kept.expand(-1, -1, channels))
    dst = dst.scatter_reduce(1, target.expand(-1, -1, channels), src.gather(1, merged.expand(-1, -1, channels)), "mean")
    tokens = torch.cat([unmerged, dst], 1)

    unmerged, dst = tokens[:, : n - count - r], tokens[:, n - count - r :]
    out = torch.zeros_like(x)
    out.scatter_(1, dst_index.expand(-1, -1, channels), dst)
    out.scatter_(1, src_index.gather(1, kept).expand(-1, -1, channels), unmerged)
    back = dst.gather(1, target.expand(-1, -1, channels))
    out.scatter_(1, src_index.gather(1, merged).expand(-1, -1, channels), back)
    return out


def eager_pool(x: Tensor, grid: tuple[int, int], alpha: float) -> Tensor:
    """alpha * nearest + (1 - alpha) * average with interpolate and avg_pool2d, 2 x 2."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    nearest = F.interpolate(image, scale_factor=0.5, mode="nearest-exact")
    return (alpha * nearest + (1 - alpha) * F.avg_pool2d(image, 2)).flatten(2).transpose(1, 2).contiguous()


def tomesd_round_trip(x: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """Match, merge and unmerge of the tomesd package with its fixed destinations; it has no score to compute."""
    from tomesd.merge import bipartite_soft_matching_random2d

    height, width = grid
    merge, unmerge = bipartite_soft_matching_random2d(
        x, width, height, STRIDE[1], STRIDE[0], int(x.shape[1] * ratio), no_rand=True
    )
    return unmerge(merge(x))


# ---- The same with the kernels ------------------------------------------------------------------------------------


def kernels_lgtm(x: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    plan = bk.lgtm_plan(x, grid, ratio, STRIDE)
    return bk.token_unmerge(bk.token_merge(x, plan), plan)


def check(x: Tensor, grid: tuple[int, int]) -> None:
    """Every kernel against the reference, and the whole against the eager algorithm above."""
    score = bk.laplacian_score(x, grid)
    destinations = bk.select_destinations(score, grid, STRIDE)
    similarity, match = bk.bipartite_match(x, destinations)
    assert_match_is_best(x, destinations, similarity, match)
    plan = bk.merge_plan(similarity, match, destinations, int(x.shape[1] * RATIO), grid)
    merged = bk.token_merge(x, plan)
    with bk.use_backend("reference"):
        assert_close(score, bk.laplacian_score(x.double(), grid), torch.float32)
        assert torch.equal(destinations, bk.select_destinations(score, grid, STRIDE)), "select_destinations"
        expected = bk.merge_plan(similarity, match, destinations, int(x.shape[1] * RATIO), grid)
        assert torch.equal(plan.slot, expected.slot), "merge_plan"
        assert_close(merged, bk.token_merge(x.double(), plan), torch.float32)
        assert torch.equal(bk.token_unmerge(merged, plan), bk.token_unmerge(merged, expected)), "token_unmerge"
        assert_close(bk.kv_downsample(x, grid, 2, 0.9), eager_pool(x.double(), grid, 0.9), torch.float32)
    with bk.use_backend("cpp"):
        assert_close(bk.kv_downsample(x, grid, 2, 0.9), eager_pool(x.double(), grid, 0.9), torch.float32)
        assert_close(kernels_lgtm(x, grid, RATIO), eager_lgtm(x, grid, RATIO), torch.float32)


def comparisons(x: Tensor, grid: tuple[int, int], target: float) -> dict[str, dict[str, Candidate]]:
    """The candidates of each step; "kernels" is ours."""
    whole: dict[str, Candidate] = {
        "kernels": (lambda: kernels_lgtm(x, grid, RATIO), None),
        "eager": (lambda: eager_lgtm(x, grid, RATIO), target),
    }
    if find_spec("tomesd") is not None:
        whole["tomesd"] = (lambda: tomesd_round_trip(x, grid, RATIO), 1.0)
    return {
        "lgtm": whole,
        "score": {
            "kernels": (lambda: bk.laplacian_score(x, grid), None),
            "conv2d": (lambda: eager_score(x, grid, contiguous=True), SCORE_TARGET),
            "conv2d_view": (lambda: eager_score(x, grid), None),
        },
        "pool": {
            "kernels": (lambda: bk.kv_downsample(x, grid, 2, ALPHA), None),
            "interpolate": (lambda: eager_pool(x, grid, ALPHA), POOL_TARGET),
        },
    }


def timed(candidates: dict[str, Candidate], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run of each candidate, after two rounds to warm up.

    In a round each candidate runs twice and the second run counts: the tokens are then as near to the processor as the
    candidate leaves them, and not where another one pushed them.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 2):
        for name, (run, _) in candidates.items():
            run()
            begin = time.perf_counter()
            run()
            if repeat >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


MEMORY_PROGRAM = """
import sys, torch
sys.path.insert(0, {folder!r})
import bench_cpu as bench

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

torch.set_grad_enabled(False)
batch, grid, channels, _ = bench.SHAPES[{shape!r}]
bench.{function}(torch.randn(1, 64, channels), (8, 8), bench.RATIO)  # libraries and thread pools
x = torch.randn(batch, grid[0] * grid[1], channels)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
bench.{function}(x, grid, bench.RATIO)
print(resident("VmHWM") - before)
"""


def peak_megabytes(shape: str, function: str) -> float | None:
    """Peak resident memory that one call adds, result included, in a process of its own; None where Linux lacks it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    program = MEMORY_PROGRAM.format(folder=str(Path(__file__).parent), shape=shape, function=function)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(run.stdout)


def machine() -> str:
    """Processor, threads and the instruction set of the kernels."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {native.report()}"


def commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    facts = [machine(), torch.__version__, commit(), shlex.join(["python", *sys.argv])]
    print("\n".join(facts))
    rows, missed = [], []
    for shape, (batch, grid, channels, whole_target) in SHAPES.items():
        x = torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))
        check(x, grid)
        for step, candidates in comparisons(x, grid, whole_target).items():
            times = timed(candidates, arguments.repeats)
            ours = statistics.median(times["kernels"])
            for name, (_, target) in candidates.items():
                low, *_, high = statistics.quantiles(times[name], n=5)
                median = statistics.median(times[name])
                rows.append([shape, step, name, *(f"{value:.3f}" for value in (median, low, high)), *facts])
                line = f"{shape:8} {step:6} {name:12} {median:8.2f} ms  ({low:.2f} to {high:.2f})"
                if name != "kernels":
                    line += f"  kernels are {median / ours:.2f}x faster"
                if target is not None:
                    line += f", target {target}x"
                    if median / ours < target:
                        missed.append(f"{shape} {step} against {name}")
                print(line, flush=True)
        ours, theirs = (peak_megabytes(shape, function) for function in ("kernels_lgtm", "eager_lgtm"))
        if ours is not None and theirs is not None:
            line = f"{shape:8} memory at the peak, results included: kernels {ours:.1f} MiB, eager {theirs:.1f} MiB"
            print(f"{line}: {theirs / ours:.2f}x less, target {MEMORY_TARGET}x", flush=True)
            if theirs / ours < MEMORY_TARGET:
                missed.append(f"{shape} memory")
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        is_new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            csv.writer(file).writerows([CSV_COLUMNS, *rows] if is_new else rows)
    print("every target is met" if not missed else f"missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
