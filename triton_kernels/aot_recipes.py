"""The calls whose launches `aot` compiles: every kernel, in its variants, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import bipartite_match, kv_downsample, laplacian_score, merge_plan, row_stats
from . import kv_downsample_attention as attention
from . import pooled_kv_projection as projection
from . import token_merge as merging
from .block_merge_plan import launch_block_merge_plan
from .match_near import launch_match_near
from .token_merge_norm import launch_token_merge_norm
from .token_unmerge import launch_token_unmerge

SHAPE = (2, 4096, 320)
GRID = (64, 64)
# (kernel, variant, op of the config, call); the call gets a config.
Recipe = tuple[str, str, str, Callable[[dict[str, Any] | None], Any]]


def _plan_tables(batch: int, n: int, m: int) -> dict[str, Any]:
    widths = {"slot": n, "offsets": m + 1, "members": n, "anchor": m}
    return {name: torch.empty((batch, w), dtype=torch.int32, device="meta") for name, w in widths.items()}


def recipes(dtype: torch.dtype) -> list[Recipe]:
    """(kernel, variant, op of the config, call) for every kernel; the call gets a config."""
    batch, n, channels = SHAPE
    x = torch.empty(SHAPE, dtype=dtype, device="meta")
    m = n - int(0.7 * n)
    tables = _plan_tables(batch, n, m)
    vector = torch.empty((channels,), dtype=dtype, device="meta")
    rows = torch.empty((batch, channels), dtype=dtype, device="meta")
    y = torch.empty((batch, m, channels), dtype=dtype, device="meta")
    destinations = torch.empty((batch, n // 4), dtype=torch.int32, device="meta")
    # Wide enough that sums are promoted, and no multiple of a step of channels.
    wide = torch.empty((batch, n, 648), dtype=dtype, device="meta")
    match_op, wide_op, window_op = (
        bipartite_match.config_op(dtype, *case) for case in ((channels, None), (648, None), (648, 2))
    )

    def match(window: int | None, split: int, x: torch.Tensor = x) -> Callable[[dict[str, Any] | None], Any]:
        return lambda config: bipartite_match.launch_bipartite_match(
            x, destinations, window, GRID, (2, 2), config=None if config is None else {**config, "SPLIT": split}
        )

    def match_out_of_order(config: dict[str, Any] | None) -> None:
        d = n // 4 - 1
        norm, words = (
            torch.empty((batch, n), device="meta"),
            torch.empty((batch, d), dtype=torch.int64, device="meta"),
        )
        sources, packed = destinations.new_empty((batch, n - d)), words.new_empty((batch, n))
        bipartite_match.launch_match(x, norm, sources, words, 333, None, None, None, packed, config)

    def near(tokens: torch.Tensor | None) -> Callable[[dict[str, Any] | None], Any]:
        """Of any list, or as L-GTM lists what it matches."""
        if tokens is None:
            return lambda config: bipartite_match.launch_bipartite_match(x, destinations, 1, GRID, (2, 2), config)
        norm, words = torch.empty((batch, n), device="meta"), torch.empty_like(destinations, dtype=torch.int64)
        sources, packed = destinations.new_empty((batch, n - n // 4)), words.new_empty((batch, n))
        return lambda config: launch_match_near(
            tokens, norm, sources, words, None, GRID[1] // 2, GRID, (2, 2), 1, packed, config
        )

    return [
        (
            "laplacian_score",
            "score",
            "laplacian_score",
            lambda c: laplacian_score.launch_laplacian_score(x, GRID, config=c),
        ),
        (
            "laplacian_score",
            "select",
            "laplacian_score",
            lambda c: laplacian_score.launch_score_and_select(x, GRID, (2, 2), config=c),
        ),
        (
            "laplacian_score",
            "select, share 2",
            "laplacian_score",
            lambda c: laplacian_score.launch_score_and_select(x, GRID, (2, 2), share=2, config=c),
        ),
        ("row_stats", "norm", "row_stats", lambda c: row_stats.launch_row_stats(x, "norm", config=c)),
        ("row_stats", "layernorm", "row_stats", lambda c: row_stats.launch_row_stats(x, "layernorm", 1e-5, config=c)),
        ("match_prepare", "", "match_prepare", match(None, 1)),
        ("bipartite_match", "", match_op, match(None, 1)),
        ("bipartite_match", "split", match_op, match(None, 4)),
        ("bipartite_match", "destinations out of order", match_op, match_out_of_order),
        ("bipartite_match", "split, C=648", wide_op, match(None, 4, wide)),
        ("bipartite_match", "window, C=648", window_op, match(2, 1, wide)),
        ("match_near", "list", "match_near", near(None)),
        ("match_near", "by tile", "match_near", near(x)),
        ("match_near", "by tile, C=648", "match_near", near(wide)),
        ("token_merge", "mean", "token_merge", lambda c: merging.launch_token_merge(x, **tables, config=c)),
        (
            "token_merge",
            "mlerp",
            "token_merge",
            lambda c: merging.launch_token_merge(x, **tables, mode="mlerp", config=c),
        ),
        (
            "huge_mean",
            "",
            "huge_mean",
            lambda c: merging.launch_token_merge(x, **tables, mode="mlerp"),
        ),
        (
            "token_merge",
            "prune",
            "token_merge",
            lambda c: merging.launch_token_merge(x, **tables, mode="prune", config=c),
        ),
        (
            "token_merge",
            "adaLN",
            "token_merge",
            lambda c: launch_token_merge_norm(
                x, **tables, norm_weight=vector, norm_bias=vector, scale=rows, shift=rows, config=c
            ),
        ),
        ("token_unmerge", "", "token_unmerge", lambda c: launch_token_unmerge(y, **tables, config=c)),
        (
            "token_unmerge",
            "gate, residual",
            "token_unmerge",
            lambda c: launch_token_unmerge(y, **tables, residual=x, gate=rows, config=c),
        ),
        (
            "kv_downsample",
            "2 tensors",
            "kv_downsample",
            lambda c: kv_downsample.launch_kv_downsample([x, x], GRID, (2, 2), 0.9, config=c),
        ),
        (
            "kv_downsample",
            "2 tensors, alpha 1",
            "kv_downsample",
            lambda c: kv_downsample.launch_kv_downsample([x, x], GRID, (2, 2), 1.0, config=c),
        ),
        *_attention_recipes(dtype),
        *_projection_recipes(dtype),
        # Planning sees no tokens, so one dtype stands for all.
        *(_plan_recipes() if dtype == torch.bfloat16 else []),
    ]


# (head dim, factor, text and a bias for two alphas on a grid that no factor divides) of attention, by dtype.
_ATTENTION = {
    torch.bfloat16: [
        *((d, factor, False) for d in (40, 64, 72, 128) for factor in ((1, 1), (2, 2))),
        *((d, (2, 2), True) for d in (80, 96, 128, 160)),
        (64, (4, 4), True),
        (160, (3, 3), True),
    ],
    torch.float16: [(64, (1, 1), True), (64, (2, 2), False)],
    torch.float32: [
        (64, (1, 1), False),
        (64, (2, 2), False),
        (96, (2, 2), True),
        (128, (1, 1), True),
        (160, (3, 3), True),
    ],
}


def _attention_recipes(dtype: torch.dtype) -> list[Recipe]:
    def recipe(d: int, factor: tuple[int, int], everything: bool) -> Any:
        grid, text, heads = ((67, 65), 77, 8) if everything else (GRID, 0, 8)
        n, (sy, sx) = grid[0] * grid[1], factor
        qkv = torch.empty((2, n + text, 3 * heads * d), dtype=dtype, device="meta")
        q, k, v = (x.unflatten(2, (heads, d)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        biased = everything or factor == (1, 1)
        bias = torch.empty((1, grid[0] // sy * (grid[1] // sx) + text), device="meta") if biased else None
        alpha = torch.empty((2,), device="meta") if everything else 0.9
        kinds = f", d={d}, {sy}x{sx}{', text' * everything}{', bias' * biased}".removeprefix(", ")
        return (
            "kv_downsample_attention",
            kinds,
            attention.config_op(dtype, d, factor != (1, 1)),
            lambda c: attention.launch_kv_downsample_attention(
                q, k, v, grid, factor, alpha, None, bias, (text, n + text), config=c
            ),
        )

    return [recipe(*case) for case in _ATTENTION[dtype]]


def _projection_recipes(dtype: torch.dtype) -> list[Recipe]:
    def recipe(grid: tuple[int, int], factor: tuple[int, int], alpha: float | torch.Tensor, biased: bool) -> Any:
        x = torch.empty((2, grid[0] * grid[1], 320), dtype=dtype, device="meta")
        weight = torch.empty((320, 320), dtype=dtype, device="meta")
        bias = weight[0] if biased else None
        return (
            "pooled_kv_projection",
            f"{factor[0]}x{factor[1]}{', bias' * biased}",
            projection.config_op(dtype),
            lambda c: projection.launch_pooled_kv_projection(
                x, grid, factor, alpha, weight, weight, bias, bias, config=c
            ),
        )

    rows = torch.empty((2,), device="meta")
    return [
        recipe(GRID, (2, 2), 0.9, False),
        recipe((67, 65), (2, 2), rows, True),
        recipe((67, 65), (4, 4), rows, True),
    ]


def _plan_recipes() -> list[Recipe]:
    # 16,384 tokens fill every block and take several of the smaller ones.
    batch, n, d, grid = 2, 16_384, 4096, (128, 128)
    score = torch.empty((batch, n), dtype=torch.float32, device="meta")
    match = torch.empty((batch, n), dtype=torch.int32, device="meta")
    packed = torch.empty((batch, n), dtype=torch.int64, device="meta")
    small = packed[:, :1024].contiguous()
    destinations = torch.empty((batch, d), dtype=torch.int32, device="meta")
    return [
        ("merge_plan", "packed", "merge_plan", lambda c: merge_plan.launch_merge_plan_packed(packed, 9000, config=c)),
        (
            "merge_plan",
            "packed, N=1024",
            "merge_plan",
            lambda c: merge_plan.launch_merge_plan_packed(small, 700, config=c),
        ),
        (
            "merge_plan",
            "",
            "merge_plan",
            lambda c: merge_plan.launch_merge_plan(score, match, destinations, 9000, config=c),
        ),
        (
            "block_merge_plan",
            "max",
            "merge_plan",
            lambda c: launch_block_merge_plan(score, grid, (2, 2), 9000, "max", config=c),
        ),
    ]
