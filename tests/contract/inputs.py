"""Inputs of the contract suite: small, since the emulator and the interpreter run every thread and program in turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bigain_kernels import MergePlan, PackedPlan, reference, varlen_plan
from bigain_kernels.reference.merge_plan import plan_from_assignment
from bigain_kernels.testing import SIMILARITY_TOLERANCE

from ..packings import Packing, packing
from ..shapes import tokens

# (batch, grid, stride, channels, strided): odd grids, leftover strips, single rows and columns, one token, tiles larger
# than the grid; channels that are one, fewer than a 16-byte vector, no multiple of one, no multiple of a block of 64,
# more than the tensor cores sum at a time, and those of DiT-XL/2 and SDXL.
CASES = [
    (3, (8, 8), (2, 2), 64, False),
    (3, (7, 9), (2, 2), 72, True),
    (1, (9, 5), (3, 2), 320, True),
    (2, (4, 6), (1, 1), 64, False),
    (1, (1, 9), (1, 2), 71, False),
    (2, (9, 1), (2, 1), 64, True),
    (2, (1, 1), (2, 2), 64, False),
    (1, (1, 7), (2, 2), 3, False),
    (2, (6, 5), (2, 2), 1, False),
    (2, (6, 11), (2, 3), 7, True),
    (1, (6, 6), (2, 2), 1152, False),
    (1, (3, 4), (2, 2), 1280, True),
]
IDS = [f"{b}x{g[0]}x{g[1]}-{s[0]}x{s[1]}-C{c}{'-strided' * strided}" for b, g, s, c, strided in CASES]


def odd_tokens(batch: int, n: int, channels: int, dtype: torch.dtype, strided: bool = False, seed: int = 0) -> Tensor:
    """Random tokens among which are a zero, a NaN, an infinite and two equal ones."""
    x = tokens(batch, n, channels, dtype, seed=seed, strided=strided)
    if n >= 8:
        x[0, 1], x[-1, n - 1], x[batch // 2, n // 2] = 0, torch.nan, torch.inf
        x[:, 4] = x[:, 6]
    return x


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same (B, ..., C) tensor in memory where not all accesses of 16 bytes are aligned; around it lies NaN."""
    for start in (0, 2):  # the first row, or none of them
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        view = wide[..., start : start + x.shape[-1]]
        yield view.copy_(x)
    # Rows of a batch element one after another, batch elements one value further apart.
    size = x[0].numel()
    wide = x.new_full((x.shape[0], size + 1), torch.nan)
    wide[:, :size] = x.flatten(1)
    yield wide[:, :size].unflatten(1, x.shape[1:])


def random_match(rows: int, n: int, d: int, seed: int = 0, kind: str = "normal") -> tuple[Tensor, Tensor, Tensor]:
    """similarity, match, destinations with NaN, -inf and both zeros; what stands at destinations is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        similarity = torch.randn(rows, n, generator=generator)
    else:
        similarity = torch.randint(-2, 3, (rows, n), generator=generator) / 4
    order = torch.rand(rows, n, generator=generator).argsort(1)
    destinations = order[:, :d].sort(1).values.int()
    if n > 4:
        similarity[:, ::5], similarity[:, 1::7], similarity[:, 2::9] = torch.nan, -torch.inf, -0.0
    if d:
        match = destinations.gather(1, torch.randint(0, d, (rows, n), generator=generator))
    else:
        match = torch.arange(n, dtype=torch.int32).repeat(rows, 1)
    similarity.scatter_(1, destinations.long(), 3.0)
    return similarity, match, destinations


def random_plan(rows: int, n: int, seed: int = 0) -> MergePlan:
    """A plan that merges three quarters of the sources."""
    d = max(n // 4, 1)
    return reference.merge_plan(*random_match(rows, n, d, seed), (n - d) * 3 // 4, (1, n))


def destinations_of(x: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """The smoothest token of each tile."""
    return reference.select_destinations(reference.laplacian_score(x.float(), grid), grid, stride)


def assert_matches_agree(result, x, destinations, window, grid, stride):
    """(similarity, match) against the float64 reference; where matches differ, both destinations are as similar."""
    similarity, match = result
    expected, expected_match = reference.bipartite_match(x.double(), destinations, window, grid, stride)
    torch.testing.assert_close(similarity, expected, rtol=0, atol=SIMILARITY_TOLERANCE)
    batch, token = (match != expected_match).nonzero(as_tuple=True)
    source = x[batch, token].double()
    cosines = [
        torch.cosine_similarity(source, x[batch, chosen[batch, token].long()].double(), dim=1)
        for chosen in (match, expected_match)
    ]
    assert ((cosines[0] - cosines[1]).abs() <= SIMILARITY_TOLERANCE).all()


def crowded_plan(rows: int, sizes: list[int], n: int) -> MergePlan:
    """A plan of n tokens whose first slots have these sizes, members scattered; the other tokens stay alone."""
    generator = torch.Generator().manual_seed(5)
    assign = torch.arange(n).repeat(rows, 1)
    for row in assign:
        shuffled, start = torch.randperm(n, generator=generator), 0
        for size in sizes:
            members = shuffled[start : start + size]
            row[members] = members.min()
            start += size
    return plan_from_assignment(assign, n - sum(size - 1 for size in sizes), (1, n))


def row_of(plan: MergePlan, row: int) -> MergePlan:
    """The plan of one row."""
    tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
    return MergePlan(*(table[row : row + 1] for table in tables), plan.grid, plan.num_slots)


def positive_weights(batch: int, n: int) -> Tensor:
    return tokens(batch, n, 1, seed=8)[..., 0].abs() + 0.1


def norm_operands(batch: int, channels: int, dtype: torch.dtype, strided: bool = False) -> dict[str, Tensor]:
    """norm_weight, norm_bias, scale and shift of a fused LayerNorm."""
    weight, bias = tokens(2, 1, channels, dtype, seed=10)[:, 0]
    scale, shift = (tokens(batch, 1, channels, dtype, seed=seed, strided=strided)[:, 0] for seed in (11, 12))
    return {"norm_weight": weight, "norm_bias": bias, "scale": scale, "shift": shift}


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_plan(actual: MergePlan, expected: MergePlan) -> None:
    for table in ("slot", "offsets", "members", "anchor"):
        assert torch.equal(getattr(actual, table), getattr(expected, table)), table


def packed_plan(dtype: torch.dtype) -> tuple[Packing, PackedPlan]:
    """Packed sequences of 7 channels, and a plan that is `random_plan` of each image."""
    given = packing(7, dtype=dtype)

    def plan(x: Tensor, grid: tuple[int, int]) -> MergePlan:
        return random_plan(1, x.shape[1])

    return given, varlen_plan(given.x, given.cu_seqlens, given.grids, plan, given.starts)
