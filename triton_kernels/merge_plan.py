"""From matches to the tables of a MergePlan, in one launch: plan_tables.py says how."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bigain_kernels.declaration import Tables

from . import configs
from ._common import INT_MIN, check_tokens, ordered_key, unit_last_stride, unpack_index, unpack_key
from .early import wait_for_predecessor
from .launching import programs
from .plan_tables import (
    SCRATCH,
    count_member,
    empty_tables,
    is_merged,
    load_order,
    options,
    order_of,
    parts_of,
    scratch,
    threshold,
    write_tables,
)


@triton.jit
def _load(p_packed, p_similarity, p_match, o_n, n, PACKED: tl.constexpr):
    """What a block of tokens is ordered by, and their matches; behind the row, what never merges, and themselves."""
    m_n = o_n < n
    if PACKED:
        b_packed = tl.load(p_packed + o_n, mask=m_n, other=0)
        b_match = tl.where(m_n, unpack_index(b_packed), o_n)
        b_key = tl.where(b_match == o_n, INT_MIN, unpack_key(b_packed))
    else:
        b_match = tl.load(p_match + o_n, mask=m_n, other=0)
        b_match = tl.where(m_n, b_match, o_n)
        b_similarity = tl.load(p_similarity + o_n, mask=m_n, other=0.0)
        b_key = ordered_key(tl.where(b_similarity == b_similarity, b_similarity, float("-inf")))
        b_key = tl.where(m_n, b_key, INT_MIN)
    return order_of(b_key), b_match


@triton.jit(do_not_specialize=["n", "num_destinations", "r", "own"])
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
    own,
    s_sb,
    s_mb,
    s_db,
    PACKED: tl.constexpr,
    SINGLE: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (part of the tokens, `own` of them; row). With PACKED, a row of p_packed (P, N) holds similarity and
    match, and destinations match themselves; otherwise they are marked through p_destinations. p_work has SCRATCH
    words for each program and token of whole blocks."""
    wait_for_predecessor(EARLY)
    i_part, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_slots = n - r
    first = i_part * own
    last = tl.minimum(first + own, n)
    blocks = tl.cdiv(n, BLOCK)
    p_packed += i_b * n
    p_similarity += i_b * s_sb
    p_match += i_b * s_mb
    p_destinations += i_b * s_db
    p_work += (i_b * tl.num_programs(0) + i_part) * (blocks * BLOCK * SCRATCH)
    p_assign, p_count = p_work + blocks * BLOCK, p_work + blocks * BLOCK * 2
    p_slot += i_b * n
    p_members += i_b * n
    p_offsets += i_b * (num_slots + 1)
    p_anchor += i_b * num_slots
    o_t = tl.arange(0, BLOCK)
    b_order, b_assign = _load(p_packed, p_similarity, p_match, o_t, n, PACKED)
    if not (SINGLE and PACKED):
        for i in range(0, blocks):
            o_n = i * BLOCK + o_t
            b_load, b_match = _load(p_packed, p_similarity, p_match, o_n, n, PACKED)
            tl.store(p_work + o_n, b_load.to(tl.int32, bitcast=True))
            if not SINGLE:
                tl.store(p_assign + o_n, b_match)
                tl.store(p_count + o_n, tl.zeros((BLOCK,), tl.int32))
        tl.debug_barrier()
    if not PACKED:
        # Destinations are never merged.
        for i_d in range(0, num_destinations, BLOCK):
            b_token = tl.load(p_destinations + i_d + o_t, mask=i_d + o_t < num_destinations, other=0)
            tl.store(p_work + b_token, tl.full((BLOCK,), -1, tl.int32), mask=i_d + o_t < num_destinations)
        tl.debug_barrier()
        b_order = load_order(p_work, o_t)
    equal, limit = threshold(b_order, p_work, blocks, r, SINGLE, HISTOGRAM, BLOCK)
    if SINGLE:
        b_assign = tl.where(is_merged(b_order, o_t, equal, limit), b_assign, o_t)
    else:
        for i in range(0, blocks):
            o_n = i * BLOCK + o_t
            # Each thread reads its own tokens' matches back and writes what represents them.
            b_match = tl.load(p_assign + o_n)
            b_match = tl.where(is_merged(load_order(p_work, o_n), o_n, equal, limit), b_match, o_n)
            tl.store(p_assign + o_n, b_match)
            count_member(p_count, b_match, o_n, first)
        tl.debug_barrier()
    write_tables(
        b_assign, p_assign, p_count, p_work, p_slot, p_offsets, p_members, p_anchor, n, num_slots, first, last,
        SINGLE, HISTOGRAM, TOKENS, BLOCK,
    )  # fmt: skip


def _launch_merge_plan(
    inputs: dict[str, Tensor], strides: dict[str, int], n: int, d: int, r: int, packed: bool, rows: int, config: object
) -> Tables:
    check_tokens(n)
    device = inputs["p_match"].device
    tables = empty_tables(rows, n, n - r, device)
    if rows * n:
        constants = options(n, device, config)  # type: ignore[arg-type]
        parts, own = parts_of(n, rows, device, constants)
        # Packed rows that fit into registers and are counted in shared memory need no scratch.
        spare = packed and constants["SINGLE"] and constants["HISTOGRAM"]
        work = tables[0] if spare else scratch(rows, n, parts, constants, device)
        constants.pop("PARTS", None)
        programs(merge_plan_kernel, parts, rows)(
            **inputs,
            p_work=work,
            p_slot=tables[0],
            p_offsets=tables[1],
            p_members=tables[2],
            p_anchor=tables[3],
            n=n,
            num_destinations=d,
            r=r,
            own=own,
            **strides,
            PACKED=packed,
            **constants,
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
        config: a candidate of `merge_plan`; PARTS in it sets how many programs share a row.
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
