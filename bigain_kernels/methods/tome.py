"""Token merging for Stable Diffusion (ToMe), Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_window
from ..plan import MergePlan
from ..tokens import share_mean, tile_tokens
from ._common import check_random, counter_random, match_and_plan
from ._video import Grid, check_video, plan_frames
from .config import MergeConfig
from .options import Choice, Count, Window, option

DESTINATIONS = ("random", "first")
_STREAM = 1


def tome_destinations(
    rows: int,
    grid: tuple[int, int],
    stride: tuple[int, int],
    destinations: str,
    seed: int,
    timestep: Tensor | None,
    device: torch.device,
    frames: int = 1,
) -> Tensor:
    """One token of each sy x sx tile: a random one, or the first (top-left); (rows * frames, D) int32, ascending."""
    tiles = (frames, grid[0] // stride[0], grid[1] // stride[1])
    if destinations == "first":
        inside = torch.zeros((1, *tiles), dtype=torch.int64, device=device)
    else:
        random = counter_random(seed, timestep, tiles[0] * tiles[1] * tiles[2], _STREAM, device)
        inside = (random * (stride[0] * stride[1]) >> 32).unflatten(1, tiles)
    chosen = tile_tokens(inside.flatten(0, 1), grid, stride).unflatten(0, (-1, frames))
    return chosen.expand(rows, -1, -1).flatten(0, 1).contiguous()


def tome_plan(
    x: Tensor,
    grid: Grid,
    ratio: float,
    stride: tuple[int, int] = (2, 2),
    *,
    destinations: str = "random",
    seed: int = 0,
    timestep: Tensor | None = None,
    window: int | tuple[int | None, int] | None = None,
    share_plan: int | None = None,
) -> MergePlan:
    """Plan of ToMe: destinations by position, not by content.

    Random destinations come from a generator of this function's own, a hash of (seed, timestep of the row, tile): equal
    arguments give equal destinations, rows of one timestep have the same ones whatever else is in the batch, and no
    random state of torch is read or changed. The published code draws once per call from a generator that moves on.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N, or of a video (T, H, W); see `lgtm_plan`.
        ratio: fraction of tokens removed, 0 to `max_ratio(grid, stride)`.
        stride: (sy, sx), the size of a tile in tokens.
        destinations: "random", one random token of each tile, or "first", the top-left one.
        seed: any integer; read with "random" only.
        timestep: (B,) timesteps that vary the random pattern, or None; read with "random" only. Rows that share a plan
            take that of the first of them.
        window: compare only with destinations of tiles at most this many tiles away; None compares with all. In a video
            those are of the same frame, and with (tiles, frames) of those at most so many frames away too.
        share_plan: k rows share one plan, made from their mean: batch row b uses plan row b mod (B / k).

    Returns:
        MergePlan with B rows (B / k with `share_plan`) and N - int(N * ratio) slots.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio, stride, destinations, timestep, window or
            share_plan.
    """
    frames, frame, stride, r, share = check_video(x, grid, ratio, stride, share_plan)
    tiles, _ = check_window(window)
    check_choice("destinations", destinations, DESTINATIONS)
    seed, timestep = check_random(seed, timestep, x, share)
    x = share_mean(x, share)
    chosen = tome_destinations(x.shape[0], frame, stride, destinations, seed, timestep, x.device, frames or 1)
    if frames is None:
        return match_and_plan(x, chosen, r, frame, stride, tiles)
    return plan_frames(x, chosen, r, frames, frame, stride, window)


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MergeConfig):
    """Token merging for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604); see `bigain_kernels.tome_plan`.

    Args:
        destinations: "random" tokens of the tiles, or the "first", which is top left. Random ones are drawn anew in
            every block and at every timestep, the same for all rows of a timestep.
        seed: of the random destinations.
        window: compare a source only with destinations of tiles at most this many tiles away; by default with all. In a
            video those are of its own frame. (TILES, FRAMES) compares with frames at most so many away too, and TILES
            may be None for all of such a frame; then all tokens of a video are ranked together.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "tome"

    destinations: str = option("random", Choice(DESTINATIONS))
    seed: int = option(0, Count())
    window: int | tuple[int | None, int] | None = option(None, Window())

    @property
    def is_random(self) -> bool:
        return self.destinations == "random"

    @property
    def spans_frames(self) -> bool:
        return check_window(self.window)[1] > 0

    def plan(self, x: Tensor, grid: Grid, ratio: float, timestep: Tensor | None = None) -> MergePlan:
        return tome_plan(
            x,
            grid,
            ratio,
            self.stride,
            destinations=self.destinations,
            seed=self.seed,
            timestep=timestep,
            window=self.window,
            share_plan=self.share_plan,
        )
