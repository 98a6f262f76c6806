"""The shapes that the benchmarks run: self-attention layers of models in use, named by model and resolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RATIO, STRIDE, ALPHA, FACTOR = 0.7, (2, 2), 0.9, 2


class Problem(NamedTuple):
    """One attention layer: B rows of H x W tokens with C channels in `heads` heads.

    `alike` makes all tokens of a row equal, so that one destination attracts every merged source; small integers, whose
    sums are exact in any order.
    """

    name: str
    batch: int
    grid: tuple[int, int]
    channels: int
    heads: int
    alike: bool = False

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def r(self) -> int:
        return int(self.tokens * RATIO)

    @property
    def destinations(self) -> int:
        return (self.grid[0] // STRIDE[0]) * (self.grid[1] // STRIDE[1])

    def make(self, device: str, dtype: torch.dtype) -> Tensor:
        """(B, N, C) random tokens, the same for every call."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.tokens, self.channels)
        if self.alike:
            row = torch.randint(-4, 5, (self.batch, 1, self.channels), generator=generator, device=device)
            return row.expand(shape).to(dtype, memory_format=torch.contiguous_format)
        return torch.randn(shape, generator=generator, device=device).to(dtype)


_ALL = (
    Problem("sd15_512", 2, (64, 64), 320, 8),
    Problem("sd2_512", 2, (64, 64), 320, 5),
    Problem("sd2_768", 2, (96, 96), 320, 5),
    Problem("sdxl_1024", 2, (64, 64), 640, 10),
    Problem("dit_256", 2, (16, 16), 1152, 16),
    Problem("dit_512", 2, (32, 32), 1152, 16),
    Problem("dit_512_b32", 32, (32, 32), 1152, 16),
    Problem("flux_1024", 1, (64, 64), 3072, 24),
    Problem("video_32760", 1, (630, 52), 1536, 12),
    Problem("alike_4096", 2, (64, 64), 320, 5, alike=True),
)
PROBLEMS = {problem.name: problem for problem in _ALL}
# What two CPU cores finish in a few minutes.
DEFAULT = {"cpu": ("sd2_512", "dit_256", "dit_512", "alike_4096"), "cuda": tuple(PROBLEMS)}
# sd15_512 and sd2_512 differ in their heads alone.
SAME_TOKENS = ("sd15_512",)
