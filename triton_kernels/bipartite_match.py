"""Best destination of every source by cosine similarity, without the similarity matrix (Bolya et al. 2023).

A program multiplies tiles of sources with tiles of destinations on the tensor cores, scales by the inverse norms, and
keeps a running (similarity, lowest index) maximum of each source. All tiles of a launch stand in one row, of which
every program takes as many: no multiprocessor has more than one tile above the mean. Programs that share sources
combine through a 64-bit atomic maximum, which is the same in any order. How many they are is the grid of the launch and
no constant of the kernel: one binary serves every batch.

Sources of few channels stay in shared memory while the destinations pass (KEEP); wider ones are read again for each
tile. A destination and its inverse norm are one 64-bit word, in the order of the list: what a tile needs of its
destinations is one load, with no other before it.

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

# Triton does not unpack tuples into others.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

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
    add_squares,
    destination_token,
    destination_word,
    inverse_norm,
    key_to_float,
    norm_step,
    ordered_key,
    pack,
    tree_sum,
    unit_last_stride,
    unpack_index,
    unpack_key,
)
from .early import early, wait_for_predecessor
from .launching import cdiv, programs
from .match_near import is_near, launch_match_near, lower_bounds, order_by_tile, tiles_of
from .match_tiles import best_kept, best_read

# 128 bytes of a row: the width of a shared-memory swizzle atom.
BLOCK_K = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
# Channels whose products are summed inside the tensor cores; up to LONGEST_PART, all of them.
PART = 256
LONGEST_PART = 320
# Elements in 16 bytes of a 16-bit row. Strides and channels that it divides reach the kernel in this unit, so that the
# compiler sees the alignment: by itself Triton notices multiples of 16 only.
UNIT = 8
# Whether tiles of 192 sources fit into registers: before this version of Triton, a few of their words spill.
GROUPED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
# What a similarity counts in the measure of configs.pick: a match is "large" from 2^18 similarities on.
_WORK = configs.LARGE >> 18
_INTEGERS = [
    *("n", "num_destinations", "num_sources", "num_first", "rows", "products"),
    *("height", "width", "window", "s_xb"),
]

# What of a config the launcher reads and the kernel does not.
_HOST = ("SPLIT", "RESIDENT", "KEEP")


@triton.jit
def _lower_bound(p_list, count, value):
    """How many entries of a list come before `value`; entries below it all stand before those that are not."""
    low, high = count * 0, count
    while low < high:
        middle = (low + high) // 2
        if destination_token(tl.load(p_list + middle)) < value:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["n", "num_destinations", "height", "width", "s_xb", "s_db"])
def match_prepare_kernel(
    p_x,
    p_destinations,
    p_inverse_norm,
    p_sources,
    p_words,
    p_starts,
    p_packed,
    n,
    units,
    num_destinations,
    height,
    width,
    s_xb,
    s_xn,
    s_db,
    UNIT: tl.constexpr,
    NEAR: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    LOG2_VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Inverse norms, the lists, and the results at destinations, when no score pass has made them. With NEAR, the lists
    are in the order of the tiles, and p_starts says where the destinations of each begin. A lane adds up 16 bytes of
    channels, in the order of the score pass, so that matches have the same bits after either."""
    wait_for_predecessor(EARLY)
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    LANES: tl.constexpr = 2**LOG2_LANES
    STEP: tl.constexpr = 2 ** (LOG2_LANES + LOG2_VECTOR)
    o_c = tl.arange(0, STEP)
    m_t = o_t < n
    channels = units * UNIT
    p_rows = p_x + i_b * s_xb * UNIT + o_t.to(tl.int64)[:, None] * (tl.cast(s_xn, tl.int64) * UNIT) + o_c[None, :]
    b_squares = tl.zeros((BLOCK_T, LANES), tl.float32)
    for i_c in range(0, channels, STEP):
        b_x = tl.load(p_rows + i_c, mask=m_t[:, None] & (i_c + o_c < channels)[None, :], other=0.0).to(tl.float32)
        b_squares = add_squares(b_squares, b_x, LANES, LOG2_VECTOR)
    o_out = i_b * n + o_t
    b_inverse_norm = inverse_norm(tree_sum(b_squares, LOG2_LANES))
    tl.store(p_inverse_norm + o_out, b_inverse_norm, mask=m_t)

    p_list = p_destinations + i_b * s_db
    p_own = p_sources + i_b * (n - num_destinations)
    if NEAR:
        # There is at least one destination.
        p_tiles = p_starts + i_b * (tl.maximum(height // SY, 1) * tl.maximum(width // SX, 1) + 1)
        m_destination, b_low, b_place = order_by_tile(
            p_list, p_tiles, i_t, height, width, num_destinations, SY, SX, BLOCK_T
        )
    else:
        # How many destinations come before each token.
        b_low = lower_bounds(p_list, o_t, num_destinations)
        m_found = b_low < num_destinations
        m_destination = m_found & (tl.load(p_list + b_low, mask=m_found, other=-1) == o_t)
        b_place = o_t - b_low
    # Without destinations every token is its own match.
    m_done = m_destination | (b_low + num_destinations == 0)
    tl.store(p_own + b_place, o_t, mask=m_t & ~m_destination)
    b_word = destination_word(o_t, b_inverse_norm)
    tl.store(p_words + i_b * num_destinations + b_low, b_word, mask=m_t & m_destination)
    b_key = tl.where(m_done, ordered_key(tl.full((BLOCK_T,), float("-inf"), tl.float32)), INT_MIN)
    tl.store(p_packed + o_out, pack(b_key, o_t), mask=m_t)


@triton.jit(do_not_specialize=_INTEGERS)
def bipartite_match_kernel(
    p_x,
    p_inverse_norm,
    p_sources,
    p_words,
    p_packed,
    n,
    units,
    num_destinations,
    num_sources,
    num_first,
    rows,
    products,
    height,
    width,
    window,
    s_xb,
    s_xn,
    UNIT: tl.constexpr,
    FAR: tl.constexpr,
    EVEN: tl.constexpr,
    PART: tl.constexpr,
    NEST: tl.constexpr,
    LONG: tl.constexpr,
    STEPS: tl.constexpr,
    FULL: tl.constexpr,
    ORDERED: tl.constexpr,
    WINDOW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LONG_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program makes `products` tiles (SOURCES sources, BLOCK_N destinations) in a row, destinations first, then
    sources, then batch rows. The sources of a tile are GROUPS groups, BLOCK_M of them and half of the one before. The
    lowest destination is among the first num_first of the list. With WINDOW, the destinations of each row of tiles
    stand together, rows ascending, and a program has whole tiles of sources. Strides of x and its channels count UNIT
    elements; FAR says that offsets within a row of the batch need 64 bits; EVEN that BLOCK_K divides the channels; PART
    is 0 when they are one part; NEST takes a loop for each part, where the compiler cannot put an accumulator aside
    within a loop over all. LONG and STEPS are the channels of sources that are kept, both 0 when they are read again
    for each tile; kept sources are one group. FULL: there are BLOCK_N destinations; ORDERED: what lies BLOCK_N apart in
    the list, or where the last tile laps over the one before, is ascending."""
    wait_for_predecessor(EARLY)
    channels = units * UNIT
    s_row = tl.cast(s_xn, tl.int64 if FAR else tl.int32) * UNIT
    o_j = tl.arange(0, BLOCK_N)
    SOURCES: tl.constexpr = 2 * BLOCK_M - (BLOCK_M >> (GROUPS - 1))
    tiles_m, tiles_n = tl.cdiv(num_sources, SOURCES), tl.cdiv(num_destinations, BLOCK_N)
    last_y, last_x = tl.maximum(height // SY - 1, 0), tl.maximum(width // SX - 1, 0)
    first = tl.program_id(0) * products
    last = tl.minimum(first + products, rows * tiles_m * tiles_n)
    for i_tile in range(first // tiles_n, tl.cdiv(last, tiles_n)):
        i_b = (i_tile // tiles_m).to(tl.int64)
        begin = tl.maximum(first - i_tile * tiles_n, 0) * BLOCK_N
        end = tl.minimum(tl.minimum(last - i_tile * tiles_n, tiles_n) * BLOCK_N, num_destinations)
        p_tokens = p_x + i_b * s_xb * UNIT
        p_list = p_words + i_b * num_destinations
        # On its way while the sources are looked up.
        b_first = destination_token(tl.load(p_list + o_j, mask=o_j < num_first, other=INT_MAX))
        # A value of each group of sources.
        b_source, m_m, m_a, b_row_scale, o_a = (), (), (), (), ()
        for i in tl.static_range(GROUPS):
            o_m = i_tile % tiles_m * SOURCES + 2 * (BLOCK_M - (BLOCK_M >> i)) + tl.arange(0, BLOCK_M >> i)
            m_own = o_m < num_sources
            b_own = tl.load(p_sources + i_b * num_sources + o_m, mask=m_own, other=0)
            b_inverse = tl.load(p_inverse_norm + i_b * n + b_own, mask=m_own, other=0.0)
            # What a row without a direction is multiplied to is not looked at, be it NaN.
            m_some = b_inverse > 0.0
            b_source, m_m, m_a = b_source + (b_own,), m_m + (m_own,), m_a + (m_some,)
            b_row_scale = b_row_scale + (tl.where(m_some, b_inverse, 1.0),)
            o_a = o_a + (b_own * s_row,)

        for i_n in range(BLOCK_N, num_first, BLOCK_N):
            b_more = tl.load(p_list + i_n + o_j, mask=i_n + o_j < num_first, other=INT_MAX)
            b_first = tl.minimum(b_first, destination_token(b_more))
        lowest = tl.min(b_first, 0)

        if LONG + STEPS > 0:
            b_high, b_high_token = best_kept(
                *(p_tokens, p_list, o_a[0], b_row_scale[0], begin, end, num_destinations, channels, s_row),
                *(LONG, STEPS, EVEN, FULL, ORDERED, BLOCK_M, BLOCK_N, BLOCK_K, LONG_K),
            )
            b_best, b_best_token = (b_high,), (b_high_token,)
        else:
            b_tile_y, b_tile_x = (), ()
            if WINDOW:
                top, bottom = INT_MAX, -1
                for i in tl.static_range(GROUPS):
                    b_tile_y = b_tile_y + (tl.minimum(b_source[i] // width // SY, last_y),)
                    b_tile_x = b_tile_x + (tl.minimum(b_source[i] % width // SX, last_x),)
                    top = tl.minimum(tl.min(tl.where(m_m[i], b_tile_y[i], INT_MAX), 0), top)
                    bottom = tl.maximum(tl.max(tl.where(m_m[i], b_tile_y[i], -1), 0), bottom)
                begin = _lower_bound(p_list, num_destinations, tl.maximum(top - window, 0) * SY * width)
                if bottom + window < last_y:
                    end = _lower_bound(p_list, num_destinations, (bottom + window + 1) * SY * width)
            b_best, b_best_token = best_read(
                *(p_tokens, p_list, o_a, b_row_scale, b_tile_y, b_tile_x),
                *(begin, end, end if WINDOW else num_destinations, channels, s_row, width, last_y, last_x, window),
                *(EVEN, FULL, PART, NEST, WINDOW, SY, SX, PRECISION, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K),
            )

        for i in tl.static_range(GROUPS):
            m_matched = m_a[i] & (b_best[i] > float("-inf"))
            b_similarity = tl.where(m_matched, b_best[i], float("-inf"))
            b_match = tl.where(m_matched, b_best_token[i], lowest)
            p_out = p_packed + i_b * n + b_source[i]
            tl.atomic_max(p_out, pack(ordered_key(b_similarity), b_match), mask=m_m[i], sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def match_unpack_kernel(p_packed, p_similarity, p_match, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_predecessor(EARLY)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < count
    b_packed = tl.load(p_packed + o_t, mask=m_t, other=0)
    tl.store(p_similarity + o_t, key_to_float(unpack_key(b_packed)), mask=m_t)
    tl.store(p_match + o_t, unpack_index(b_packed), mask=m_t)


def _products(
    x: Tensor, num_sources: int, num_destinations: int, window: int | None, config: configs.Config
) -> tuple[int, int]:
    """(tiles that each program makes, programs): as many for each, and on no multiprocessor more than must be."""
    tiles_n = cdiv(num_destinations, config["BLOCK_N"])
    sources = 2 * config["BLOCK_M"] - (config["BLOCK_M"] >> (config["GROUPS"] - 1))
    tiles = x.shape[0] * cdiv(num_sources, sources) * tiles_n
    if window is not None:
        # A window has few destinations: a program goes through them for a whole tile of sources.
        return tiles_n, tiles // tiles_n
    if "SPLIT" in config:
        each = cdiv(tiles_n, config["SPLIT"])
    else:
        at_once = configs.multiprocessors(x.device) * config.get("RESIDENT", 1)
        each = cdiv(tiles, at_once)
    return each, cdiv(tiles, each)


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
    words: Tensor,
    num_first: int,
    grid: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    window: int | None,
    packed: Tensor,
    config: configs.Config | None = None,
) -> None:
    """The matching launch alone; x (P, N, C), inverse_norm (P, N), sources (P, S), words (P, D), packed (P, N)."""
    rows, n, channels = x.shape
    num_sources, num_destinations = sources.shape[1], words.shape[1]
    config = config or pick_match(x, num_sources, num_destinations, window)
    config = {"NEST": False, "GROUPS": 1, **config, **({} if GROUPED else {"GROUPS": 1})}
    products, count = _products(x, num_sources, num_destinations, window, config)
    # Read only with a window: without one, a binary for each stride would be the same.
    (height, width), (sy, sx) = (grid, stride) if window is not None and grid and stride else ((1, n), (1, 1))
    block_n, block_k = config["BLOCK_N"], BLOCK_K[x.dtype]
    keep = config.get("KEEP", False) and window is None and channels <= LONGEST_PART
    long = channels // PART if keep else 0
    constants = {key: value for key, value in config.items() if key not in _HOST}
    programs(bipartite_match_kernel, count)(
        p_x=x,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_words=words,
        p_packed=packed,
        n=n,
        num_destinations=num_destinations,
        num_sources=num_sources,
        num_first=num_first,
        rows=rows,
        products=products,
        height=height,
        width=width,
        # More than the grid is all of it; the kernel counts in 32 bits.
        window=min(window or 0, max(height, width)),
        **layout_arguments(x),
        FAR=n * x.stride(1) >= 2**31,
        EVEN=channels % block_k == 0,
        PART=PART if x.dtype != torch.float32 and channels > LONGEST_PART else 0,
        LONG=long,
        STEPS=cdiv(channels - long * PART, block_k) if keep else 0,
        FULL=window is None and num_destinations >= block_n,
        ORDERED=not keep or num_first <= (num_destinations % block_n or block_n),
        WINDOW=window is not None,
        SY=sy,
        SX=sx,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_K=block_k,
        LONG_K=PART,
        **constants,
        **EXACT,
        **early(x.device),
    )


def config_op(dtype: torch.dtype, channels: int, window: int | None) -> str:
    """Whose configs such a match takes: float32 tiles take twice the bytes, a window takes registers, and few channels
    leave room for sources that stay."""
    if dtype == torch.float32:
        return "bipartite_match_fp32"
    if window is not None:
        return "bipartite_match_window"
    return "bipartite_match_narrow" if channels <= LONGEST_PART else "bipartite_match"


def pick_match(x: Tensor, num_sources: int, num_destinations: int, window: int | None) -> configs.Config:
    """The config for a match of this size. Up to 16 rows count as one, so that all such batches run the same binary."""
    op = config_op(x.dtype, x.shape[2], window)
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

    Three launches: norms and lists, matching, and unpacking of what programs that share sources agreed on.
    """
    x, destinations = unit_last_stride(x), unit_last_stride(destinations)
    rows, n, _ = x.shape
    d = destinations.shape[1]
    similarity = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    match = torch.empty((rows, n), dtype=torch.int32, device=x.device)
    if rows * n == 0:
        return similarity, match
    # What a call without a window does not look at.
    grid, stride = grid or (1, n), stride or (1, 1)
    # Tiles larger than the grid are one tile; the kernels count in 32 bits.
    stride = (min(stride[0], grid[0]), min(stride[1], grid[1]))
    near = 0 < d < n and is_near(window, grid, stride, d)
    inverse_norm = torch.empty_like(similarity)
    sources = torch.empty((rows, n - d), dtype=torch.int32, device=x.device)
    words = torch.empty((rows, d), dtype=torch.int64, device=x.device)
    packed = torch.empty((rows, n), dtype=torch.int64, device=x.device)
    starts = sources
    if near:
        starts = torch.empty((rows, tiles_of(grid, stride) + 1), dtype=torch.int32, device=x.device)
    (height, width), (sy, sx) = (grid, stride) if near else ((1, n), (1, 1))
    prepare = configs.pick("match_prepare", x.device, max(1, rows // 16) * x[0].numel() * x.element_size())
    step, vector = norm_step(x.shape[2]), 16 // x.element_size()
    block = max(prepare["BLOCK_T"] * CHANNELS.value // step, 1)
    programs(match_prepare_kernel, cdiv(n, block), rows)(
        p_x=x,
        p_destinations=destinations,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_words=words,
        p_starts=starts,
        p_packed=packed,
        n=n,
        num_destinations=d,
        height=height,
        width=width,
        s_db=destinations.stride(0),
        NEAR=near,
        SY=sy,
        SX=sx,
        LOG2_LANES=(step // vector).bit_length() - 1,
        LOG2_VECTOR=vector.bit_length() - 1,
        **layout_arguments(x),
        **{**prepare, "BLOCK_T": block},
        **EXACT,
        **early(x.device),
    )
    if near and window is not None:
        launch_match_near(x, inverse_norm, sources, words, starts, d, grid, stride, window, packed, config)
    elif 0 < d < n:
        launch_match(x, inverse_norm, sources, words, 1, grid, stride, window, packed, config)
    programs(match_unpack_kernel, cdiv(rows * n, 1024))(
        p_packed=packed,
        p_similarity=similarity,
        p_match=match,
        count=rows * n,
        BLOCK=1024,
        num_warps=4,
        **EXACT,
        **early(x.device),
    )
    return similarity, match
