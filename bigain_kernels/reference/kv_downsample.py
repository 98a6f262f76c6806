"""Interpolate-extrapolate downsampling of keys and values (IE-KVD of BiGain; nearest alone is ToDo, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .laplacian_score import compute_dtype


def nearest_index(size: int, factor: int, device: torch.device) -> Tensor:
    """Source row of each output row under the nearest-exact rule: floor((i + 0.5) * size / (size // factor))."""
    out = size // factor
    return (2 * torch.arange(out, device=device) + 1) * size // (2 * out)


def _pool(x: Tensor, grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor) -> Tensor:
    (height, width), (sy, sx) = grid, factor
    out_y, out_x = height // sy, width // sx
    image = x.unflatten(1, grid)
    rows, columns = nearest_index(height, sy, x.device), nearest_index(width, sx, x.device)
    nearest = image[:, rows][:, :, columns].flatten(1, 2)
    windows = image[:, : out_y * sy, : out_x * sx].reshape(x.shape[0], out_y, sy, out_x, sx, x.shape[2])
    average = windows.to(compute_dtype(x)).mean(dim=(2, 4)).flatten(1, 2)
    # What has weight zero is left out: zero times an infinite token would be NaN.
    if isinstance(alpha, Tensor):
        weight = alpha.to(average.dtype)[:, None, None]
        blend = weight * nearest + (1 - weight) * average
        return torch.where(weight == 1, nearest, torch.where(weight == 0, average, blend)).to(x.dtype)
    if alpha == 1:
        return nearest
    return (average if alpha == 0 else alpha * nearest.to(average.dtype) + (1 - alpha) * average).to(x.dtype)


@overload
def kv_downsample(xs: Tensor, grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor) -> Tensor: ...
@overload
def kv_downsample(
    xs: Sequence[Tensor], grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor
) -> tuple[Tensor, ...]: ...
def kv_downsample(
    xs: Tensor | Sequence[Tensor], grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor
) -> Tensor | tuple[Tensor, ...]:
    """alpha * nearest + (1 - alpha) * average over sy x sx windows; (B, N, C) to (B, (H//sy) * (W//sx), C)."""
    if isinstance(xs, Tensor):
        return _pool(xs, grid, factor, alpha)
    return tuple(_pool(tensor, grid, factor, alpha) for tensor in xs)
