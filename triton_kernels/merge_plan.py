"""From matches, or from tile scores, to the tables of a MergePlan: one launch, one program per row, no sort by value.

The r best sources are found by an exact search for the r-th highest key, two bits at a time. Ties, anchors and slots
are numbered by prefix sums in raster order. The members are the tokens sorted by slot with a stable radix sort, two
bits a pass; slot boundaries in the sorted list are the offsets. Everything is integer work whose result does not
depend on the order in which threads run, and whose time does not depend on the data. The passes of one program hand
their results on through a scratch buffer, with a barrier between writing and reading. A row of up to BLOCK tokens
(SINGLE) is searched in registers; longer ones are read again, from the cache, in every step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._common import EXACT, INT_MIN, check_tokens, ordered_key, unit_last_stride, unpack_index, unpack_key
from .launching import programs

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _count_digits(b_key, prefix, shift):
    """How many keys share the bits above the digit at `shift` with `prefix`, per digit 1, 2, 3: 21 bits each."""
    # Unsigned order: signed keys with the sign bit flipped.
    b_bits = b_key.to(tl.uint32, bitcast=True) ^ 0x80000000
    b_above = (b_bits.to(tl.int64) >> shift) ^ (prefix >> shift)
    b_one = tl.full(b_key.shape, 1, tl.int64) << (21 * (b_above - 1))
    return tl.sum(tl.where((b_above > 0) & (b_above < 4), b_one, 0), 0)


@triton.jit
def threshold(p_keys, n, r, SINGLE: tl.constexpr, BLOCK: tl.constexpr):
    """The r-th highest key T (INT_MAX when r = 0) and how many keys equal to T are among the r highest."""
    o_n = tl.arange(0, BLOCK)
    b_key = tl.load(p_keys + o_n, mask=o_n < n, other=INT_MIN)
    # Bits of T found so far, as an unsigned number; `left` keys that share them are still to be taken.
    prefix = tl.full((), 0, tl.int64)
    left = r + tl.full((), 0, tl.int64)
    for step in range(0, 16):
        shift = 30 - 2 * step
        if SINGLE:
            counts = _count_digits(b_key, prefix, shift)
        else:
            counts = tl.full((), 0, tl.int64)
            for i in range(0, tl.cdiv(n, BLOCK)):
                o_i = i * BLOCK + o_n
                counts += _count_digits(tl.load(p_keys + o_i, mask=o_i < n, other=INT_MIN), prefix, shift)
        three = counts >> 42
        two = three + ((counts >> 21) & 0x1FFFFF)
        one = two + (counts & 0x1FFFFF)
        digit = tl.where(left <= three, 3, tl.where(left <= two, 2, tl.where(left <= one, 1, 0))).to(tl.int64)
        left -= tl.where(digit == 3, 0, tl.where(digit == 2, three, tl.where(digit == 1, two, one)))
        prefix |= digit << shift
    return (prefix ^ 0x80000000).to(tl.int32), left.to(tl.int32)


@triton.jit
def write_tables(p_assign, p_work, p_slot, p_offsets, p_members, p_anchor, n, num_slots, BLOCK: tl.constexpr):
    """All four tables from p_assign (N): the token that represents each token, itself for anchors.

    p_work has room for 2 N; p_assign is not read after the anchors and slots are known and may be its first half.
    """
    o_t = tl.arange(0, BLOCK)
    before = num_slots * 0
    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        m_anchor = m_n & (tl.load(p_assign + o_n, mask=m_n, other=-1) == o_n)
        b_rank = before + tl.cumsum(m_anchor.to(tl.int32), 0) - 1
        tl.store(p_slot + o_n, b_rank, mask=m_anchor)
        tl.store(p_anchor + b_rank, o_n, mask=m_anchor)
        before += tl.sum(m_anchor.to(tl.int32), 0)
    tl.debug_barrier()
    # A word is (slot, token), 16 bits each: what the sort moves. Anchors' slots are read and not written here.
    p_from = p_work + n
    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        b_assign = tl.load(p_assign + o_n, mask=m_n, other=0)
        b_slot = tl.load(p_slot + b_assign, mask=m_n, other=0)
        tl.store(p_slot + o_n, b_slot, mask=m_n & (b_assign != o_n))
        tl.store(p_from + o_n, (b_slot << 16) | o_n, mask=m_n)
    tl.debug_barrier()

    # Stable radix sort by slot; the counts of four digits travel in one 64-bit sum, 16 bits each.
    shift = num_slots * 0 + 16
    bits = num_slots - 1
    o_read = num_slots * 0 + n
    while bits > 0:
        totals = tl.full((), 0, tl.int64)
        for i in range(0, tl.cdiv(n, BLOCK)):
            o_n = i * BLOCK + o_t
            b_digit = (tl.load(p_work + o_read + o_n, mask=o_n < n, other=0) >> shift) & 3
            totals += tl.sum(tl.where(o_n < n, tl.full((BLOCK,), 1, tl.int64) << (16 * b_digit), 0), 0)
        # Position of the first element of each digit, packed alike: the sum over the lower digits.
        base = (totals << 16) + (totals << 32) + (totals << 48)
        for i in range(0, tl.cdiv(n, BLOCK)):
            o_n = i * BLOCK + o_t
            m_n = o_n < n
            b_word = tl.load(p_work + o_read + o_n, mask=m_n, other=0)
            b_digit = (b_word >> shift) & 3
            b_one = tl.where(m_n, tl.full((BLOCK,), 1, tl.int64) << (16 * b_digit), 0)
            b_place = base + tl.cumsum(b_one, 0) - b_one
            b_place = ((b_place >> (16 * b_digit)) & 0xFFFF).to(tl.int32)
            tl.store(p_work + (n - o_read) + b_place, b_word, mask=m_n)
            base += tl.sum(b_one, 0)
        o_read = n - o_read
        shift += 2
        bits = bits >> 2
        tl.debug_barrier()

    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        b_word = tl.load(p_work + o_read + o_n, mask=m_n, other=0)
        b_left = tl.load(p_work + o_read + o_n - 1, mask=m_n & (o_n > 0), other=-1)
        b_slot = (b_word >> 16) & 0xFFFF
        m_start = m_n & ((o_n == 0) | (b_slot != ((b_left >> 16) & 0xFFFF)))
        tl.store(p_members + o_n, b_word & 0xFFFF, mask=m_n)
        tl.store(p_offsets + b_slot, o_n, mask=m_start)
    tl.store(p_offsets + num_slots, n)


@triton.jit(do_not_specialize=["n", "num_destinations", "r"])
def merge_plan_kernel(
    p_packed,
    p_similarity,
    p_match,
    p_destinations,
    p_work,
    p_slot,
    p_offsets,
    p_members,
    p_anchor,
    n,
    num_destinations,
    r,
    s_sb,
    s_mb,
    s_db,
    PACKED: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program plans one row. With PACKED, a row of p_packed holds similarity and match, and destinations match
    themselves; otherwise they are marked through p_destinations. p_work is (P, 4 N) int32."""
    i_b = tl.program_id(0).to(tl.int64)
    num_slots = n - r
    p_work += i_b * n * 4
    p_keys, p_assign = p_work + 2 * n, p_work + 3 * n
    p_slot += i_b * n
    p_members += i_b * n
    p_offsets += i_b * (num_slots + 1)
    p_anchor += i_b * num_slots
    o_t = tl.arange(0, BLOCK)
    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        if PACKED:
            b_packed = tl.load(p_packed + i_b * n + o_n, mask=m_n, other=0)
            b_match = unpack_index(b_packed)
            b_key = tl.where(b_match == o_n, INT_MIN, unpack_key(b_packed))
        else:
            b_similarity = tl.load(p_similarity + i_b * s_sb + o_n, mask=m_n, other=0.0)
            b_match = tl.load(p_match + i_b * s_mb + o_n, mask=m_n, other=0)
            b_key = ordered_key(tl.where(b_similarity == b_similarity, b_similarity, float("-inf")))
        tl.store(p_keys + o_n, b_key, mask=m_n)
        tl.store(p_assign + o_n, b_match, mask=m_n)
    tl.debug_barrier()
    if not PACKED:
        # Below the key of -inf: destinations are never merged.
        for i_d in range(0, num_destinations, BLOCK):
            b_token = tl.load(p_destinations + i_b * s_db + i_d + o_t, mask=i_d + o_t < num_destinations, other=0)
            tl.store(p_keys + b_token, tl.full((BLOCK,), INT_MIN, tl.int32), mask=i_d + o_t < num_destinations)
        tl.debug_barrier()
    highest, ties = threshold(p_keys, n, r, SINGLE, BLOCK)
    before = n * 0
    for i in range(0, tl.cdiv(n, BLOCK)):
        o_n = i * BLOCK + o_t
        m_n = o_n < n
        b_key = tl.load(p_keys + o_n, mask=m_n, other=INT_MIN)
        m_tie = m_n & (b_key == highest)
        b_rank = before + tl.cumsum(m_tie.to(tl.int32), 0)
        m_merged = m_n & ((b_key > highest) | (m_tie & (b_rank <= ties)))
        # Each thread reads its own tokens' matches back and writes what represents them.
        b_match = tl.load(p_assign + o_n, mask=m_n, other=0)
        tl.store(p_assign + o_n, tl.where(m_merged, b_match, o_n), mask=m_n)
        before += tl.sum(m_tie.to(tl.int32), 0)
    tl.debug_barrier()
    write_tables(p_assign, p_work, p_slot, p_offsets, p_members, p_anchor, n, num_slots, BLOCK)


def empty_tables(rows: int, n: int, num_slots: int, device: torch.device) -> tuple[Tables, Tensor]:
    """Empty (slot, offsets, members, anchor), and the scratch buffer."""
    widths = (n, num_slots + 1, n, num_slots)
    slot, offsets, members, anchor = (torch.empty((rows, w), dtype=torch.int32, device=device) for w in widths)
    return (slot, offsets, members, anchor), torch.empty((rows, 4 * n), dtype=torch.int32, device=device)


def blocks(op: str, n: int, device: torch.device, config: configs.Config | None) -> dict[str, Any]:
    config = config or configs.pick(op, device, n << 10)
    block = min(config["BLOCK"], max(triton.next_power_of_2(n), 32))
    # Four tokens a thread at least: more threads than that only wait for one another.
    options = {**config, "BLOCK": block, "num_warps": min(config["num_warps"], max(block // 128, 1))}
    return {"SINGLE": n <= block, **options, **EXACT}


def _launch_merge_plan(
    inputs: dict[str, Tensor], strides: dict[str, int], n: int, d: int, r: int, packed: bool, rows: int, config: object
) -> Tables:
    check_tokens(n)
    device = inputs["p_match"].device
    tables, work = empty_tables(rows, n, n - r, device)
    if rows * n:
        programs(merge_plan_kernel, rows)(
            **inputs,
            p_work=work,
            p_slot=tables[0],
            p_offsets=tables[1],
            p_members=tables[2],
            p_anchor=tables[3],
            n=n,
            num_destinations=d,
            r=r,
            **strides,
            PACKED=packed,
            **blocks("merge_plan", n, device, config),  # type: ignore[arg-type]
        )
    else:
        tables[1].zero_()
    return tables


def launch_merge_plan(
    similarity: Tensor, match: Tensor, destinations: Tensor, r: int, config: configs.Config | None = None
) -> Tables:
    """slot (P, N), offsets (P, M + 1), members (P, N), anchor (P, M), all int32, with M = N - r; one launch.

    Args:
        similarity: (P, N) float32.
        match: (P, N) int32.
        destinations: (P, D) int32, distinct in each row.
        r: number of sources that merge, at most N - D.
        config: a candidate of `merge_plan`.
    """
    similarity, match, destinations = (unit_last_stride(t) for t in (similarity, match, destinations))
    inputs = {"p_packed": match, "p_similarity": similarity, "p_match": match, "p_destinations": destinations}
    strides = {"s_sb": similarity.stride(0), "s_mb": match.stride(0), "s_db": destinations.stride(0)}
    rows, n = similarity.shape
    return _launch_merge_plan(inputs, strides, n, destinations.shape[1], r, False, rows, config)


def launch_merge_plan_packed(packed: Tensor, r: int, config: configs.Config | None = None) -> Tables:
    """The same from packed (P, N) int64, contiguous, as the matching kernel writes it: the third launch of L-GTM."""
    inputs = dict.fromkeys(("p_packed", "p_similarity", "p_match", "p_destinations"), packed)
    return _launch_merge_plan(
        inputs, dict.fromkeys(("s_sb", "s_mb", "s_db"), 0), packed.shape[1], 0, r, True, packed.shape[0], config
    )
