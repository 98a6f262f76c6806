"""The launches of the CUDA library at the design's shapes, by the same model as Triton's.

The emulator takes down what the ops launch on a GPU like an H100 (kernel, blocks, threads, shared memory) instead of
running it; the machine code is that of a library built with the lines of its source. How often a loop runs is said
here, loop by loop: `LOOPS` and `SHARES` name statements of the headers by how they begin.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capture import ALPHA, FACTOR, MULTIPROCESSORS, SHAPES, STRIDE, Shape
from .library import cubins, usage
from .model import FROM_HBM, FROM_L2, L2_KEEPS, LAUNCH, LAUNCH_EARLY, SCHEDULERS, Compiled, Walk, predict
from .sass import Code, Function, Instruction, Loop, disassemble
from .table import Row, facts_row
from .trips import Trips

_SHARED_LIMIT = 232_448
_HEADERS = Path(__file__).resolve().parents[2] / "csrc" / "include" / "bigain"
_NAME = re.compile(r"\d([a-z]+(?:_[a-z0-9]+)*_kernel)(.*)")
# Kernels that follow one of ours, and so begin before it has ended; others follow kernels that do not ask for that.
_FOLLOWS = ("bipartite_match_kernel", "merge_plan_kernel", "token_merge_kernel")


class Recorded(NamedTuple):
    """A launch: its kernel by mangled name, which the emulator and the CUDA library have in common."""

    shape: Shape
    op: str
    symbol: str
    blocks: int
    threads: int
    shared: int

    @property
    def kernel(self) -> str:
        match = _NAME.search(self.symbol)
        assert match is not None, self.symbol
        return match[1]

    @property
    def variant(self) -> str:
        match = _NAME.search(self.symbol)
        assert match is not None, self.symbol
        return match[2]


def _calls(shape: Shape) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The calls of a layer, by op, as `capture.calls` makes them; nothing reads what is in the tensors."""
    b, n, c, m = shape.batch, shape.tokens, shape.channels, shape.tokens - shape.removed

    def tokens(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16)

    x, row = tokens(b, n, c), tokens(b, c)
    tables = [torch.empty((b, width), dtype=torch.int32) for width in (n, m + 1, n, m)]
    yield "lgtm_plan", (x, *shape.grid, *STRIDE, shape.removed, -1, 1)
    yield "token_merge", (x, *tables, "mean", None)
    yield "token_unmerge", (tokens(b, m, c), *tables, x, None)
    yield "token_merge_norm", (x, *tables, None, 1e-6, None, None, row, row)
    yield "kv_downsample", ([x, x], *shape.grid, *FACTOR, ALPHA, None)


def record(emulated: Path, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[Recorded]:
    """Every launch at every shape; `emulated` is a library of csrc/build_cuda.py --emulate."""
    torch.ops.load_library(emulated)
    symbols = _symbols(emulated)
    for shape in shapes:
        for op, arguments in _calls(shape):
            torch.ops.bigain_emulate.record(MULTIPROCESSORS, _SHARED_LIMIT)
            try:
                getattr(torch.ops.bigain_cuda, op)(*arguments)
                found = torch.ops.bigain_emulate.recorded()
            finally:
                torch.ops.bigain_emulate.record(0, 0)
            for i in range(0, len(found), 4):
                address, *sizes = found[i : i + 4]
                yield Recorded(shape, op, symbols[address], *sizes)


def _symbols(library: Path) -> dict[int, str]:
    """Functions of a library by address."""
    text = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return {int(parts[0], 16): parts[2] for parts in map(str.split, text.splitlines()) if len(parts) == 3}


class Numbers:
    """What loops run over, of one launch."""

    def __init__(self, launch: Recorded) -> None:
        shape = launch.shape
        self.tokens, self.channels, self.threads = shape.tokens, shape.channels, launch.threads
        self.width, self.height = shape.grid[1], shape.grid[0]
        self.destinations = (shape.grid[0] // STRIDE[0]) * (shape.grid[1] // STRIDE[1])
        self.sources = shape.tokens - self.destinations
        self.slots = shape.tokens - shape.removed
        self.vectors = math.ceil(shape.channels / 8)
        self.lanes = 32 if self.vectors > 64 else 8
        # Scores: vectors of a run, and patches of a block, which 8 threads for every run of a lane compute.
        of_lane = math.ceil(self.vectors / 8)
        run = max(min(math.ceil(of_lane / 6), 3), math.ceil(of_lane / 12))
        runs = math.ceil(of_lane / run)
        self.run, self.patches = of_lane / runs, launch.threads // (8 * runs)
        # Matching: rows and columns of a tile, and what a block has of the pairs of tiles.
        tile = (64, 64) if "SmallTile" in launch.symbol else (128, 128)
        tiles_n = math.ceil(self.destinations / tile[1])
        pairs = math.ceil(self.sources / tile[0]) * shape.batch * tiles_n
        self.pairs = pairs / launch.blocks
        self.runs = max(1.0, self.pairs / tiles_n)
        self.steps_of_tile = math.ceil(shape.channels / 64)
        # Planning: steps of a warp, and warps' worth of tokens of a block.
        self.steps = math.ceil(shape.tokens / launch.threads / 4)
        self.chunks = math.ceil(math.ceil(shape.tokens / 32) / max(launch.blocks // shape.batch, 1))


# How often a loop runs when it is entered, by the beginning of its statement; of kernels whose slots are all short.
LOOPS = {
    r"for \(int step = exists \? 0 : blocks\.order\.run": lambda n: n.run,
    r"for \(int v = lanes?\.lane\(\); v < vectors": lambda n: math.ceil(n.vectors / n.lanes / 4),
    r"for \(int distance = (lanes|lanes\.count\(\)) / 2": lambda n: math.log2(n.lanes),
    r"for \(int first = 0; first < patches": lambda n: 1,
    r"for \(int own = threadIdx\.x; own / kWarp": lambda n: math.ceil(n.patches * 32 / n.threads),
    r"for \(int i = threadIdx\.x; i < blocks\.rows": lambda n: 1,
    r"for \(int (tile_row|j) = 0; \1 < grid\.s[xy]": lambda n: 2,
    r"while \(part < last\)": lambda n: n.runs,
    r"for \(int i = thread; i < p\.num_first": lambda n: math.ceil(n.width / 2 / n.threads),
    r"for \(int i = 0; i < steps; \+\+i\)": lambda n: n.pairs / n.runs * n.steps_of_tile,
    r"for \(int step = 0; step < (share\.)?steps; \+\+step\)": lambda n: n.steps,
    r"for \(int shift = 8": lambda n: 4,
    r"for \(int i = threadIdx\.x; i < kCounters": lambda n: math.ceil(4 * 256 / n.threads),
    r"for \(int begin = first; begin < last": lambda n: n.chunks,
    r"for \(int first = 0, round = 0; first < num_parts": lambda n: 1,
    r"for \(int i = 0; i < count; i \+= kAhead\)": lambda n: 1,
}
# The share of the rounds of a loop in which what stands between two lines of a file runs, by their beginnings.
SHARES = {
    ("bipartite_match.cuh", r"if \(step == steps_of_tile\) \{", r"store_column\(\);"): lambda n: 1 / n.steps_of_tile,
    ("bipartite_match.cuh", r"if \(step % kStepsInCore", r"if \(step == steps_of_tile\) \{"): lambda n: (
        math.ceil(n.steps_of_tile / 4) / n.steps_of_tile
    ),
    ("bipartite_match.cuh", r"if \(fetch_step == 0\) \{", r"// Rows kStep apart"): lambda n: 1 / n.steps_of_tile,
    # As are slots of more than 32 members, as benchmarks/merge_rounds.py counts.
    ("token_merge.cuh", r"if \(any_long\) \{", r"for \(int first = 0, round = 0"): lambda n: 0,
    ("token_merge.cuh", r"__device__ __forceinline__ MergePart part_of_slot", r"// How many parts"): lambda n: 0,
    ("token_merge.cuh", r"done = done && exists;", r"if \(!done \|\|"): lambda n: 0,
    # Keys that tie, of which some merge and some do not, are rare.
    ("plan_steps.cuh", r"if \(left == there\) return", r"return \{threshold, found\[3\]\};"): lambda n: 0,
}
# What some warps of a block do while the others wait for them, and how many.
ALONE = {
    ("plan_steps.cuh", r"constexpr int kQuads", r"// Which keys are chosen"): lambda n: 1,
    ("plan_steps.cuh", r"if \(share\.warp > 0\) return;", r"// ---- launchers"): lambda n: 1,
    # Sums of a patch are added by a warp; 32 tokens choose their tiles' destinations in one.
    ("laplacian_score.cuh", r"// Eight lanes add four", r"__syncthreads\(\);"): lambda n: n.patches,
    ("laplacian_score.cuh", r"if \(!blocks\.select\) return;", r"// Patches that"): lambda n: math.ceil(n.patches / 4),
}


@functools.cache
def _source(name: str) -> list[str]:
    path = _HEADERS / name
    return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []


class CudaWalk(Walk):
    """A warp's way through a kernel of the library."""

    def __init__(self, function: Function, launch: Recorded, latency: int) -> None:
        self.numbers = Numbers(launch)
        nothing = Trips(Counter(), Counter(), Counter(), {}, set())
        super().__init__(function, nothing, math.ceil(launch.threads / 32), latency)

    def repeats(self, loop: Loop, among: Code) -> float:
        for name, line in loop.place:
            text = _source(name)[line - 1] if _source(name) else ""
            for beginning, count in LOOPS.items():
                if re.match(beginning, text):
                    return self.unrolled(loop, among, float(count(self.numbers)))
        return 1.0

    def share(self, each: Instruction, times: float) -> float:
        for (name, first, last), share in SHARES.items():
            if _stands_between(each, name, first, last):
                return float(share(self.numbers))
        return self.alone(each) / self.warps

    def alone(self, each: Instruction) -> float:
        """How many warps of the block run an instruction: all of them, or those that the others wait for."""
        for span, warps in ALONE.items():
            if _stands_between(each, *span):
                return min(float(warps(self.numbers)), self.warps)
        return self.warps

    def issue(self, each: Instruction, share: float) -> None:
        if (warps := self.alone(each)) == self.warps:
            super().issue(each, share)
            return
        pace, self.pace = self.pace, max(warps / SCHEDULERS, 1.0)
        super().issue(each, 1.0)
        self.pace = pace


def _stands_between(each: Instruction, name: str, first: str, last: str) -> bool:
    return any(file == name and _between(name, first, last, line) for file, line in each.place)


@functools.cache
def _between(name: str, first: str, last: str, line: int) -> bool:
    lines = _source(name)
    begin = next(i for i, text in enumerate(lines, 1) if re.match(first, text))
    end = next(i for i, text in enumerate(lines, 1) if i > begin and re.match(last, text))
    return begin < line < end


def _usual(function: Function) -> Function:
    """A kernel without what stands behind its last EXIT: divisions of subnormals, warps that have come apart."""
    end = max(each.address for each in function.instructions if each.kind == "EXIT" and not each.predicate)
    return Function(function.name, [each for each in function.instructions if each.address <= end])


def _bytes(launch: Recorded) -> int:
    """Bytes of the tensors of a launch, each once."""
    s = launch.shape
    n, m, tokens = s.tokens, s.tokens - s.removed, s.batch * s.tokens * s.channels * 2
    merged, row = tokens * m // n, s.batch * n
    pooled = tokens // (FACTOR[0] * FACTOR[1])
    return {
        "laplacian_score_kernel": tokens + 20 * row,
        "bipartite_match_kernel": tokens + 16 * row,
        "merge_plan_kernel": 16 * row + 8 * s.batch * m,
        "token_merge_kernel": tokens + merged + 4 * row + 4 * s.batch * m,
        "row_moments_kernel": tokens + 8 * row,
        "token_unmerge_kernel": 2 * tokens + merged + 4 * row,
        "kv_downsample_kernel": 2 * (tokens + pooled),
    }[launch.kernel]


def rows(library: Path, emulated: Path, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[Row]:
    """A row for every launch at every shape, for sm_90.

    Args:
        library: a library of csrc/build_cuda.py with --lines, for sm_90 among others.
        emulated: one with --emulate.
    """
    functions = {name: found for cubin in cubins(library) for name, found in functions_of(cubin).items()}
    for launch in record(emulated, shapes):
        yield row(launch, *functions[launch.symbol])


def functions_of(cubin: bytes) -> dict[str, tuple[Function, tuple[int, int, int]]]:
    """The kernels of a cubin by mangled name; of each its code and its registers, local and static shared memory."""
    of_kernel = usage(cubin)
    return {name: (_usual(function), of_kernel[name]) for name, function in disassemble(cubin).items()}


def row(launch: Recorded, function: Function, used: tuple[int, int, int]) -> Row:
    """What is predicted of a launch of such a kernel."""
    registers, spills, static = used
    hbm_bytes = _bytes(launch)
    walk = CudaWalk(function, launch, FROM_HBM if hbm_bytes > L2_KEEPS else FROM_L2)
    compiled = Compiled(function, registers, spills, static + launch.shared, math.ceil(launch.threads / 32))
    start = LAUNCH_EARLY if launch.kernel in _FOLLOWS else LAUNCH
    facts = predict(compiled, walk, launch.blocks, hbm_bytes, start)
    facts.assumed = launch.kernel == "token_merge_kernel"
    kernel = launch.kernel.removesuffix("_kernel")
    head = {"shape": launch.shape.name, "op": launch.op, "kernel": kernel, "config": {"variant": launch.variant}}
    return facts_row({**head, "grid": [launch.blocks]}, facts)
