"""From hidden states to pooled keys and values, by the shortest way that the projections of a layer allow.

Calling `attn.to_k` is always right: it runs LoRA, quantization, offloading and whatever else was put around the layer.
A layer that is nothing but `x @ weight.T + bias` can be computed without being called, and then the pooling and both
projections are one op. Which of the two it is, is asked anew at every call, since it may change after compression was
applied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..methods import PoolConfig
from ..ops import kv_downsample, pooled_kv_projection

Window = tuple[int, int]


def is_plain_linear(layer: Any) -> bool:
    """Whether calling `layer` is a matrix product with its weight and nothing else.

    LoRA and most quantized layers are modules of another class; torchao and tensor parallelism replace the weight by a
    subclass of Tensor; offloading and layerwise casting replace `forward`; weight norm is a hook or changes the class.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and getattr(layer.forward, "__func__", None) is nn.Linear.forward
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
    )


def pools_early(attn: Any, config: PoolConfig, fused: bool) -> bool:
    """Whether a layer pools before norm and rotation, which `project_pooled` does, or keys and values after them.

    Pooling early saves projections, which fused projections cannot save. It makes no difference where keys have no norm
    (and no rotation, which never comes without one), nor for alpha = 1: one token is taken from each window, and what
    is done to it alone commutes with taking it.
    """
    if config.pool == "hidden":
        return True
    return not fused and (attn.norm_k is None or config.alpha == 1.0)


def path_of(attn: Any, early: bool, fused: bool, text_inside: bool) -> str:
    """How a layer that pools is computed in its present state, in the words of `Decision.path`.

    `early`: it pools hidden states; `fused`: its projections are; `text_inside`: its hidden states hold text too.
    """
    if not early:
        return "pool keys and values"
    if fused:
        return "project, then pool"
    plain = is_plain_linear(attn.to_k) and is_plain_linear(attn.to_v)
    return "pooled projection" if plain and not text_inside else "pool, then project"


def _takes(layer: nn.Linear, x: Tensor) -> bool:
    return layer.weight.dtype == x.dtype and layer.weight.device == x.device


def pool_tokens(
    xs: tuple[Tensor, ...], image_tokens: Window, grid: Window, factor: Window, alpha: float | Tensor, frames: int = 1
) -> tuple[Tensor, ...]:
    """Tensors (B, T, C) with the tokens from start to stop pooled and those around them as they are.

    The tokens of a video are `frames` grids, and every frame is pooled by itself.
    """
    start, stop = image_tokens
    images = [x[:, start:stop] for x in xs]
    if frames == 1:
        pooled = kv_downsample(images, grid, factor, alpha)
    else:
        alpha = alpha.repeat_interleave(frames) if isinstance(alpha, Tensor) else alpha
        images = [x.unflatten(1, (frames, -1)).flatten(0, 1) for x in images]
        pooled = tuple(x.unflatten(0, (-1, frames)).flatten(1, 2) for x in kv_downsample(images, grid, factor, alpha))
    if stop - start == xs[0].shape[1]:
        return pooled
    return tuple(torch.cat([x[:, :start], y, x[:, stop:]], dim=1) for x, y in zip(xs, pooled, strict=True))


def project_pooled(
    attn: Any,
    x: Tensor,
    grid: Window,
    factor: Window,
    alpha: float | Tensor,
    fused: bool = False,
    image_tokens: Window | None = None,
    frames: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all tokens, and keys and values of the pooled ones, before any norm.

    Args:
        attn: attention with `to_q`, `to_k` and `to_v`, or `to_qkv`.
        x: (B, T, C) hidden states.
        grid, factor, alpha: see `kv_downsample`.
        fused: queries, keys and values come from one layer, `to_qkv`. It projects all tokens, and as pooling commutes
            with it, keys and values are pooled after it.
        image_tokens: (start, stop), the tokens of x that are pooled; None: all.
        frames: grids in them.

    Returns:
        query (B, T, inner); key and value (B, T - frames * (H * W - (H // sy) * (W // sx)), inner).
    """
    start, stop = image_tokens or (0, x.shape[1])
    if fused:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, *pool_tokens((key, value), (start, stop), grid, factor, alpha, frames)
    query, to_k, to_v = attn.to_q(x), attn.to_k, attn.to_v
    # The op pools one grid.
    whole = stop - start == x.shape[1] and frames == 1
    plain = whole and is_plain_linear(to_k) and is_plain_linear(to_v) and _takes(to_k, x) and _takes(to_v, x)
    # Autocast casts the inputs of the layers that it knows, which an op of ours is not.
    if plain and not torch.is_autocast_enabled(x.device.type):
        key, value = pooled_kv_projection(x, grid, factor, alpha, to_k.weight, to_v.weight, to_k.bias, to_v.bias)
        return query, key, value
    (pooled,) = pool_tokens((x,), (start, stop), grid, factor, alpha, frames)
    return query, to_k(pooled), to_v(pooled)
