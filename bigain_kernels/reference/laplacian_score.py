"""Frequency score of each token (BiGain, arXiv 2603.12240, section on L-GTM)."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def laplacian_score(x: Tensor, grid: tuple[int, int], norm: str = "l1", frames: int = 1) -> Tensor:
    """score[b, n] = || 4 x[n] - x[above] - x[below] - x[left] - x[right] ||, zero outside the grid; (B, N) float32.

    Of several frames also + 2 x[n] - x[before] - x[after]; a frame that is not there is the frame itself.
    """
    image = x.unflatten(1, (frames, *grid)).to(compute_dtype(x))
    response = 4 * image
    response[:, :, 1:] -= image[:, :, :-1]
    response[:, :, :-1] -= image[:, :, 1:]
    response[:, :, :, 1:] -= image[:, :, :, :-1]
    response[:, :, :, :-1] -= image[:, :, :, 1:]
    if frames > 1:
        response += image - torch.cat([image[:, :1], image[:, :-1]], dim=1)
        response += image - torch.cat([image[:, 1:], image[:, -1:]], dim=1)
    score = response.abs_().sum(-1) if norm == "l1" else response.square_().sum(-1).sqrt_()
    return score.flatten(1).float()
