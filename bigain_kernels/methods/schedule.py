"""Schedules of alpha and ratio over the timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ..checks import check_count, check_number


def check_schedule(name: str, value: object) -> None:
    """`value` is a finite number or a pair (first, last) of them."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: got {value!r}, expected a number or a pair (first, last)")
        for i, end in enumerate(value):
            check_number(f"{name}[{i}]", end)
    else:
        check_number(name, value)


@overload
def between(ends: Sequence[float], noise: float) -> float: ...
@overload
def between(ends: Sequence[float], noise: Tensor) -> Tensor: ...
def between(ends: Sequence[float], noise: float | Tensor) -> float | Tensor:
    """The line from (first, last) at a noise level from 1, the first step of denoising, to 0, the last."""
    return float(ends[0]) * noise + float(ends[1]) * (1 - noise)


@overload
def alpha_schedule(alpha: float, timestep: Tensor, num_train_timesteps: int = 1000) -> float: ...
@overload
def alpha_schedule(alpha: Sequence[float], timestep: Tensor, num_train_timesteps: int = 1000) -> Tensor: ...
def alpha_schedule(alpha: float | Sequence[float], timestep: Tensor, num_train_timesteps: int = 1000) -> float | Tensor:
    """Alpha of each row: a number as it is, or a line over the timestep from its first to its last value.

    alpha(t) = first * t / (T - 1) + last * (1 - t / (T - 1)), so that `first` holds at the noisiest step t = T - 1 and
    `last` at t = 0. It is computed on the device of the timestep, without a sync. Source: BiGain, arXiv 2603.12240
    (0.8 to 1.2 for generation, 0.9 throughout for classification).

    Args:
        alpha: a number, or (first, last).
        timestep: (B,) timesteps.
        num_train_timesteps: T, of the noise schedule.

    Returns:
        The number itself, or (B,) float32.

    Raises:
        TypeError, ValueError: wrong alpha, timestep or num_train_timesteps.
    """
    check_schedule("alpha", alpha)
    if not isinstance(alpha, (tuple, list)):
        return float(alpha)  # type: ignore[arg-type]
    num_train_timesteps = check_count("num_train_timesteps", num_train_timesteps, 2)
    if not isinstance(timestep, Tensor) or timestep.dim() != 1:
        raise ValueError(f"timestep: got {timestep!r}, expected a tensor of one value per batch row")
    return between(alpha, timestep.to(torch.float32) / (num_train_timesteps - 1))
