"""What both plan kernels are made of: the choice of the r highest keys, and the tables of a MergePlan.

Several programs plan one row. Each of them decides on the whole row, which takes a few passes over N integers, and
writes the tables of a part of the tokens; no program waits for another, and none does more than the others. Two steps
of a row would be serial, and are not:

* The r-th highest key is found by its bits, eight of them a pass where counting in shared memory is quick (HISTOGRAM),
  else one by one.
* A member's place is the start of its slot, which is a prefix sum of the sizes of slots, plus the members before it:
  those in front of the program's tokens are counted, and among TOKENS of its own all pairs are compared.

All of it is integer work whose result does not depend on the order in which threads run, and whose time hardly depends
on the data. A row of up to BLOCK tokens (SINGLE) is searched in registers, and with HISTOGRAM its tables are made there
as well; else passes hand their results on through a scratch buffer of the program, with a barrier between writing and
reading.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigain_kernels.declaration import Tables

from . import configs
from ._common import EXACT, INT_MAX
from .early import early
from .launching import cdiv, power_of_2

# From this version on Triton counts with atomics in shared memory; before, with ballots, a pass costs five times that.
HISTOGRAM = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
# Words of scratch for each token and program: numbers, or what is packed into a word; assignments; counters.
SCRATCH = tl.constexpr(3)
# More programs than this for one row would mostly do again what the others do; fewer where their scratch, which is for
# SCRATCH_TOKENS of all programs together, would leave the L2 cache.
MOST_PARTS, LONG_PARTS, SCRATCH_TOKENS = 64, 32, 1 << 20


@triton.jit
def order_of(b_key):
    """int32 keys as unsigned numbers, the lowest for the highest key. The last number stands for what never merges."""
    return (b_key ^ INT_MAX).to(tl.uint32, bitcast=True)


@triton.jit
def load_order(p_order, o_n):
    return tl.load(p_order + o_n).to(tl.uint32, bitcast=True)


@triton.jit
def _digits(b_order, o_n, equal, prefix, shift, TIES: tl.constexpr):
    """How many numbers of a block have the bits of `prefix` above the eight at `shift`, for every value of these eight;
    with TIES, how many tokens whose number is `equal`."""
    b_digit = ((o_n.to(tl.uint32) if TIES else b_order) - prefix) >> shift
    m_digit = b_digit < 256
    if TIES:
        m_digit = m_digit & (b_order == equal)
    return tl.histogram((b_digit & 255).to(tl.int32), 256, mask=m_digit)


@triton.jit
def _below(b_order, o_n, equal, number, TIES: tl.constexpr):
    """1 for the numbers of a block that are below `number`; with TIES, for such tokens whose number is `equal`."""
    if TIES:
        return ((b_order == equal) & (o_n.to(tl.uint32) < number)).to(tl.int32)
    return (b_order < number).to(tl.int32)


@triton.jit
def _count_digits(
    b_order, p_order, blocks, equal, prefix, shift, TIES: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):
    """`_digits` of a row."""
    o_t = tl.arange(0, BLOCK)
    if SINGLE:
        return _digits(b_order, o_t, equal, prefix, shift, TIES)
    b_count = tl.zeros((256,), tl.int32)
    for i in range(0, blocks):
        b_count += _digits(load_order(p_order, i * BLOCK + o_t), i * BLOCK + o_t, equal, prefix, shift, TIES)
    return b_count


@triton.jit
def _count_below(
    b_order, p_order, blocks, equal, number, TIES: tl.constexpr, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of `_below` over a row."""
    o_t = tl.arange(0, BLOCK)
    if SINGLE:
        return tl.sum(_below(b_order, o_t, equal, number, TIES), 0)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, blocks):
        b_count += _below(load_order(p_order, i * BLOCK + o_t), i * BLOCK + o_t, equal, number, TIES)
    return tl.sum(b_count, 0)


@triton.jit
def _lowest(
    b_order, p_order, blocks, equal, count, BITS: tl.constexpr, TIES: tl.constexpr, SINGLE: tl.constexpr,
    HISTOGRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The number X of BITS bits up to which `count` numbers reach (0 for none), how many of these are X, and how many
    there are of X in all; with TIES, of the tokens whose number is `equal`."""
    prefix = tl.full((), 0, tl.uint32)
    left = count + tl.full((), 0, tl.int32)
    there = tl.full((), 0, tl.int32)
    if HISTOGRAM:
        o_digit = tl.arange(0, 256)
        for step in range(0, BITS // 8):
            shift = BITS - 8 - 8 * step
            b_count = _count_digits(b_order, p_order, blocks, equal, prefix, shift, TIES, SINGLE, BLOCK)
            digit = tl.min(tl.where(tl.cumsum(b_count, 0) >= left, o_digit, 255), 0)
            left -= tl.sum(tl.where(o_digit < digit, b_count, 0), 0)
            there = tl.sum(tl.where(o_digit == digit, b_count, 0), 0)
            prefix |= digit.to(tl.uint32) << shift
    else:
        for step in range(0, BITS):
            number = prefix | (tl.full((), 1, tl.uint32) << (BITS - 1 - step))
            below = _count_below(b_order, p_order, blocks, equal, number, TIES, SINGLE, BLOCK)
            prefix = tl.where(below < count, number, prefix)
        below = _count_below(b_order, p_order, blocks, equal, prefix, TIES, SINGLE, BLOCK)
        there = _count_below(b_order, p_order, blocks, equal, prefix + 1, TIES, SINGLE, BLOCK) - below
        left = count - below
    return prefix, left, there


@triton.jit
def threshold(b_order, p_order, blocks, r, SINGLE: tl.constexpr, HISTOGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """The r lowest numbers of a row, ties to the lowest token, are those for which `is_merged` holds with what this
    returns. The numbers are b_order with SINGLE, else those of `blocks` blocks at p_order."""
    equal, left, there = _lowest(b_order, p_order, blocks, 0, r, 32, False, SINGLE, HISTOGRAM, BLOCK)
    limit = tl.full((), 0xFFFF, tl.uint32)
    TOKEN_BITS: tl.constexpr = 12 if SINGLE and BLOCK <= 4096 and not HISTOGRAM else 16
    if left < there:
        limit, left, there = _lowest(b_order, p_order, blocks, equal, left, TOKEN_BITS, True, SINGLE, HISTOGRAM, BLOCK)
    return equal, limit


@triton.jit
def is_merged(b_order, o_n, equal, limit):
    return (b_order < equal) | ((b_order == equal) & (o_n.to(tl.uint32) <= limit))


@triton.jit
def count_member(p_count, b_assign, o_n, first):
    """Count each merged token of a block for the token that represents it: 1, and 2^16 if it stands before `first`."""
    b_one = 1 + ((o_n < first).to(tl.int32) << 16)
    tl.atomic_add(p_count + b_assign, b_one, mask=b_assign != o_n, sem="relaxed")


@triton.jit
def _pack_starts(b_sum, start, slot):
    """(start << 16 | slot) from sums of sizes, 17 bits, and of slots above them."""
    return (((b_sum & 0x1FFFF) + start) << 16) | ((b_sum >> 17) + slot)


@triton.jit
def _bin(b_token, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the counter of a token stands: the first BLOCK / COLUMNS tokens in one column, which is a thread's."""
    return b_token % (BLOCK // COLUMNS) * COLUMNS + b_token // (BLOCK // COLUMNS)


@triton.jit
def _count_all(p_count, b_bin, first, HISTOGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """The counters of a row's tokens: how many have each bin and, in the upper half of p_count, how many of these stand
    before `first`."""
    if HISTOGRAM:
        return tl.histogram(b_bin, BLOCK)
    o_b = tl.arange(0, BLOCK)
    tl.store(p_count + o_b, tl.zeros((BLOCK,), tl.int32))
    tl.debug_barrier()
    tl.atomic_add(p_count + b_bin, 1 + ((o_b < first).to(tl.int32) << 16), sem="relaxed")
    tl.debug_barrier()
    return tl.load(p_count + o_b) & 0xFFFF


@triton.jit
def write_tables(
    b_assign, p_assign, p_count, p_pack, p_slot, p_offsets, p_members, p_anchor, n, num_slots, first, last,
    SINGLE: tl.constexpr, HISTOGRAM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tables of the tokens first to last - 1 of one row; `first` is a multiple of TOKENS.

    b_assign is the token that represents each token, itself for anchors and behind the row. Without SINGLE it is at
    p_assign, whole blocks, and p_count is what `count_member` has counted; then p_pack is written as well.
    """
    COLUMNS: tl.constexpr = BLOCK if BLOCK < 256 else 256
    o_b = tl.arange(0, BLOCK)
    if SINGLE:
        # Anchors are the tokens that represent any. Their sizes are summed down the columns, then across.
        b_bin = _bin(b_assign, BLOCK, COLUMNS)
        b_count = tl.reshape(_count_all(p_count, b_bin, first, HISTOGRAM, BLOCK), (BLOCK // COLUMNS, COLUMNS))
        b_size = tl.where(b_count > 0, (1 << 17) + b_count, 0)
        b_column = tl.sum(b_size, 0)
        b_sum = tl.cumsum(b_size, 0) - b_size + (tl.cumsum(b_column, 0) - b_column)[None, :]
        b_pack = tl.reshape(_pack_starts(b_sum, 0, 0), (BLOCK,))
    else:
        start, slot = n * 0, n * 0
        for i in range(0, tl.cdiv(n, BLOCK)):
            o_n = i * BLOCK + o_b
            b_count = tl.load(p_count + o_n) & 0xFFFF
            b_size = tl.where(tl.load(p_assign + o_n) == o_n, (1 << 17) + 1 + b_count, 0)
            tl.store(p_pack + o_n, _pack_starts(tl.cumsum(b_size, 0) - b_size, start, slot))
            total = tl.sum(b_size, 0)
            start += total & 0x1FFFF
            slot += total >> 17
        tl.debug_barrier()

    o_t = tl.arange(0, TOKENS)
    for begin in range(first, last, TOKENS):
        o_own = begin + o_t
        m_own = o_own < n
        b_to = tl.gather(b_assign, o_own, 0) if SINGLE else tl.load(p_assign + o_own)
        # Words of one slot are less than TOKENS apart, others at least 2^16 - TOKENS.
        b_word = (b_to << 16) + o_t
        b_apart = (b_word[None, :] - b_word[:, None] - 1).to(tl.uint32, bitcast=True)
        b_before = tl.sum((b_apart < TOKENS - 1).to(tl.int32), 0)
        m_anchor = m_own & (b_to == o_own)
        b_place = _bin(b_to, BLOCK, COLUMNS) if SINGLE else b_to
        b_pack_to = tl.gather(b_pack, b_place, 0) if SINGLE else tl.load(p_pack + b_place)
        if SINGLE and HISTOGRAM:
            b_early = tl.gather(tl.histogram(b_bin, BLOCK, mask=o_b < begin), b_place, 0)
        else:
            b_early = (tl.load(p_count + b_place) >> 16) & 0xFFFF
            # These are early for the tokens that come next.
            tl.debug_barrier()
            tl.atomic_add(p_count + b_place, 1 << 16, mask=m_own & (SINGLE | ~m_anchor), sem="relaxed")
            tl.debug_barrier()
        if not SINGLE:
            # The anchor, which is not counted, is a member too.
            b_early += (b_to < begin).to(tl.int32)
        b_start, b_slot = (b_pack_to >> 16) & 0xFFFF, b_pack_to & 0xFFFF
        tl.store(p_members + b_start + b_early + b_before, o_own, mask=m_own)
        tl.store(p_slot + o_own, b_slot, mask=m_own)
        tl.store(p_anchor + b_slot, o_own, mask=m_anchor)
        tl.store(p_offsets + b_slot, b_start, mask=m_anchor)
    tl.store(p_offsets + num_slots, n, mask=first == 0)


def empty_tables(rows: int, n: int, num_slots: int, device: torch.device) -> Tables:
    """Empty (slot, offsets, members, anchor)."""
    widths = (n, num_slots + 1, n, num_slots)
    slot, offsets, members, anchor = (torch.empty((rows, w), dtype=torch.int32, device=device) for w in widths)
    return slot, offsets, members, anchor


def parts_of(n: int, rows: int, device: torch.device, config: configs.Config) -> tuple[int, int]:
    """(programs of a row, tokens of a program): enough programs to fill the chip, where rows have tokens for them."""
    chunks = cdiv(n, config["TOKENS"])
    parts = config.get("PARTS") or max(configs.multiprocessors(device) // rows, 1)
    most = min(MOST_PARTS, max(SCRATCH_TOKENS // n, LONG_PARTS))
    each = cdiv(chunks, min(parts, chunks, most))
    return cdiv(chunks, each), each * config["TOKENS"]


def scratch(rows: int, n: int, parts: int, config: configs.Config, device: torch.device) -> Tensor:
    """int32 words that the programs of a launch have for themselves: SCRATCH for each token of whole blocks."""
    words = rows * parts * SCRATCH.value * cdiv(n, config["BLOCK"]) * config["BLOCK"]
    return torch.empty((words,), dtype=torch.int32, device=device)


def options(n: int, device: torch.device, config: configs.Config | None) -> dict[str, Any]:
    """The constants and options of a launch that plans rows of n tokens."""
    config = {"HISTOGRAM": HISTOGRAM, **(config or configs.pick("merge_plan", device, n << 10))}
    block = min(config["BLOCK"], max(power_of_2(n), 32))
    return {
        **config,
        "SINGLE": n <= block,
        "BLOCK": block,
        "TOKENS": min(config["TOKENS"], block),
        # Four tokens a thread at least: more threads than that only wait for one another, in ballots sooner.
        "num_warps": min(config["num_warps"], max(block // 128, 1), 16 if config["HISTOGRAM"] or n > block else 8),
        **EXACT,
        **early(device),
    }
