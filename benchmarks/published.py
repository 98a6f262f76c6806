"""The published algorithms, step by step in eager PyTorch: what the kernels are measured against.

Written after the papers and the behaviour of the published code (ToMe for diffusion by Bolya and Hoffman 2023, ToDo by
Smith et al. 2024, BiGain arXiv 2603.12240), with L-GTM's true tiles. Everything runs in the dtype of the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Match(NamedTuple):
    """Indices of sources (B, N - D, 1) and destinations (B, D, 1), and each source's best destination by position."""

    sources: Tensor
    destinations: Tensor
    similarity: Tensor
    position: Tensor


class Plan(NamedTuple):
    """A match and which of its sources are merged (B, r, 1) and kept (B, N - D - r, 1), with the targets (B, r, 1)."""

    match: Match
    merged: Tensor
    kept: Tensor
    target: Tensor


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.expand(-1, -1, x.shape[-1]))


def laplacian_score(x: Tensor, grid: tuple[int, int], contiguous: bool = False) -> Tensor:
    """L1 norm over channels of a depthwise Laplacian convolution, (B, N).

    The published code convolves a (B, C, H, W) view of the tokens, which PyTorch treats as channels-last; `contiguous`
    makes it the layout that convolutions usually have.
    """
    batch, _, channels = x.shape
    kernel = x.new_tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
    image = x.transpose(1, 2).reshape(batch, channels, *grid)
    image = image.contiguous() if contiguous else image
    response = F.conv2d(image, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
    return response.abs().sum(1).flatten(1)


def select_destinations(score: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """(B, D) int64: the smoothest token of each tile. The grid must be divisible."""
    (height, width), (sy, sx) = grid, stride
    tiles = score.view(-1, height // sy, sy, width // sx, sx).transpose(2, 3).flatten(3)
    inside = tiles.argmin(-1)
    row = torch.arange(height // sy, device=score.device)[:, None] * sy + inside // sx
    column = torch.arange(width // sx, device=score.device) * sx + inside % sx
    return (row * width + column).flatten(1)


def split(x: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of sources (B, N - D, 1) and destinations (B, D, 1), by an argsort."""
    batch, n, _ = x.shape
    count = destinations.shape[1]
    marks = torch.zeros(batch, n, 1, dtype=torch.int64, device=x.device).scatter_(1, destinations[..., None], -1)
    order = marks.argsort(dim=1)
    return order[:, count:], order[:, :count]


def gathered(x: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Unit sources (B, N - D, C) and destinations (B, C, D): the operands of the matrix product."""
    sources, chosen = split(x, destinations)
    unit = x / x.norm(dim=-1, keepdim=True)
    return _take(unit, sources), _take(unit, chosen).transpose(1, 2)


def match(x: Tensor, destinations: Tensor) -> Match:
    """The best of the whole similarity matrix."""
    source_index, destination_index = split(x, destinations)
    unit = x / x.norm(dim=-1, keepdim=True)
    similarity = _take(unit, source_index) @ _take(unit, destination_index).transpose(1, 2)
    best, position = similarity.max(dim=-1)
    return Match(source_index, destination_index, best, position)


def merge_plan(matched: Match, r: int) -> Plan:
    """The r best-matched sources by an argsort of all."""
    order = matched.similarity.argsort(dim=-1, descending=True)[..., None]
    merged, kept = order[:, :r], order[:, r:]
    return Plan(matched, merged, kept, matched.position[..., None].gather(1, merged))


def token_merge(x: Tensor, plan: Plan) -> Tensor:
    """(B, N - r, C): the kept sources, then the destinations averaged with what merged into them."""
    sources, destinations = _take(x, plan.match.sources), _take(x, plan.match.destinations)
    target = plan.target.expand(-1, -1, x.shape[-1])
    averaged = destinations.scatter_reduce(1, target, _take(sources, plan.merged), "mean")
    return torch.cat([_take(sources, plan.kept), averaged], 1)


def token_unmerge(y: Tensor, plan: Plan) -> Tensor:
    """(B, N, C): every token gets the value of its slot."""
    kept_count, channels = plan.kept.shape[1], y.shape[-1]
    kept, destinations = y[:, :kept_count], y[:, kept_count:]
    n = plan.match.sources.shape[1] + plan.match.destinations.shape[1]
    out = torch.zeros(y.shape[0], n, channels, dtype=y.dtype, device=y.device)
    out.scatter_(1, plan.match.destinations.expand(-1, -1, channels), destinations)
    out.scatter_(1, plan.match.sources.gather(1, plan.kept).expand(-1, -1, channels), kept)
    merged = plan.match.sources.gather(1, plan.merged)
    return out.scatter_(1, merged.expand(-1, -1, channels), _take(destinations, plan.target))


def lgtm_plan(x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int]) -> Plan:
    """Score, destinations, match and plan of L-GTM."""
    destinations = select_destinations(laplacian_score(x, grid), grid, stride)
    return merge_plan(match(x, destinations), int(x.shape[1] * ratio))


def lgtm(x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int]) -> Tensor:
    """The whole of L-GTM around attention: plan, merge, unmerge; (B, N, C) to (B, N, C)."""
    plan = lgtm_plan(x, grid, ratio, stride)
    return token_unmerge(token_merge(x, plan), plan)


def kv_downsample(x: Tensor, grid: tuple[int, int], factor: int, alpha: float) -> Tensor:
    """alpha * nearest + (1 - alpha) * average with interpolate and avg_pool2d."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    nearest = F.interpolate(image, scale_factor=1 / factor, mode="nearest-exact")
    pooled = alpha * nearest + (1 - alpha) * F.avg_pool2d(image, factor)
    return pooled.flatten(2).transpose(1, 2).contiguous()


def todo_downsample(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """ToDo: every factor-th token by nearest interpolation."""
    image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    return F.interpolate(image, scale_factor=1 / factor, mode="nearest-exact").flatten(2).transpose(1, 2)


def tomesd_lgtm(x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int]) -> Tensor:
    """Match, merge and unmerge of the tomesd package with its fixed destinations; it has no score to compute."""
    from tomesd.merge import bipartite_soft_matching_random2d

    (height, width), (sy, sx) = grid, stride
    r = int(x.shape[1] * ratio)
    merge, unmerge = bipartite_soft_matching_random2d(x, width, height, sx, sy, r, no_rand=True)
    return unmerge(merge(x))
