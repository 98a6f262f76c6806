"""What the methods share: checks, matching, and random numbers that hang on nothing but a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count, check_grid, check_integer, check_pair, check_tensor, merged_count
from ..ops.bipartite_match import bipartite_match
from ..ops.merge_plan import merge_plan
from ..plan import MergePlan

_MASK = 0xFFFFFFFF


def check_method(
    x: Tensor, grid: tuple[int, int], ratio: float, stride: tuple[int, int], share_plan: int | None
) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """Check the arguments that every method has; returns grid, stride, r = int(N * ratio) and the rows per plan."""
    check_tensor("x", x, 3)
    grid = check_grid(grid, x.shape[1], "x")
    stride = check_pair("stride", stride)
    return grid, stride, merged_count(ratio, grid, stride), check_share(share_plan, x)


def check_share(share_plan: int | None, x: Tensor) -> int:
    """The rows of x (B, N, C) that share a plan."""
    share = 1 if share_plan is None else check_count("share_plan", share_plan, 1)
    if x.shape[0] % share != 0:
        raise ValueError(f"share_plan: got {share}, expected a divisor of {x.shape[0]}, the batch of x")
    return share


def match_and_plan(
    x: Tensor, destinations: Tensor, r: int, grid: tuple[int, int], stride: tuple[int, int], window: int | None
) -> MergePlan:
    """The second half of every method that merges into destinations."""
    similarity, match = bipartite_match(x.detach(), destinations, window, grid, stride)
    return merge_plan(similarity, match, destinations, r, grid)


def _scramble(value: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose output bits all depend on all input bits (xor-shift-multiply rounds)."""
    value = (value ^ (value >> 16)) * 0x21F0AAAD & _MASK
    value = (value ^ (value >> 15)) * 0x735A2D97 & _MASK
    return value ^ (value >> 15)


def counter_random(seed: int, timestep: Tensor | None, count: int, stream: int, device: torch.device) -> Tensor:
    """Random 32-bit integers that are a function of (seed, timestep of the row, position, stream) alone.

    A counter-based generator: it keeps no state, so it touches no generator of torch, runs on the device without a
    copy, can be captured in a CUDA graph, and gives rows of equal timestep equal numbers whatever batch they are in.

    Args:
        seed: any integer.
        timestep: (B,) integer or floating timesteps, read to 1/64 of a step, or None.
        count: how many numbers a row gets.
        stream: separates uses that share a seed.

    Returns:
        (B, count) int64 in [0, 2**32); (1, count) without a timestep.
    """
    position = torch.arange(count, dtype=torch.int64, device=device)
    key = _scramble(torch.full((1,), (seed * 0x9E3779B1 + stream) & _MASK, dtype=torch.int64, device=device))
    if timestep is not None:
        # 64 times a timestep of 16 bits may be none of 16 bits.
        whole = not timestep.is_floating_point()
        step = timestep.to(torch.int64) * 64 if whole else (timestep.to(torch.float32) * 64).to(torch.int64)
        key = _scramble((key + step * 0x85EBCA6B) & _MASK)
    return _scramble((key.unsqueeze(1) + position * 0x9E3779B1) & _MASK)


def check_random(seed: object, timestep: Tensor | None, x: Tensor, share: int) -> tuple[int, Tensor | None]:
    """Check what random numbers hang on; returns the seed and the timesteps of the plan rows.

    Those are the timesteps of the first P rows: rows that share a plan stand for one timestep, which is not verified,
    because that would wait for the device.
    """
    seed = check_integer("seed", seed)
    if timestep is None:
        return seed, None
    if not isinstance(timestep, Tensor):
        raise TypeError(f"timestep: got {type(timestep).__name__}, expected a tensor of one value per batch row")
    if timestep.dtype == torch.bool or timestep.is_complex():
        raise TypeError(f"timestep: got dtype {timestep.dtype}, expected integers or floating-point numbers")
    if timestep.shape != x.shape[:1]:
        raise ValueError(f"timestep: got shape {tuple(timestep.shape)}, expected {(x.shape[0],)}, the batch of x")
    return seed, timestep.narrow(0, 0, x.shape[0] // share)
