"""Compression as the classifier and generation use it: applied for a while, with plans shared, and in words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from ..methods import CompressionConfig, MergeConfig, PoolConfig
from ..methods.mixed import Compression, each, parts_of
from ..methods.registry import NONE
from .denoisers import Denoiser


def each_merging(
    compression: Compression | None, change: Callable[[MergeConfig], MergeConfig], argument: str
) -> Compression:
    """`compression` with `change` made to what of it merges; pooling, which builds no plan, stays as it is.

    Raises:
        ValueError: nothing of it builds a plan; names `argument`, which asked for the change.
    """
    parts = () if compression is None else parts_of(compression)
    if compression is None or not any(isinstance(part, MergeConfig) for part in parts):
        methods = ", ".join(part.method for part in parts) or NONE
        raise ValueError(f"{argument}: got method {methods}, expected a merge method, which builds plans")
    return each(compression, lambda part: change(part) if isinstance(part, MergeConfig) else part)


def with_shared_plan(compression: Compression | None, rows: int) -> Compression:
    """`compression` with one plan for each `rows` rows that belong together.

    Raises:
        ValueError: the method builds no plan, or there is none.
    """
    return each_merging(compression, lambda part: replace(part, share_plan=rows), "share_plan")


def compressed(denoiser: Denoiser, compression: Compression | None) -> AbstractContextManager[Any]:
    """A context in which `compression` (or, for None, nothing) is applied to the model of `denoiser`."""
    if compression is None:
        return nullcontext()
    from ..diffusers import token_compression

    if compression.num_train_timesteps is None:
        steps = len(denoiser.scheduler.alphas_cumprod)
        compression = each(compression, lambda part: replace(part, num_train_timesteps=steps))
    return token_compression(denoiser.model, compression)


def tokens_kept(compression: Compression | None, grid: tuple[int, int]) -> str:
    """How many tokens attention sees on a grid of (H, W) tokens, in words: "20 of 64", or "16 of 64 keys".

    Of several configs, each once.
    """
    parts = (None,) if compression is None else parts_of(compression)
    return ", ".join(dict.fromkeys(_tokens_kept(part, grid) for part in parts))


def _tokens_kept(compression: CompressionConfig | None, grid: tuple[int, int]) -> str:
    tokens = grid[0] * grid[1]
    if isinstance(compression, MergeConfig):
        return f"{compression.tokens_kept(grid)} of {tokens}"
    if isinstance(compression, PoolConfig):
        return f"{compression.tokens_kept(grid)} of {tokens} keys"
    return f"{tokens} of {tokens}"


def settings_of(compression: Compression | None) -> dict[str, Any]:
    """The method and the value of every option of it, to be written down."""
    return {"method": NONE} if compression is None else compression.settings()
