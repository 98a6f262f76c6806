"""The launchers with the arguments of the ops in `torch.ops.bigain`, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bigain_kernels import backends
from bigain_kernels.reference.merge_plan import merged_tiles

from ._common import FLOAT_DTYPES, MAX_TOKENS
from .bipartite_match import launch_bipartite_match
from .kv_downsample import launch_kv_downsample
from .laplacian_score import launch_laplacian_score, launch_select_destinations
from .lgtm_plan import launch_lgtm_plan
from .merge_plan import Tables, launch_block_merge_plan, launch_merge_plan
from .token_merge import launch_token_merge, launch_token_unmerge

_PLANS = ("merge_plan", "block_merge_plan", "lgtm_plan")


def _laplacian_score(x: Tensor, height: int, width: int, norm: str) -> Tensor:
    return launch_laplacian_score(x, (height, width), norm)


def _select_destinations(score: Tensor, height: int, width: int, sy: int, sx: int) -> Tensor:
    return launch_select_destinations(score, (height, width), (sy, sx))


def _bipartite_match(
    x: Tensor, destinations: Tensor, window: int, height: int, width: int, sy: int, sx: int
) -> tuple[Tensor, Tensor]:
    if window < 0:
        return launch_bipartite_match(x, destinations)
    return launch_bipartite_match(x, destinations, window, (height, width), (sy, sx))


def _block_merge_plan(score: Tensor, height: int, width: int, sy: int, sx: int, r: int, reduce: str) -> Tables:
    grid, stride = (height, width), (sy, sx)
    return launch_block_merge_plan(score, grid, stride, merged_tiles(grid, stride, r), reduce)


def _lgtm_plan(x: Tensor, height: int, width: int, sy: int, sx: int, r: int, window: int, share: int) -> Tables:
    return launch_lgtm_plan(x, (height, width), (sy, sx), r, None if window < 0 else window, share)


def _token_merge(
    x: Tensor, slot: Tensor, offsets: Tensor, members: Tensor, anchor: Tensor, mode: str, weights: Tensor | None
) -> Tensor:
    return launch_token_merge(x, offsets.contiguous(), members.contiguous(), anchor.contiguous(), mode, weights)


def _token_unmerge(
    y: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    return launch_token_unmerge(y, slot.contiguous(), residual, gate)


def _kv_downsample(
    xs: list[Tensor], height: int, width: int, sy: int, sx: int, alpha: float, row_alpha: Tensor | None
) -> list[Tensor]:
    return launch_kv_downsample(xs, (height, width), (sy, sx), alpha if row_alpha is None else row_alpha)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (each for each in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(each, Tensor))


def refusal(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernels cannot run a call, or None."""
    tensors = list(_tensors(args))
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return f"does not compute in {str(tensor.dtype).removeprefix('torch.')}"
    if op in _PLANS and tensors[0].shape[1] > MAX_TOKENS:
        return f"plans rows of at most {MAX_TOKENS} tokens, got {tensors[0].shape[1]}"
    return None


def _guarded(op: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        reason = refusal(op, args)
        if reason is not None:
            return backends.next_after("triton", op, "cuda", reason)(*args)
        device = next(_tensors(args)).device
        # Triton launches on the current device.
        elsewhere = device.index is not None and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            return launch(*args)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    op: _guarded(op, launch)
    for op, launch in {
        "laplacian_score": _laplacian_score,
        "select_destinations": _select_destinations,
        "bipartite_match": _bipartite_match,
        "merge_plan": launch_merge_plan,
        "block_merge_plan": _block_merge_plan,
        "lgtm_plan": _lgtm_plan,
        "token_merge": _token_merge,
        "token_unmerge": _token_unmerge,
        "kv_downsample": _kv_downsample,
    }.items()
}
