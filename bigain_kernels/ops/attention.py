"""Op `bigain::kv_downsample_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_factor, check_grid, check_number, check_same_device, check_tensor
from ._library import define, inference_only
from .kv_downsample import check_alpha


def _reference(
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
) -> Tensor:
    weight = alpha if row_alpha is None else row_alpha
    result = reference.kv_downsample_attention(q, k, v, (height, width), (sy, sx), weight, scale, key_bias)
    return result.contiguous()


define(
    "kv_downsample_attention(Tensor q, Tensor k, Tensor v, SymInt height, SymInt width, SymInt sy, SymInt sx,"
    " float alpha, Tensor? row_alpha, float? scale, Tensor? key_bias) -> Tensor",
    _reference,
    lambda q, *rest: q.new_empty(q.shape),
)


def kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: int | tuple[int, int],
    alpha: float | Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention whose keys and values are downsampled by `kv_downsample`; queries keep full resolution.

    softmax(scale * q k'^T + key_bias) v' with k' = kv_downsample(k), v' = kv_downsample(v). Source: BiGain (IE-KVD),
    arXiv 2603.12240.

    Args:
        q: (B, heads, Nq, d).
        k: (B, heads, N, d), tokens in raster order.
        v: (B, heads, N, d).
        grid: (H, W) with H * W = N.
        factor: s or (sy, sx), at most the grid.
        alpha: a number, or a (B,) float32 tensor with one value per batch row; see `kv_downsample`.
        scale: factor of the scores; None is 1 / sqrt(d).
        key_bias: (B, (H // sy) * (W // sx)) added to the scores of each pooled key, or None.

    Returns:
        (B, heads, Nq, d) in the dtype of q.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, grid, factor, alpha or scale.
        RuntimeError: on backward; the op is for inference.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, 4)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {q.dtype}, the dtype of q")
    expected = (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    check_same_device(q=q, k=k, v=v)
    height, width = check_grid(grid, k.shape[2], "k")
    sy, sx = check_factor(factor, (height, width))
    number, row_alpha = check_alpha("kv_downsample_attention", alpha, q, "q")
    if scale is not None:
        check_number("scale", scale)
    if key_bias is not None:
        check_tensor("key_bias", key_bias, 2)
        if key_bias.shape != (q.shape[0], (height // sy) * (width // sx)):
            wanted = (q.shape[0], (height // sy) * (width // sx))
            raise ValueError(f"key_bias: got shape {tuple(key_bias.shape)}, expected {wanted}")
        check_same_device(q=q, key_bias=key_bias)
        key_bias = inference_only("kv_downsample_attention", key_bias)
    q, k, v = (inference_only("kv_downsample_attention", tensor) for tensor in (q, k, v))
    return torch.ops.bigain.kv_downsample_attention(q, k, v, height, width, sy, sx, number, row_alpha, scale, key_bias)
