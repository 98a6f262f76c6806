"""Similarity-based token pruning (SiTo), Zhang et al., AAAI 2025."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from ..ops import select_destinations
from ..ops.token_merge import MODES
from ..plan import MergePlan
from ..tokens import share_mean
from ._common import check_method, check_random, counter_random, match_and_plan
from .config import MergeConfig
from .options import Choice, Count, Number, option

_STREAM = 2


def _gaussian(seed: int, timestep: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Standard normal numbers from the counter-based generator (Box-Muller); (B or 1, n) float32."""
    first, second = (
        # The middle of each of 2**24 cells: exact in float32 and never 0, whose logarithm is infinite.
        ((counter_random(seed, timestep, n, _STREAM + i, device) >> 8).float() + 0.5) / 2**24
        for i in range(2)
    )
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


def sito_plan(
    x: Tensor,
    grid: tuple[int, int],
    ratio: float,
    stride: tuple[int, int] = (2, 2),
    *,
    noise: float = 0.1,
    seed: int = 0,
    timestep: Tensor | None = None,
    share_plan: int | None = None,
) -> MergePlan:
    """Plan of SiTo: each tile keeps its most representative token, the tokens most similar to one of those are pruned.

    A token's score is its mean cosine similarity to all tokens plus Gaussian noise; since it is linear, it is the dot
    product with the mean of the unit tokens and needs no N x N matrix. The highest score of each tile becomes a base
    token. Use the plan with `token_merge(..., mode="prune")`. Source: Zhang et al., "Training-Free and
    Hardware-Friendly Acceleration for Diffusion Models via Similarity-based Token Pruning", AAAI 2025.

    Args:
        x: (B, N, C) hidden states in raster order.
        grid: (H, W) with H * W = N.
        ratio: fraction of tokens removed, 0 to `max_ratio(grid, stride)`.
        stride: (sy, sx), the size of a tile in tokens.
        noise: standard deviation of the noise, in units of the standard deviation of the row's scores.
        seed: any integer; the noise is a function of (seed, timestep of the row, token).
        timestep: (B,) timesteps that vary the noise, or None. Rows that share a plan take that of the first of them.
        share_plan: k rows share one plan, made from their mean: batch row b uses plan row b mod (B / k).

    Returns:
        MergePlan with B rows (B / k with `share_plan`) and N - int(N * ratio) slots.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, grid, ratio, stride, noise, timestep or share_plan.
    """
    grid, stride, r, share = check_method(x, grid, ratio, stride, share_plan)
    noise = check_number("noise", noise)
    if noise < 0:
        raise ValueError(f"noise: got {noise}, expected at least 0")
    seed, timestep = check_random(seed, timestep, x, share)
    x = share_mean(x, share)
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    unit = values / values.square().sum(-1, keepdim=True).sqrt()
    # A token without a direction counts for nothing here, and its own NaN score is never chosen.
    with torch.autocast(x.device.type, enabled=False):
        score = torch.bmm(unit, unit.nan_to_num(0.0, 0.0, 0.0).mean(1).unsqueeze(2)).squeeze(2)
    if noise > 0:
        finite = score.nan_to_num(0.0, 0.0, 0.0)
        spread = (finite - finite.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        score = score + noise * spread * _gaussian(seed, timestep, x.shape[1], x.device)
    destinations = select_destinations(-score.float(), grid, stride)
    return match_and_plan(x, destinations, r, grid, stride, None)


@dataclass(frozen=True, kw_only=True)
class SiToConfig(MergeConfig):
    """Similarity-based token pruning (SiTo, Zhang et al., AAAI 2025); see `bigain_kernels.sito_plan`.

    Args:
        mode: "prune", the method's own; the modes of `MergeConfig` are open too.
        noise: scale of the random perturbation of the selection scores, at least 0.
        seed: of the perturbation.
        others: see `MergeConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "sito"

    mode: str = option("prune", Choice(MODES))
    noise: float = option(0.1, Number(0.0))
    seed: int = option(0, Count())

    @property
    def is_random(self) -> bool:
        return self.noise > 0

    def plan(self, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        return sito_plan(
            x,
            grid,
            ratio,
            self.stride,
            noise=self.noise,
            seed=self.seed,
            timestep=timestep,
            share_plan=self.share_plan,
        )
