"""The launchers with the arguments of the ops in `torch.ops.bigain`, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bigain_kernels.backends.compositions import attend, pool_image
from bigain_kernels.tokens import merged_tiles

from . import configs
from ._common import FLOAT_DTYPES, MAX_TOKENS
from .attention import LARGEST_HEAD, launch_kv_downsample_attention
from .bipartite_match import launch_bipartite_match
from .kv_downsample import launch_kv_downsample
from .laplacian_score import launch_laplacian_score, launch_select_destinations
from .lgtm_plan import launch_lgtm_plan
from .merge_plan import Tables, launch_block_merge_plan, launch_merge_plan
from .pooled_kv_projection import launch_pooled_kv_projection
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
    return launch_token_merge(x, *(t.contiguous() for t in (slot, offsets, members, anchor)), mode, weights)


def _token_merge_norm(
    x: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    weights: Tensor | None,
    norm_eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return launch_token_merge(
        x,
        *(t.contiguous() for t in (slot, offsets, members, anchor)),
        weights=weights,
        norm=True,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=norm_eps,
        shift=shift,
        scale=scale,
    )


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


def _kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    height: int,
    width: int,
    sy: int,
    sx: int,
    alpha: float,
    row_alpha: Tensor | None,
    scale: float | None,
    key_bias: Tensor | None,
    image_start: int,
    image_stop: int,
) -> Tensor:
    """Pool K and V in a launch and attend, or pool them inside attention, whichever the table says.

    Inside attention, every block of queries reads and blends all windows again. That is some 3 operations for each
    element read, while a launch saved is worth about 3 us: 3e13 operations a second on an H100 do 3e7 elements in that
    time at best, and half of them if all goes as usual. So the measure of a call is the number of elements read by all
    blocks of queries per launch saved, and the size class changes at LARGE, 1.7e7. A launch is saved with nothing but
    image tokens, three (pooling, and joining K and V with the text) otherwise.

    After pooling, attention is PyTorch's, unless there is a bias per key: a mask throws PyTorch off its flash kernels.
    """
    grid, factor, image = (height, width), (sy, sx), (image_start, image_stop)
    weight = alpha if row_alpha is None else row_alpha
    batch, heads, queries, d = q.shape
    fits = d <= LARGEST_HEAD
    if fits and factor != (1, 1):
        text = k.shape[2] - (image_stop - image_start)
        read = (height // sy) * (width // sx) * (1 if weight is alpha and alpha == 1.0 else sy * sx) + text
        elements = batch * heads * triton.cdiv(queries, 128) * read * 2 * d
        if configs.route("kv_downsample_attention", q.device, elements // (3 if text else 1)) == "fused":
            return launch_kv_downsample_attention(q, k, v, grid, factor, weight, scale, key_bias, image)
    pooling = (height, width, sy, sx, alpha, row_alpha, image_start, image_stop)
    k, v = pool_image([k, v], *pooling, _kv_downsample)
    if fits and key_bias is not None:
        return launch_kv_downsample_attention(q, k, v, (1, k.shape[2]), (1, 1), 1.0, scale, key_bias)
    return attend(q, k, v, scale, key_bias)


def _pooled_kv_projection(
    x: Tensor,
    height: int,
    width: int,
    sy: int,
    sx: int,
    alpha: float,
    row_alpha: Tensor | None,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Pool and project in one launch or in three, whichever the table says.

    The arithmetic is that of `_kv_downsample_attention`: the windows are read and blended once per 64 output channels,
    and two launches are saved.
    """
    grid, factor = (height, width), (sy, sx)
    weight = alpha if row_alpha is None else row_alpha
    read = x.shape[0] * (height // sy) * (width // sx) * (1 if weight is alpha and alpha == 1.0 else sy * sx)
    elements = read * x.shape[2] * triton.cdiv(max(w_k.shape[0], w_v.shape[0]), 64)
    if configs.route("pooled_kv_projection", x.device, elements // 2) == "fused":
        return launch_pooled_kv_projection(x, grid, factor, weight, w_k, w_v, b_k, b_v)
    (pooled,) = launch_kv_downsample([x], grid, factor, weight)
    return F.linear(pooled, w_k, b_k), F.linear(pooled, w_v, b_v)


# A grid of programs has at most 65,535 of them along its second and third axis: blocks of 16 tokens (and, in merging, a
# program per 1,024 tokens), and rows of up to four tensors.
MOST_TOKENS = 1_000_000
MOST_ROWS = 16_383


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (each for each in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(each, Tensor))


def refusal(op: str, args: tuple[Any, ...]) -> str:
    """Why the kernels cannot run a call; empty when they can."""
    tensors = list(_tensors(args))
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in FLOAT_DTYPES:
            return f"does not compute in {str(tensor.dtype).removeprefix('torch.')}"
    rows, tokens = tensors[0].shape[0], max(tensor.shape[1] for tensor in tensors if tensor.dim() > 1)
    if rows > MOST_ROWS or tokens > MOST_TOKENS:
        return f"launches at most {MOST_ROWS} rows of {MOST_TOKENS} tokens, got {rows} of {tokens}"
    if op in _PLANS and tensors[0].shape[1] > MAX_TOKENS:
        return f"plans rows of at most {MAX_TOKENS} tokens, got {tensors[0].shape[1]}"
    return ""


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device: `launch` with that of its tensors for the current one."""

    def run(*args: Any) -> Any:
        device = next(_tensors(args)).device
        elsewhere = device.index is not None and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            return launch(*args)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    op: _on_its_device(launch)
    for op, launch in {
        "laplacian_score": _laplacian_score,
        "select_destinations": _select_destinations,
        "bipartite_match": _bipartite_match,
        "merge_plan": launch_merge_plan,
        "block_merge_plan": _block_merge_plan,
        "lgtm_plan": _lgtm_plan,
        "token_merge": _token_merge,
        "token_merge_norm": _token_merge_norm,
        "token_unmerge": _token_unmerge,
        "kv_downsample": _kv_downsample,
        "kv_downsample_attention": _kv_downsample_attention,
        "pooled_kv_projection": _pooled_kv_projection,
    }.items()
}
