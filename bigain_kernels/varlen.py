"""Merging and pooling of packed sequences, (total, ...) tokens with cu_seqlens, as flash-attn's varlen calls take them.

A packing is one long row to the kernels: a plan of it has positions in the packing, so one launch merges all sequences.
Where sequences begin may be known to the device alone; nothing here waits for it. The grids are known on the host, as
shapes hang on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .checks import check_factor, check_number, check_pair, check_same_device, check_tensor
from .ops import kv_downsample, token_merge, token_unmerge
from .plan import MergePlan

Grid = tuple[int, int]


class PackedPlan(NamedTuple):
    """A merge of packed sequences.

    Attributes:
        plan: of one row, all tokens of the packing; `plan.sizes()[0]` are the sizes of the merged tokens.
        cu_seqlens: (S + 1,) int32, where the sequences of merged tokens begin. The longest of them is no longer than
            before, so a `max_seqlen` from before is a bound that holds.
    """

    plan: MergePlan
    cu_seqlens: Tensor


class _Group(NamedTuple):
    """The images of one grid: their sequences, and (k,) int64, where in the packing each begins."""

    sequences: list[int]
    grid: Grid
    starts: Tensor

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def places(self, starts: Tensor, count: int) -> Tensor:
        """(k * count,) int64: `count` places from each of `starts`."""
        return (starts[:, None] + torch.arange(count, device=starts.device)).flatten()

    def images(self, x: Tensor) -> Tensor:
        """(k, N, C) of packed tokens."""
        places = self.places(self.starts, self.tokens)
        return x.flatten(1).index_select(0, places).unflatten(0, (-1, self.tokens))


class _Shrinking:
    """Where places of a packing come to lie when the images of each group get fewer tokens; all on the device."""

    def __init__(self, total: int, groups: Sequence[_Group], kept: Sequence[int]) -> None:
        self.groups, self.kept = groups, kept
        self.total = total - sum(len(g.sequences) * (g.tokens - k) for g, k in zip(groups, kept, strict=True))
        self.starts = [self.after(group.starts) for group in groups]

    def after(self, places: Tensor) -> Tensor:
        """The place, among fewer tokens, of a token of no image, of an image's first token or of a boundary."""
        return places - self._dropped(places, [group.starts + group.tokens for group in self.groups])

    def before(self, places: Tensor) -> Tensor:
        """The place among all tokens of one among fewer; the inverse of `after`."""
        ends = [start + kept for start, kept in zip(self.starts, self.kept, strict=True)]
        return places + self._dropped(places, ends)

    def _dropped(self, places: Tensor, ends: Sequence[Tensor]) -> Tensor:
        """How many tokens went before each place, by where the images end."""
        found = torch.zeros_like(places)
        for group, kept, end in zip(self.groups, self.kept, ends, strict=True):
            before = torch.searchsorted(end.sort().values, places, right=True)
            found = found + before * (group.tokens - kept)
        return found


def varlen_plan(
    x: Tensor,
    cu_seqlens: Tensor,
    grids: Sequence[Grid | None],
    plan: Callable[[Tensor, Grid], MergePlan],
    starts: Tensor | None = None,
) -> PackedPlan:
    """Plan the merge of packed sequences: that of each image by itself, put together.

    Waits for no device and copies nothing to it, if `plan` does not: a CUDA graph can hold it. What `cu_seqlens` and
    `starts` say is not checked, which would mean to wait.

    Args:
        x: (total, C) or (total, heads, d) packed tokens, those that decide what merges.
        cu_seqlens: (S + 1,) int32; sequence s has the tokens from cu_seqlens[s] to cu_seqlens[s + 1].
        grids: for each sequence the (H, W) of its image; None leaves a sequence as it is, an empty one, too.
        plan: makes the plan of images of one size, (k, H * W, C) in the order of their sequences, such as
            `lambda x, grid: lgtm_plan(x, grid, 0.5)`. Its rows may be shared by images.
        starts: (S,) int32 or int64, the place of each image's first token in the packing; None where images stand at
            the beginning of their sequences. All other tokens, text as a rule, stay. Images at the end have
            `cu_seqlens[1:] - H * W`. What it has for a sequence without an image is not looked at.

    Returns:
        PackedPlan, for `token_merge_varlen` and `token_unmerge_varlen`.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, number of grids, or what `plan` raises or returns.
    """
    groups = _groups(x, "x", cu_seqlens, grids, starts)
    plans = []
    for group in groups:
        found = plan(group.images(x), group.grid)
        if not isinstance(found, MergePlan):
            raise TypeError(f"plan: got a function that returns {type(found).__name__}, expected a MergePlan")
        rows, images = found.num_rows, len(group.sequences)
        if found.num_tokens != group.tokens or rows == 0 or images % rows != 0:
            raise ValueError(
                f"plan: got a function that plans {rows} rows of {found.num_tokens} tokens, expected a divisor of "
                f"{images} rows, of {group.tokens} tokens"
            )
        plans.append(found)
    total, device = x.shape[0], x.device
    shrinking = _Shrinking(total, groups, [each.num_slots for each in plans])
    members = torch.arange(total, device=device)
    offsets = shrinking.before(torch.arange(shrinking.total + 1, device=device))
    slot, anchor = shrinking.after(members), offsets[:-1].clone()
    for group, each, start in zip(groups, plans, shrinking.starts, strict=True):

        def put(
            table: Tensor, first: Tensor, values: Tensor, more: Tensor, group: _Group = group, each: MergePlan = each
        ) -> None:
            """Values of each image, `more` added, into the table from the image's first place on."""
            values = values.repeat(len(group.sequences) // each.num_rows, 1) + more[:, None]
            table.index_copy_(0, group.places(first, values.shape[1]), values.flatten())

        put(slot, group.starts, each.slot, start)
        put(members, group.starts, each.members, group.starts)
        put(offsets, start, each.offsets[:, :-1], group.starts)
        put(anchor, start, each.anchor, group.starts)
    slot, offsets, members, anchor = (table.to(torch.int32)[None] for table in (slot, offsets, members, anchor))
    merged = shrinking.after(cu_seqlens.to(torch.int64)).to(torch.int32)
    return PackedPlan(MergePlan(slot, offsets, members, anchor, (1, total), shrinking.total), merged)


def token_merge_varlen(x: Tensor, packed: PackedPlan, mode: str = "mean", weights: Tensor | None = None) -> Tensor:
    """`token_merge` of packed sequences, in one launch.

    Args:
        x: (total, C) or (total, heads, d); float16, bfloat16, float32 or float64.
        packed: what `varlen_plan` made.
        mode: "mean", "mlerp" or "prune".
        weights: (total,) positive weights of the tokens in the mean, or None.

    Returns:
        (fewer, C) or (fewer, heads, d), the same bits as of each sequence by itself, in which a token of no image is a
        slot of one token; `packed.cu_seqlens` says where each begins.

    Raises:
        TypeError, ValueError: as `token_merge`.
    """
    _check_packed("x", x, packed)
    if weights is not None:
        check_tensor("weights", weights, 1)
        if weights.shape[0] != x.shape[0]:
            raise ValueError(f"weights: got {weights.shape[0]} values, expected {x.shape[0]}, one for each token")
    row = x.flatten(1)[None]
    merged = token_merge(row, packed.plan, mode, None if weights is None else weights[None])
    return merged[0].unflatten(1, x.shape[1:])


def token_unmerge_varlen(y: Tensor, packed: PackedPlan, residual: Tensor | None = None) -> Tensor:
    """`token_unmerge` of packed sequences, in one launch.

    A gate for each sequence is not taken: the op has one for each row, and the packing is one row.

    Args:
        y: (fewer, C) or (fewer, heads, d), as `token_merge_varlen` returns; float16, bfloat16, float32 or float64.
        packed: what `varlen_plan` made.
        residual: (total, ...) added to the result, or None.

    Returns:
        (total, C) or (total, heads, d).

    Raises:
        TypeError, ValueError: as `token_unmerge`.
    """
    _check_packed("y", y, packed)
    if residual is not None:
        _check_tokens("residual", residual)
        expected = (packed.plan.num_tokens, *y.shape[1:])
        if residual.shape != expected:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {expected}")
    rest = None if residual is None else residual.flatten(1)[None]
    return token_unmerge(y.flatten(1)[None], packed.plan, rest)[0].unflatten(1, y.shape[1:])


@overload
def kv_downsample_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    grids: Sequence[Grid | None],
    factor: int | Grid,
    alpha: float | Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def kv_downsample_varlen(
    x: Sequence[Tensor],
    cu_seqlens: Tensor,
    grids: Sequence[Grid | None],
    factor: int | Grid,
    alpha: float | Tensor,
    starts: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]: ...
def kv_downsample_varlen(
    x: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor,
    grids: Sequence[Grid | None],
    factor: int | Grid,
    alpha: float | Tensor,
    starts: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """`kv_downsample` of the images of packed sequences, in one launch for each size of image.

    Args:
        x: (total, C) or (total, heads, d) packed keys or values, or several such tensors; float16, bfloat16, float32 or
            float64.
        cu_seqlens, grids, starts: as `varlen_plan`.
        factor: s or (sy, sx), at most each grid.
        alpha: a number, or an (S,) float32 tensor with one value per sequence.

    Returns:
        The tokens, those of images pooled to the same bits as of each image by itself, a tuple of tensors when several
        were given; and the (S + 1,) int32 `cu_seqlens` of these keys.

    Raises:
        TypeError, ValueError: as `varlen_plan` and `kv_downsample`.
    """
    if not isinstance(x, (Tensor, list, tuple)):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor or a sequence of them")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x: got an empty sequence, expected at least one tensor")
    groups = _groups(tensors[0], "x" if isinstance(x, Tensor) else "x[0]", cu_seqlens, grids, starts)
    for i, tensor in enumerate(tensors[1:], 1):
        _check_tokens(f"x[{i}]", tensor)
        if tensor.shape[0] != tensors[0].shape[0]:
            raise ValueError(f"x[{i}]: got {tensor.shape[0]} tokens, expected {tensors[0].shape[0]}, those of x[0]")
        check_same_device(**{"x[0]": tensors[0], f"x[{i}]": tensor})
    if isinstance(alpha, Tensor):
        check_tensor("alpha", alpha, 1, (torch.float32,))
        if alpha.shape[0] != len(grids):
            raise ValueError(f"alpha: got {alpha.shape[0]} values, expected {len(grids)}, one for each sequence")
    else:
        alpha = check_number("alpha", alpha)
    kept = []
    for group in groups:
        sy, sx = check_factor(factor, group.grid)
        kept.append((group.grid[0] // sy) * (group.grid[1] // sx))
    shrinking = _Shrinking(tensors[0].shape[0], groups, kept)
    source = shrinking.before(torch.arange(shrinking.total, device=cu_seqlens.device))
    results = [tensor.flatten(1).index_select(0, source) for tensor in tensors]
    for group, count, start in zip(groups, kept, shrinking.starts, strict=True):
        rows = alpha if not isinstance(alpha, Tensor) else torch.stack([alpha[s] for s in group.sequences])
        pooled = kv_downsample([group.images(tensor) for tensor in tensors], group.grid, factor, rows)
        for result, each in zip(results, pooled, strict=True):
            result.index_copy_(0, group.places(start, count), each.flatten(0, 1))
    shaped = tuple(result.unflatten(1, tensor.shape[1:]) for result, tensor in zip(results, tensors, strict=True))
    fewer = shrinking.after(cu_seqlens.to(torch.int64)).to(torch.int32)
    return (shaped[0] if isinstance(x, Tensor) else shaped), fewer


def _check_tokens(name: str, x: object) -> None:
    if isinstance(x, Tensor) and x.dim() not in (2, 3):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected 2 or 3 dimensions")
    check_tensor(name, x, x.dim() if isinstance(x, Tensor) else 2)


def _check_packed(name: str, x: object, packed: object) -> None:
    _check_tokens(name, x)
    if not isinstance(packed, PackedPlan):
        raise TypeError(f"packed: got {type(packed).__name__}, expected a PackedPlan")


def _groups(
    x: Tensor, name: str, cu_seqlens: Tensor, grids: Sequence[Grid | None], starts: Tensor | None
) -> list[_Group]:
    """The images of packed sequences by their grid, in the order of each grid's first."""
    _check_tokens(name, x)
    check_tensor("cu_seqlens", cu_seqlens, 1, (torch.int32,))
    if not isinstance(grids, (list, tuple)):
        raise TypeError(f"grids: got {type(grids).__name__}, expected a list or tuple")
    count = cu_seqlens.shape[0] - 1
    if count < 0 or len(grids) != count:
        raise ValueError(f"grids: got {len(grids)}, expected {count}, one less than cu_seqlens has values")
    check_same_device(**{name: x, "cu_seqlens": cu_seqlens})
    if starts is None:
        starts = cu_seqlens[:-1]
    else:
        check_tensor("starts", starts, 1, (torch.int32, torch.int64))
        if starts.shape[0] != count:
            raise ValueError(f"starts: got {starts.shape[0]} values, expected {count}, one for each sequence")
        check_same_device(**{name: x, "starts": starts})
    found: dict[Grid, list[int]] = {}
    for sequence, grid in enumerate(grids):
        if grid is not None:
            found.setdefault(check_pair(f"grids[{sequence}]", grid), []).append(sequence)
    needed = sum(h * w * len(sequences) for (h, w), sequences in found.items())
    if needed > x.shape[0]:
        raise ValueError(f"grids: got images of {needed} tokens, expected at most {x.shape[0]}, the tokens of {name}")
    starts = starts.to(torch.int64)
    return [_Group(sequences, grid, torch.stack([starts[s] for s in sequences])) for grid, sequences in found.items()]
