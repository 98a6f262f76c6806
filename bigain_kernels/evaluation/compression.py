"""Compression as the classifier and generation use it: applied for a while, with plans shared, and in words."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ..methods import CompressionConfig, MergeConfig, PoolConfig
from ..methods.registry import NONE
from .denoisers import Denoiser


def with_shared_plan(compression: CompressionConfig | None, rows: int) -> MergeConfig:
    """`compression` with one plan for each `rows` rows that belong together.

    Raises:
        ValueError: the method builds no plan, or there is none.
    """
    if not isinstance(compression, MergeConfig):
        method = NONE if compression is None else compression.method
        raise ValueError(f"share_plan: got method {method}, expected a merge method, which builds plans")
    return replace(compression, share_plan=rows)


def compressed(denoiser: Denoiser, compression: CompressionConfig | None) -> AbstractContextManager[Any]:
    """A context in which `compression` (or, for None, nothing) is applied to the model of `denoiser`."""
    if compression is None:
        return nullcontext()
    from ..diffusers import token_compression

    if compression.num_train_timesteps is None:
        compression = replace(compression, num_train_timesteps=len(denoiser.scheduler.alphas_cumprod))
    return token_compression(denoiser.model, compression)


def tokens_kept(compression: CompressionConfig | None, grid: tuple[int, int]) -> str:
    """How many tokens attention sees on a grid of (H, W) tokens, in words: "20 of 64", or "16 of 64 keys"."""
    tokens = grid[0] * grid[1]
    if isinstance(compression, MergeConfig):
        return f"{compression.tokens_kept(grid)} of {tokens}"
    if isinstance(compression, PoolConfig):
        return f"{compression.tokens_kept(grid)} of {tokens} keys"
    return f"{tokens} of {tokens}"


def settings_of(compression: CompressionConfig | None) -> dict[str, Any]:
    """The method and the value of every option of it, to be written down."""
    return {"method": NONE} if compression is None else compression.settings()
