"""Best destination of every source by cosine similarity, without the similarity matrix (Bolya et al. 2023).

A program multiplies a tile of sources with one tile of destinations after another on the tensor cores, scales by the
inverse norms of the destinations, and keeps a running (similarity, lowest index) maximum of each source in registers.
When there are too few tiles of sources to fill the chip, several programs share one, each with a part of the
destinations; they combine through a 64-bit atomic maximum, which is the same in any order.

The same bits under every config: the channels are always summed in steps of BLOCK_K, in order, into float32, so that
BLOCK_M, BLOCK_N, the split and the number of warps decide only which program computes a similarity. On tensor cores
this holds among configs that use one kind of instruction; the shipped ones all have BLOCK_M >= 64 and at least 4 warps.

float32 input uses three TF32 products per product ("tf32x3"): plain TF32 is off by 3e-4 and would change matches, and
"ieee" does not use the tensor cores. What tf32x3 drops is below 2^-21 of a product, the size of float32 rounding. AMD
GPUs multiply float32 natively, and take "ieee".
"""

from __future__ import annotations

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
from .launching import programs

# 128 bytes of a row: the width of a shared-memory swizzle atom.
BLOCK_K = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
_INTEGERS = ["n", "num_destinations", "num_sources", "num_first", "height", "width", "window"]


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


@triton.jit(do_not_specialize=["n", "num_destinations"])
def match_prepare_kernel(
    p_x,
    p_destinations,
    p_inverse_norm,
    p_sources,
    p_packed,
    p_similarity,
    p_match,
    n,
    channels,
    num_destinations,
    s_xb,
    s_xn,
    s_db,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Inverse norms, the list of sources, and the results at destinations, when no score pass has made them."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, CHANNELS)
    m_t = o_t < n
    p_rows = p_x + i_b * s_xb + o_t.to(tl.int64)[:, None] * s_xn + o_c[None, :]
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
    channels,
    num_destinations,
    num_sources,
    num_first,
    height,
    width,
    window,
    s_xb,
    s_xn,
    s_db,
    WINDOW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (tile of sources, part of the destinations, batch row). The lowest destination is among the first
    num_first of the list. With WINDOW, the destinations of each row of tiles stand together, rows ascending."""
    i_m, i_s, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_x += i_b * s_xb
    p_inverse_norm += i_b * n
    p_sources += i_b * num_sources
    p_destinations += i_b * s_db
    o_k, o_j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_sources
    b_source = tl.load(p_sources + o_m, mask=m_m, other=0)
    b_inverse = tl.load(p_inverse_norm + b_source, mask=m_m, other=0.0)
    # Rows without a direction are read as zeros: no NaN enters the products.
    m_a = b_inverse > 0.0
    b_row_scale = tl.where(m_a, b_inverse, 1.0)
    p_a = p_x + b_source.to(tl.int64)[:, None] * s_xn

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
    if SPLIT > 1:
        part = tl.cdiv(tl.cdiv(end - begin, SPLIT), BLOCK_N) * BLOCK_N
        begin = begin + i_s * part
        end = tl.minimum(begin + part, end)

    b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_best_token = tl.zeros((BLOCK_M,), tl.int32) + lowest
    b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop over (tile of destinations, step of channels), so that loads run ahead across tiles as well.
    steps = tl.cdiv(channels, BLOCK_K)
    for i in range(0, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * steps):
        i_k = i % steps
        o_n = begin + i // steps * BLOCK_N + o_j
        m_n = o_n < end
        b_destination = tl.load(p_destinations + o_n, mask=m_n, other=0)
        b_scale = tl.load(p_inverse_norm + b_destination, mask=m_n, other=0.0)
        m_k = i_k * BLOCK_K + o_k < channels
        b_a = tl.load(p_a + i_k * BLOCK_K + o_k[None, :], mask=m_a[:, None] & m_k[None, :], other=0.0)
        p_b = p_x + b_destination.to(tl.int64)[None, :] * s_xn + i_k * BLOCK_K + o_k[:, None]
        b_b = tl.load(p_b, mask=(b_scale > 0.0)[None, :] & m_k[:, None], other=0.0)
        b_dot = tl.dot(b_a, b_b, b_dot, input_precision=PRECISION)
        if i_k == steps - 1:
            # -inf for what cannot be matched; adding zero also makes -0 and 0 one similarity. The row's own scale is
            # applied before comparing: it can round two values to one, and parts of a split compare what is rounded.
            b_bias = tl.where(b_scale > 0.0, 0.0, float("-inf"))
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
            b_dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    m_matched = m_a & (b_best > float("-inf"))
    b_similarity = tl.where(m_matched, b_best, float("-inf"))
    b_match = tl.where(m_matched, b_best_token, lowest)
    o_out = i_b * n + b_source
    if PACKED:
        b_packed = pack(ordered_key(b_similarity), b_match)
        if SPLIT > 1:
            tl.atomic_max(p_packed + o_out, b_packed, mask=m_m, sem="relaxed")
        else:
            tl.store(p_packed + o_out, b_packed, mask=m_m)
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


def split_of(x: Tensor, num_sources: int, num_destinations: int, window: int | None, config: configs.Config) -> int:
    """How many programs share a tile of sources, a power of two: enough of them to fill the chip twice."""
    if "SPLIT" in config:
        return config["SPLIT"]
    tiles = triton.cdiv(num_sources, config["BLOCK_M"]) * x.shape[0]
    blocks = triton.cdiv(num_destinations, config["BLOCK_N"])
    split = 1
    while window is None and tiles * split < 2 * configs.multiprocessors(x.device) and split * 2 <= blocks:
        split *= 2
    return split


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
    (height, width), (sy, sx) = grid or (1, n), stride or (1, 1)
    programs(bipartite_match_kernel, triton.cdiv(sources.shape[1], config["BLOCK_M"]), split, rows)(
        p_x=x,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        p_destinations=destinations,
        **outputs,
        n=n,
        channels=channels,
        num_destinations=destinations.shape[1],
        num_sources=sources.shape[1],
        num_first=num_first,
        height=height,
        width=width,
        window=window or 0,
        s_xb=x.stride(0),
        s_xn=x.stride(1),
        s_db=destinations.stride(0),
        WINDOW=window is not None,
        SY=sy,
        SX=sx,
        SPLIT=split,
        PACKED=packed,
        PRECISION="tf32x3" if x.dtype == torch.float32 and not torch.version.hip else "ieee",
        BLOCK_M=config["BLOCK_M"],
        BLOCK_N=config["BLOCK_N"],
        BLOCK_K=BLOCK_K[x.dtype],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **EXACT,
    )


def pick_match(x: Tensor, num_sources: int, num_destinations: int, window: int | None) -> configs.Config:
    """The config for a match of this size. float32 tiles take twice the bytes, a window takes registers."""
    op = "bipartite_match" if window is None else "bipartite_match_window"
    if x.dtype == torch.float32:
        op = "bipartite_match_fp32"
    return configs.pick(op, x.device, x.shape[0] * num_sources * num_destinations)


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
    rows, n, channels = x.shape
    d = destinations.shape[1]
    similarity = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    match = torch.empty((rows, n), dtype=torch.int32, device=x.device)
    if rows * n == 0:
        return similarity, match
    config = config or pick_match(x, n - d, d, window)
    split = split_of(x, n - d, d, window, config)
    inverse_norm = torch.empty_like(similarity)
    sources = torch.empty((rows, n - d), dtype=torch.int32, device=x.device)
    packed = torch.empty((rows, n), dtype=torch.int64, device=x.device) if split > 1 else match
    outputs = {"p_packed": packed, "p_similarity": similarity, "p_match": match}
    prepare = configs.pick("match_prepare", x.device, x.numel() * x.element_size())
    programs(match_prepare_kernel, triton.cdiv(n, prepare["BLOCK_T"]), rows)(
        p_x=x,
        p_destinations=destinations,
        p_inverse_norm=inverse_norm,
        p_sources=sources,
        **outputs,
        n=n,
        channels=channels,
        num_destinations=d,
        s_xb=x.stride(0),
        s_xn=x.stride(1),
        s_db=destinations.stride(0),
        PACKED=split > 1,
        **prepare,
        **EXACT,
    )
    if 0 < d < n:
        launch_match(x, inverse_norm, sources, destinations, 1, grid, stride, window, split, outputs, split > 1, config)
    if split > 1:
        programs(match_unpack_kernel, triton.cdiv(rows * n, 1024))(
            p_packed=packed, p_similarity=similarity, p_match=match, count=rows * n, BLOCK=1024, num_warps=4, **EXACT
        )
    return similarity, match
