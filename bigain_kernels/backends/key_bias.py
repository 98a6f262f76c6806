"""Attention with a bias per key through PyTorch's own kernels, in one of two ways.

* "mask": the bias is an additive mask. PyTorch's kernels for CPUs take a float32 mask beside 16-bit queries and lose
  little speed by it. On a GPU a mask leaves the flash kernels, and it must have the dtype of the queries: lest log(5)
  be off by 0.2 % in bfloat16, all is computed in float32 there.
* "channels": the bias rides in further channels of queries and keys, so every kernel for plain attention computes it.
  A query's channels hold a power of two c, a key's hold bias / (scale * c), in 16 bits as three parts whose sum is the
  float32 value: scale * q k^T then has the bias in it. Kernels work on head dims in steps of 32, so the channels cost
  no multiplications where there is room: 40 in 64, 72 and 80 in 96, 160 in 192; 64 becomes 96 and 128 becomes 192.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTES = ("mask", "channels")
# The largest head dim through channels by device type and dtype; all other calls take the mask. docs/performance.md has
# the times on a CPU, where the mask is faster; on a GPU it is the limit of the flash kernels, 256, less the parts. Not
# measured there: the alternative is attention in float32.
CHANNELS_UP_TO = {("cuda", torch.float16): 253, ("cuda", torch.bfloat16): 253}
# Three values of 8 bits hold the 24 of a float32.
PARTS = 3
# Channels are padded to 16 bytes of a 16-bit tensor, which the kernels ask for.
UNIT = 8
# Powers of two beyond these are not normal float16 numbers.
_SCALES = (2.0**-15, 2.0**14)


def route_of(q: Tensor, scale: float) -> str:
    """The way that the table says for queries (B, heads, Nq, d); channels cannot hold the bias of a scale near 0."""
    if q.shape[3] > CHANNELS_UP_TO.get((q.device.type, q.dtype), 0):
        return "mask"
    return "channels" if _SCALES[0] <= abs(scale) <= _SCALES[1] else "mask"


def attend_with_bias(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float | None = None, route: str | None = None
) -> Tensor:
    """softmax(scale * q k^T + key_bias) v, (B, heads, Nq, d), the bias counting in float32 at least.

    Args:
        q: (B, heads, Nq, d).
        k, v: (B, heads, keys, d), the dtype of q.
        key_bias: (P, keys) of any floating dtype; batch row b uses row b mod P.
        scale: None is 1 / sqrt(d).
        route: one of ROUTES; None: what the table says.

    Raises:
        ValueError: a scale that the channels, asked for by name, cannot hold.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = key_bias.to(wide).repeat(q.shape[0] // max(key_bias.shape[0], 1), 1)[:, None]
    if (route or route_of(q, scale)) == "channels":
        if not _SCALES[0] <= abs(scale) <= _SCALES[1]:
            raise ValueError(f"scale: got {scale} with route='channels', expected |scale| from 2^-15 to 2^14")
        return _through_channels(q, k, v, bias, scale)
    if q.device.type != "cpu":
        q_wide, k, v = (x.to(wide) for x in (q, k, v))
        return F.scaled_dot_product_attention(q_wide, k, v, attn_mask=bias[:, :, None], scale=scale).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None], scale=scale)


def _parts(value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` whose sum is `value`; infinities are one infinity and zeros."""
    if value.dtype == dtype:
        return [value]
    parts = []
    for _ in range(PARTS):
        part = value.to(dtype)
        parts.append(part)
        value = torch.where(part.isinf(), 0.0, value - part)
    return parts


def _through_channels(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Plain attention with the bias (B, 1, keys) in channels of q and k. Values get zeros: flash kernels want one d."""
    heads, d = q.shape[1], q.shape[3]
    # The smallest power of two that makes the keys' channels no larger than the bias itself.
    power = 2.0 ** math.ceil(-math.log2(abs(scale)))
    extra = torch.stack(_parts(bias / (scale * power), q.dtype), dim=-1)
    parts = extra.shape[-1]
    padding = -(d + parts) % UNIT
    q = F.pad(F.pad(q, (0, parts), value=power), (0, padding))
    k = F.pad(torch.cat([k, extra.expand(-1, heads, -1, -1)], dim=-1), (0, padding))
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, parts + padding)), scale=scale)[..., :d]
