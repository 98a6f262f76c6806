"""How long the slots of real plans keep a block of the CUDA merge: `python -m benchmarks.merge_rounds`.

A block works in rounds: each of its 32 groups reads up to 8 members of a part of a slot at a time, and the round ends
with the longest part. Slots of up to `kLongSlot` members are one part, longer ones have parts of 8. Counted for several
numbers of slots in a block, on plans of L-GTM (ratio 0.7) for tokens that vary smoothly over the grid, with noise of
several strengths. token_merge.cuh has the constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bigain_kernels as bk

GROUPS, MOST_PARTS, AHEAD = 32, 32, 8


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


def main() -> None:
    print("| grid, noise | kLongSlot | slots of a block: mean (most) rounds |\n|---|---|---|")
    for grid in ((64, 64), (32, 32)):
        for noise in (0.1, 0.5, 2.0):
            rows = bk.lgtm_plan(tokens(grid, 64, noise), grid, 0.7).sizes().tolist()
            for long_slot in (4, 8, 16, 32):
                found = {slots: [rounds(row, long_slot, slots) for row in rows] for slots in (16, 24, 28, 32)}
                texts = (f"{k}: {sum(m for m, _ in v) / len(v):.2f} ({max(w for _, w in v)})" for k, v in found.items())
                print(f"| {grid[0]} x {grid[1]}, {noise} | {long_slot} | {', '.join(texts)} |")


if __name__ == "__main__":
    main()
