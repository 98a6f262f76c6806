"""Best destination of every source by cosine similarity, without the similarity matrix (Bolya et al. 2023).

A program multiplies a tile of sources with one tile of destinations after another on the tensor cores, scales by the
inverse norms of the destinations, and keeps a running (similarity, lowest index) maximum of each source in registers.
When there are too few tiles of sources to fill the chip, several programs share one, each with a part of the
destinations; they combine through a 64-bit atomic maximum, which is the same in any order. How many they are is the
grid of the launch and no constant of the kernel: one binary serves every batch.

The step over channels holds the loads and the product alone. Row addresses, masks and scales are made once a tile, and
channels are masked only when BLOCK_K does not divide them.

Tensor cores align products to the largest, drop what lies two bits below float32, and round towards zero: each step
loses up to that much, always downwards for similar tokens, in proportion to the sum so far. With 16-bit inputs the
products of PART channels are therefore summed there, and the sums of parts outside, in float32 that rounds to nearest;
tests/tensor_core.py models the error. float32 goes through tf32x3, which adds up outside of the tensor cores anyway.

The same bits under every config: the channels are always summed in steps of BLOCK_K, in order, in the same parts, so
that BLOCK_M, BLOCK_N, the split and the number of warps decide only which program computes a similarity. On tensor
cores this holds among configs that use one kind of instruction; the shipped ones all have BLOCK_M >= 64 and at least 4
warps.

float32 input uses three TF32 products per product ("tf32x3"): plain TF32 is off by 3e-4 and would change matches, and
"ieee" does not use the tensor cores. What tf32x3 drops is below 2^-21 of a product, the size of float32 rounding. AMD
GPUs multiply float32 natively, and take "ieee".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import (
    CHANNELS,
    EXACT,
    INT_MAX,
    INT_MIN,
    LOG2_CHANNELS,
    inverse_norm,
    key_to_float,
    ordered_key,
    pack,
    tree_sum,
    unit_last_stride,
    unpack_index,
    unpack_key,
)
from .launching import cdiv, programs

# 128 bytes of a row: the width of a shared-memory swizzle atom.
BLOCK_K = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
# Channels whose products are summed inside the tensor cores; up to LONGEST_PART, all of them.
PART = 256
LONGEST_PART = 320
# Elements in 16 bytes of a 16-bit row. Strides and channels that it divides reach the kernel in this unit, so that the
# compiler sees the alignment: by itself Triton notices multiples of 16 only.
UNIT = 8
# What a similarity counts in the measure of configs.pick: a match is "large" from 2^18 similarities on.
_WORK = configs.LARGE >> 18
_INTEGERS = ["n", "num_destinations", "num_sources", "num_first", "height", "width", "window", "s_xb", "s_db"]


@triton.jit
def _lower_bound(p_list, count, value):
    """How many entries of a list come before `value`; entries below it all stand before those that are not."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        if tl.load(p_list + middle) < value:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["n", "num_destinations", "s_xb", "s_db"])
def match_prepare_kernel(
    p_x,
    p_destinations,
    p_inverse_norm,
    p_sources,
    p_packed,
    p_similarity,
    p_match,
    n,
    units,
    num_destinations,
    s_xb,
    s_xn,
    s_db,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Inverse norms, the list of sources, and the results at destinations, when no score pass has made them."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, CHANNELS)
    m_t = o_t < n
    channels = units * UNIT
    p_rows = p_x + i_b * s_xb * UNIT + o_t.to(tl.int64)[:, None] * (tl.cast(s_xn, tl.int64) * UNIT) + o_c[None, :]
    b_squares = tl.zeros((BLOCK_T, CHANNELS), tl.float32)
    for i_c in range(0, channels, CHANNELS):
        b_x = tl.load(p_rows + i_c, mask=m_t[:, None] & (i_c + o_c < channels)[None, :], other=0.0).to(tl.float32)
        b_squares = tl.fma(b_x, b_x, b_squares)
    o_out = i_b * n + o_t
    tl.store(p_inverse_norm + o_out, inverse_norm(tree_sum(b_squares, LOG2_CHANNELS)), mask=m_t)

    # Binary search of every token in the ascending list: how many destinations come before it.
    p_list = p_destinations + i_b * s_db
    b_low = tl.zeros((BLOCK_T,), tl.int32)
    b_high = tl.zeros((BLOCK_T,), tl.int32) + num_destinations
    length = num_destinations
    while length > 0:
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = tl.load(p_list + b_middle, mask=m_open, other=0) < o_t
        b_low = tl.where(m_open & m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
        length = length // 2
    m_found = b_low < num_destinations
    m_destination = m_found & (tl.load(p_list + b_low, mask=m_found, other=-1) == o_t)
    # Without destinations every token is its own match.
    m_done = m_destination | (b_low + num_destinations == 0)
    tl.store(p_sources + i_b * (n - num_destinations) + o_t - b_low, o_t, mask=m_t & ~m_destination)
    if PACKED:
        b_key = tl.where(m_done, ordered_key(tl.full((BLOCK_T,), float("-inf"), tl.float32)), INT_MIN)
        tl.store(p_packed + o_out, pack(b_key, o_t), mask=m_t)
    else:
        tl.store(p_similarity + o_out, tl.full((BLOCK_T,), float("-inf"), tl.float32), mask=m_t & m_done)
        tl.store(p_match + o_out, o_t, mask=m_t & m_done)


@triton.jit
def _load_tiles(p_a, p_b, m_a, m_b, i_k, o_k, channels, EVEN: tl.constexpr):
    """Channels i_k + o_k of a tile of sources and of one of destinations; zeros where there are none."""
    if EVEN:
        b_a = tl.load(p_a + i_k, mask=m_a[:, None], other=0.0)
        b_b = tl.load(p_b + i_k, mask=m_b[None, :], other=0.0)
    else:
        m_k = i_k + o_k < channels
        b_a = tl.load(p_a + i_k, mask=m_a[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b + i_k, mask=m_b[None, :] & m_k[:, None], other=0.0)
    return b_a, b_b


@triton.jit(do_not_specialize=_INTEGERS)
def bipartite_match_kernel(
    p_x,
    p_inverse_norm,
    p_sources,
    p_destinations,
    p_packed,
    p_similarity,
    p_match,
    n,
    units,
    num_destinations,
    num_sources,
    num_first,
    height,
    width,
    window,
    s_xb,
    s_xn,
    s_db,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    WINDOW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile of sources, part of the destinations, batch row). The lowest destination is among the first
    num_first of the list. With WINDOW, the destinations of each row of tiles stand together, rows ascending. Strides of
    x and its channels count UNIT elements; EVEN says that BLOCK_K divides the channels; PART is 0 when they are one
    part; NEST takes a loop for each part, where the compiler cannot put an accumulator aside within a loop over all."""
    i_m, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_x += i_b * s_xb * UNIT
    p_inverse_norm += i_b * n
    p_sources += i_b * num_sources
    p_destinations += i_b * s_db
    channels = units * UNIT
    s_row = tl.cast(s_xn, tl.int64) * UNIT
    o_k, o_j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_sources
    b_source = tl.load(p_sources + o_m, mask=m_m, other=0)
    b_inverse = tl.load(p_inverse_norm + b_source, mask=m_m, other=0.0)
    # Rows without a direction are read as zeros: no NaN enters the products.
    m_a = b_inverse > 0.0
    b_row_scale = tl.where(m_a, b_inverse, 1.0)
    p_a = p_x + b_source.to(tl.int64)[:, None] * s_row + o_k[None, :]

    lowest = INT_MAX
    for i_n in range(0, num_first, BLOCK_N):
        b_first = tl.load(p_destinations + i_n + o_j, mask=i_n + o_j < num_first, other=INT_MAX)
        lowest = tl.minimum(lowest, tl.min(b_first, 0))

    begin, end = num_destinations * 0, num_destinations
    if WINDOW:
        last_y, last_x = tl.maximum(height // SY - 1, 0), tl.maximum(width // SX - 1, 0)
        b_tile_y = tl.minimum(b_source // width // SY, last_y)
        b_tile_x = tl.minimum(b_source % width // SX, last_x)
        top = tl.min(tl.where(m_m, b_tile_y, INT_MAX), 0) - window
        bottom = tl.max(tl.where(m_m, b_tile_y, -1), 0) + window
        begin = _lower_bound(p_destinations, num_destinations, top * SY * width)
        if bottom < last_y:
            end = _lower_bound(p_destinations, num_destinations, (bottom + 1) * SY * width)
    if PACKED:
        part = tl.cdiv(end - begin, tl.num_programs(1))
        begin = begin + i_s * part
        end = tl.minimum(begin + part, end)

    b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_best_token = tl.zeros((BLOCK_M,), tl.int32) + lowest
    for i_n in range(begin, end, BLOCK_N):
        m_n = i_n + o_j < end
        b_destination = tl.load(p_destinations + i_n + o_j, mask=m_n, other=0)
        b_scale = tl.load(p_inverse_norm + b_destination, mask=m_n, other=0.0)
        m_b = b_scale > 0.0
        p_b = p_x + b_destination.to(tl.int64)[None, :] * s_row + o_k[:, None]
        b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Adding a part after its last product would let the compiler make one accumulator of the two.
        if PART and NEST:
            for i_part in range(0, channels, PART):
                b_part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for i_k in range(i_part, tl.minimum(i_part + PART, channels), BLOCK_K):
                    b_a, b_b = _load_tiles(p_a, p_b, m_a, m_b, i_k, o_k, channels, EVEN)
                    b_part = tl.dot(b_a, b_b, b_part, input_precision=PRECISION)
                b_dot += b_part
        else:
            b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_k in range(0, channels, BLOCK_K):
                b_a, b_b = _load_tiles(p_a, p_b, m_a, m_b, i_k, o_k, channels, EVEN)
                if PART:
                    if i_k % PART == 0:
                        b_sum += b_dot
                        b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                b_dot = tl.dot(b_a, b_b, b_dot, input_precision=PRECISION)
            if PART:
                b_dot += b_sum

        # -inf for what cannot be matched; adding zero also makes -0 and 0 one similarity. The row's own scale is
        # applied before comparing: it can round two values to one, and parts of a split compare what is rounded.
        b_bias = tl.where(m_b, 0.0, float("-inf"))
        b_cosine = tl.fma(b_dot * b_scale[None, :], b_row_scale[:, None], b_bias[None, :])
        if WINDOW:
            b_away_y = tl.abs(b_tile_y[:, None] - tl.minimum(b_destination // width // SY, last_y)[None, :])
            b_away_x = tl.abs(b_tile_x[:, None] - tl.minimum(b_destination % width // SX, last_x)[None, :])
            b_cosine = tl.where(tl.maximum(b_away_y, b_away_x) <= window, b_cosine, float("-inf"))
        b_high = tl.max(b_cosine, axis=1)
        b_token = tl.where(m_n, b_destination, INT_MAX)
        b_high_token = tl.min(tl.where(b_cosine == b_high[:, None], b_token[None, :], INT_MAX), axis=1)
        m_better = (b_high > b_best) | ((b_high == b_best) & (b_high_token < b_best_token))
        b_best_token = tl.where(m_better, b_high_token, b_best_token)
        b_best = tl.where(m_better, b_high, b_best)

    m_matched = m_a & (b_best > float("-inf"))
    b_similarity = tl.where(m_matched, b_best, float("-inf"))
    b_match = tl.where(m_matched, b_best_token, lowest)
    o_out = i_b * n + b_source
    if PACKED:
        tl.atomic_max(p_packed + o_out, pack(ordered_key(b_similarity), b_match), mask=m_m, sem="relaxed")
    else:
        tl.store(p_similarity + o_out, b_similarity, mask=m_m)
        tl.store(p_match + o_out, b_match, mask=m_m)


@triton.jit(do_not_specialize=["count"])
def match_unpack_kernel(p_packed, p_similarity, p_match, count, BLOCK: tl.constexpr):
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < count
    b_packed = tl.load(p_packed + o_t, mask=m_t, other=0)
    tl.store(p_similarity + o_t, key_to_float(unpack_key(b_packed)), mask=m_t)
    tl.store(p_match + o_t, unpack_index(b_packed), mask=m_t)


@functools.cache
def _split(tiles: int, num_destinations: int, block_m: int, block_n: int, multiprocessors: int) -> int:
    """How many programs share each of the tiles, so that the busiest multiprocessor reads the fewest rows of tokens."""

    def busiest(split: int) -> int:
        part = cdiv(num_destinations, split)
        return cdiv(tiles * split, multiprocessors) * (cdiv(part, block_n) * block_m + part)

    most = max(1, cdiv(num_destinations, block_n // 2))
    return min(range(1, min(most, multiprocessors) + 1), key=lambda split: (busiest(split), split))


def split_of(x: Tensor, num_sources: int, num_destinations: int, window: int | None, config: configs.Config) -> int:
    """How many programs share a tile of sources; those of a window are few enough for one."""
    if "SPLIT" in config:
        return config["SPLIT"]
    if window is not None:
        return 1
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    tiles = cdiv(num_sources, block_m) * x.shape[0]
    return _split(tiles, num_destinations, block_m, block_n, configs.multiprocessors(x.device))


def layout_arguments(x: Tensor) -> dict[str, Any]:
    """Strides and channels of x (P, N, C) in units that keep 16-byte accesses, and what follows from the channels."""
    rows, _, channels = x.shape
    s_xb, s_xn = x.stride(0) if rows > 1 else 0, x.stride(1)
    unit = UNIT if s_xb % UNIT == s_xn % UNIT == channels % UNIT == 0 else 1
    return {"units": channels // unit, "s_xb": s_xb // unit, "s_xn": s_xn // unit, "UNIT": unit}


def launch_match(
    x: Tensor,
    inverse_norm: Tensor,
    sources: Tensor,
    destinations: Tensor,
    num_first: int,
    grid: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    window: int | None,
    split: int,
    outputs: dict[str, Tensor],
    packed: bool,
    config: configs.Config,
) -> None:
    """The matching launch alone; x (P, N, C), inverse_norm (P, N), sources (P, S), destinations (P, D)."""
    rows, n, channels = x.shape
    # Read only with a window: without one, a binary for each stride would be the same.
    (height, width), (sy, sx) = (grid, stride) if window is not None and grid and stride else ((1, n), (1, 1))
    block_k = BLOCK_K[x.dtype]
    programs(bipartite_match_kernel, cdiv(sources.shape[1], config["BLOCK_M"]), split, rows)(
        p_x=x,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_destinations=destinations,
        **outputs,
        n=n,
        num_destinations=destinations.shape[1],
        num_sources=sources.shape[1],
        num_first=num_first,
        height=height,
        width=width,
        window=window or 0,
        s_db=destinations.stride(0),
        **layout_arguments(x),
        EVEN=channels % block_k == 0,
        PART=PART if x.dtype != torch.float32 and channels > LONGEST_PART else 0,
        WINDOW=window is not None,
        SY=sy,
        SX=sx,
        PACKED=packed,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_K=block_k,
        **{"NEST": False, **{key: value for key, value in config.items() if key != "SPLIT"}},
        **EXACT,
    )


def pick_match(x: Tensor, num_sources: int, num_destinations: int, window: int | None) -> configs.Config:
    """The config for a match of this size. float32 tiles take twice the bytes, a window takes registers.

    Up to 16 rows count as one, so that all such batches run the same binary.
    """
    op = "bipartite_match" if window is None else "bipartite_match_window"
    if x.dtype == torch.float32:
        op = "bipartite_match_fp32"
    return configs.pick(op, x.device, max(1, x.shape[0] // 16) * num_sources * num_destinations * _WORK)


def launch_bipartite_match(
    x: Tensor,
    destinations: Tensor,
    window: int | None = None,
    grid: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """similarity (B, N) float32 and match (B, N) int32 of x (B, N, C) over destinations (B, D) int32, ascending.

    Two launches (norms and lists, matching); a third unpacks when programs share tiles of sources.
    """
    x, destinations = unit_last_stride(x), unit_last_stride(destinations)
    rows, n, _ = x.shape
    d = destinations.shape[1]
    similarity = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    match = torch.empty((rows, n), dtype=torch.int32, device=x.device)
    if rows * n == 0:
        return similarity, match
    config = config or pick_match(x, n - d, d, window)
    split = split_of(x, n - d, d, window, config)
    # Where one row has too few tiles, larger batches take the same kernels, split or not.
    packs = split_of(x[:1], n - d, d, window, config) > 1
    inverse_norm = torch.empty_like(similarity)
    sources = torch.empty((rows, n - d), dtype=torch.int32, device=x.device)
    outputs = {"p_packed": match, "p_similarity": similarity, "p_match": match}
    if packs:
        outputs = dict.fromkeys(outputs, torch.empty((rows, n), dtype=torch.int64, device=x.device))
    prepare = configs.pick("match_prepare", x.device, max(1, rows // 16) * x[0].numel() * x.element_size())
    programs(match_prepare_kernel, cdiv(n, prepare["BLOCK_T"]), rows)(
        p_x=x,
        p_destinations=destinations,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        **outputs,
        n=n,
        num_destinations=d,
        s_db=destinations.stride(0),
        **layout_arguments(x),
        PACKED=packs,
        **prepare,
        **EXACT,
    )
    if 0 < d < n:
        launch_match(x, inverse_norm, sources, destinations, 1, grid, stride, window, split, outputs, packs, config)
    if packs:
        programs(match_unpack_kernel, cdiv(rows * n, 1024))(
            p_packed=outputs["p_packed"],
            p_similarity=similarity,
            p_match=match,
            count=rows * n,
            BLOCK=1024,
            num_warps=4,
            **EXACT,
        )
    return similarity, match
