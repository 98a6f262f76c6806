"""Interpolate-extrapolate downsampling of keys and values (IE-KVD of BiGain; nearest alone is ToDo, 2024)."""

from __future__ import annotations

from collections.abc import Sequence

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
    image = x.unflatten(1, grid).to(compute_dtype(x))
    rows, columns = nearest_index(height, sy, x.device), nearest_index(width, sx, x.device)
    nearest = image[:, rows][:, :, columns]
    windows = image[:, : out_y * sy, : out_x * sx].reshape(x.shape[0], out_y, sy, out_x, sx, x.shape[2])
    average = windows.mean(dim=(2, 4))
    weight = alpha.to(image.dtype)[:, None, None, None] if isinstance(alpha, Tensor) else alpha
    return (weight * nearest + (1 - weight) * average).flatten(1, 2).to(x.dtype)


def kv_downsample(
    x: Tensor | Sequence[Tensor], grid: tuple[int, int], factor: tuple[int, int], alpha: float | Tensor
) -> Tensor | tuple[Tensor, ...]:
    """alpha * nearest + (1 - alpha) * average over sy x sx windows; (B, N, C) to (B, (H//sy) * (W//sx), C)."""
    if isinstance(x, Tensor):
        return _pool(x, grid, factor, alpha)
    return tuple(_pool(tensor, grid, factor, alpha) for tensor in x)
