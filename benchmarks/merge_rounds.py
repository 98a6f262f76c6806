"""How long the slots of real plans keep a block of the CUDA merge: `python -m benchmarks.merge_rounds`.

A block works in rounds: each of its 32 groups reads up to 8 members of a part of a slot at a time, and the round ends
with the longest part. Slots of up to `kLongSlot` members are one part, longer ones have parts of 8. Counted for several
numbers of slots in a block, on plans of L-GTM (ratio 0.7) for tokens that vary smoothly over the grid, with noise of
several strengths. token_merge.cuh has the constants.

With --emulate, the kernel itself is counted, built once for each `kLongSlot` and run in the emulator (csrc/emulate):
vectors that the busiest thread of a block reads, mean over blocks, beside those of a thread if all read as many.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import bigain_kernels as bk

GROUPS, MOST_PARTS, AHEAD = 32, 32, 8
CASES = tuple((grid, noise) for grid in ((64, 64), (32, 32)) for noise in (0.1, 0.5, 2.0))
LONG_SLOTS = (4, 8, 16, 32)


def tokens(grid: tuple[int, int], channels: int, noise: float) -> Tensor:
    """(2, N, C): a smooth field, and noise whose strength varies over the grid."""
    generator = torch.Generator().manual_seed(1)
    height, width = grid
    field = torch.randn(2, channels, height // 8 + 2, width // 8 + 2, generator=generator)
    strength = torch.rand(2, 1, height // 8, width // 8, generator=generator)
    resized = [torch.nn.functional.interpolate(each, size=grid, mode="bilinear") for each in (field, strength)]
    x = resized[0] + noise * resized[1] * torch.randn(2, channels, *grid, generator=generator)
    return x.flatten(2).transpose(1, 2).contiguous()


def parts(size: int, long_slot: int) -> list[int]:
    """Members of the parts of a slot."""
    length = long_slot if size <= long_slot else min(long_slot, AHEAD)
    while size > MOST_PARTS * length:
        length *= 2
    return [min(length, size - first) for first in range(0, max(size, 1), length)]


def rounds(sizes: list[int], long_slot: int, slots: int) -> tuple[float, int]:
    """Mean and most rounds of loads of a block."""
    counts = []
    for first in range(0, len(sizes), slots):
        of_block = [part for size in sizes[first : first + slots] for part in parts(size, long_slot)]
        each = (max(of_block[i : i + GROUPS]) for i in range(0, len(of_block), GROUPS))
        counts.append(sum(-(-longest // AHEAD) for longest in each))
    return sum(counts) / len(counts), max(counts)


def busiest(library: Path) -> list[tuple[float, float]]:
    """Vectors of the busiest thread of a block and of all threads on the average, mean over blocks, case by case."""
    torch.ops.load_library(library)
    found = []
    for grid, noise in CASES:
        x = tokens(grid, 64, noise).half()
        plan = bk.lgtm_plan(x, grid, 0.7)
        tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
        before = torch.ops.bigain_emulate.loads()
        torch.ops.bigain_cuda.token_merge(x, *tables, "mean", None)
        whole, most = (after - b for after, b in zip(torch.ops.bigain_emulate.loads(), before, strict=True))
        # 64 channels of 16 bits are eight vectors, one slab of blocks.
        blocks = 2 * -(-plan.num_slots // GROUPS)
        found.append((most / blocks, whole / blocks / (8 * GROUPS)))
    return found


def emulated(long_slot: int, folder: Path) -> Path:
    """A library of the emulated merge alone, with another kLongSlot."""
    sources = shutil.copytree(Path(__file__).parents[1] / "csrc", folder / "csrc")
    for source in (sources / "cuda").glob("*.cu"):
        if source.stem not in ("token_merge", "info"):
            source.unlink()
    header = sources / "include" / "bigain" / "token_merge.cuh"
    text, count = re.subn(r"kLongSlotBits = \d+", f"kLongSlotBits = {long_slot.bit_length() - 1}", header.read_text())
    assert count == 1, "kLongSlotBits is not where it was"
    header.write_text(text)
    library = folder / "_emulated.so"
    command = [sys.executable, str(sources / "build_cuda.py"), "--emulate", "--output", str(library)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return library


def count_emulated() -> None:
    print("| grid, noise | kLongSlot | vectors of the busiest thread | of a thread on the average |\n|---|---|---|---|")
    for long_slot in LONG_SLOTS:
        with tempfile.TemporaryDirectory() as folder:
            # A process can load one library of these ops.
            library = emulated(long_slot, Path(folder))
            command = [sys.executable, "-m", "benchmarks.merge_rounds", "--library", str(library)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        for (grid, noise), line in zip(CASES, lines, strict=True):
            print(f"| {grid[0]} x {grid[1]}, {noise} | {long_slot} | {line} |", flush=True)


def count_rounds() -> None:
    print("| grid, noise | kLongSlot | slots of a block: mean (most) rounds |\n|---|---|---|")
    for grid, noise in CASES:
        rows = bk.lgtm_plan(tokens(grid, 64, noise), grid, 0.7).sizes().tolist()
        for long_slot in LONG_SLOTS:
            found = {slots: [rounds(row, long_slot, slots) for row in rows] for slots in (16, 24, 28, 32)}
            texts = (f"{k}: {sum(m for m, _ in v) / len(v):.2f} ({max(w for _, w in v)})" for k, v in found.items())
            print(f"| {grid[0]} x {grid[1]}, {noise} | {long_slot} | {', '.join(texts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--emulate", action="store_true", help="count in the emulator, which takes a minute")
    parser.add_argument("--library", type=Path, help="an emulated library: print its counts, case by case")
    arguments = parser.parse_args()
    if arguments.library:
        print("\n".join(f"{most:.1f} | {mean:.1f}" for most, mean in busiest(arguments.library)))
    elif arguments.emulate:
        count_emulated()
    else:
        count_rounds()


if __name__ == "__main__":
    main()
