"""How closely results must agree, for the tests of this package and of backends written elsewhere.

The float64 reference is the truth. One table holds the tolerances; nothing loosens them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .declaration import OPS
from .plan import MergePlan

# (relative, absolute) error allowed against the float64 reference for inputs of order one. float32 covers a sum over a
# few thousand channels; the 16-bit dtypes are computed in float32 and rounded once: half a unit in the last place and
# a bit.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2**-8, 2e-4),
    torch.float16: (2**-11, 5e-5),
}
# Cosine similarities are sums of up to 4,096 products of magnitude 1 / C, accumulated in float32 from exact inputs.
SIMILARITY_TOLERANCE = 4e-6


class Inputs:
    """What the samples of the ops are made of: tokens, and what the reference makes of them, on one device.

    Args:
        dtype: of the tokens.
        device: where they are; "meta" makes shapes alone.
        batch, grid, channels, head_dim: B, (H, W), C, and the channels of a head.

    Attributes:
        grid, stride, n, r: (H, W), (sy, sx), the number of tokens and how many of them are merged.
        x: (B, N, C) tokens.
        q: (B, heads, N, head_dim), the same as queries.
        y: (B, N - r, C) slots.
        w: (6, C), the weight of a projection.
        weights: (B, N) float32, positive.
        alphas: (B,) float32.
    """

    stride = (2, 2)

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch: int = 4,
        grid: tuple[int, int] = (6, 8),
        channels: int = 10,
        head_dim: int = 5,
    ) -> None:
        self.grid, self.n = grid, grid[0] * grid[1]
        self.r = self.n * 5 // 12
        x = torch.randn(batch, self.n, channels, generator=torch.Generator().manual_seed(0))
        self.x = x.to(device, dtype)
        self.q = self.x.unflatten(2, (-1, head_dim)).transpose(1, 2)
        self.y = self.x[:, : self.n - self.r].contiguous()
        self.w = self.x[0, :6]
        self.weights = x.abs().sum(2).to(device)
        self.alphas = torch.linspace(0.8, 1.2, batch, device=device)

    @cached_property
    def score(self) -> Tensor:
        """(4, N) float32."""
        from . import reference

        return reference.laplacian_score(self.x, self.grid)

    @cached_property
    def destinations(self) -> Tensor:
        """(4, D) int32."""
        from . import reference

        return reference.select_destinations(self.score, self.grid, self.stride)

    @cached_property
    def _matched(self) -> tuple[Tensor, Tensor]:
        from . import reference

        return reference.bipartite_match(self.x, self.destinations)

    @property
    def similarity(self) -> Tensor:
        """(4, N) float32."""
        return self._matched[0]

    @property
    def match(self) -> Tensor:
        """(4, N) int32."""
        return self._matched[1]

    @cached_property
    def plan(self) -> MergePlan:
        """The plan with N - r slots."""
        from . import reference

        return reference.merge_plan(self.similarity, self.match, self.destinations, self.r, self.grid)


def samples(inputs: Inputs | None = None) -> dict[str, tuple[str, tuple]]:
    """A few calls of every op: by the name of the op and of the sample, the op and its flat arguments."""
    inputs = inputs or Inputs()
    return {
        f"{op.name} {name}".strip(): (op.name, op.flatten(*arguments))
        for op in OPS.values()
        for name, arguments in op.samples(inputs).items()
    }


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """`actual` agrees with the float64 reference `expected` within the tolerance of `dtype` (by default its own)."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A buffer that shows every element a kernel forgets to write: NaN, or the lowest value of an integer dtype."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype, device=device)


def unit_tokens(x: Tensor) -> Tensor:
    """Tokens scaled to norm one in float64; those without a direction become NaN."""
    values = x.double()
    norm = values.square().sum(-1, keepdim=True).sqrt()
    return values / norm.where((norm > 0) & norm.isfinite(), torch.nan)


def assert_match_is_best(x: Tensor, destinations: Tensor, similarity: Tensor, match: Tensor) -> None:
    """Every match is the best destination of its source, or as good as the best within rounding.

    Recomputes all similarities in float64. Where the match is not the first best destination, the float64 similarities
    of the two must tie within SIMILARITY_TOLERANCE; destinations must have similarity -inf and match themselves.
    """
    unit = unit_tokens(x)
    index = destinations.long()
    best_of = torch.einsum("bnc,bdc->bnd", unit, unit.gather(1, index[..., None].expand(-1, -1, x.shape[2])))
    best_of = best_of.masked_fill(best_of.isnan(), -torch.inf)
    best = best_of.max(dim=2)
    position = (index[:, None, :] == match.long()[..., None]).byte().argmax(dim=2)
    claimed = best_of.gather(2, position[..., None])[..., 0]
    is_destination = torch.zeros_like(match, dtype=torch.bool).scatter_(1, index, True)
    tokens = torch.arange(x.shape[1], device=x.device).expand_as(match)
    assert torch.equal(match[is_destination].long(), tokens[is_destination]), "a destination does not match itself"
    assert (similarity[is_destination] == -torch.inf).all(), "a destination has a similarity"
    sources = ~is_destination
    assert torch.equal(index.gather(1, position)[sources], match.long()[sources]), "a match is no destination"
    usable = best.values > -torch.inf
    first = index.gather(1, best.indices)
    differs = sources & (first != match.long())
    gap = (best.values - claimed).where(usable, torch.zeros_like(claimed))
    assert not (differs & (gap > SIMILARITY_TOLERANCE)).any(), f"a match is {gap[differs].max():.3g} below the best"
    assert not (differs & ~usable).any(), "a source without a similarity does not match the first destination"
    error = (similarity.double() - best.values).where(usable & sources, torch.zeros_like(claimed)).abs()
    assert error.amax() <= SIMILARITY_TOLERANCE if error.numel() else True, f"similarity is off by {error.amax():.3g}"
    assert torch.equal(similarity == -torch.inf, ~usable | is_destination), "-inf stands in the wrong places"


def assert_is_partition(plan: object) -> None:
    """A MergePlan keeps its promises: a partition of the tokens, in the documented order, with consistent tables."""
    assert isinstance(plan, MergePlan)
    rows, n, m = plan.num_rows, plan.num_tokens, plan.num_slots
    for name, width in (("slot", n), ("offsets", m + 1), ("members", n), ("anchor", m)):
        table = getattr(plan, name)
        assert table.dtype == torch.int32, name
        assert table.shape == (rows, width), name
    assert n == plan.grid[0] * plan.grid[1]
    for row in range(rows):
        slot, offsets, members, anchor = (t[row].tolist() for t in (plan.slot, plan.offsets, plan.members, plan.anchor))
        assert offsets[0] == 0
        assert offsets[-1] == n
        assert sorted(members) == list(range(n))
        assert anchor == sorted(set(anchor)), "slots are not in raster order of their anchors"
        for index in range(m):
            inside = members[offsets[index] : offsets[index + 1]]
            assert inside == sorted(inside), "members do not ascend inside a slot"
            assert anchor[index] in inside, "an anchor is not a member of its slot"
            assert all(slot[token] == index for token in inside), "slot and members disagree"
