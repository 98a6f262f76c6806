"""Proportional attention: a merged key counts as often as the tokens that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.key_bias import ROUTES, attend_with_bias
from .checks import FLOAT_DTYPES, check_choice, check_number, check_same_device, check_tensor
from .ops import kv_downsample_attention

_SIZES = (torch.int32, torch.int64, *FLOAT_DTYPES)


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float | None = None, route: str | None = None
) -> Tensor:
    """softmax(scale * q k^T + log(sizes)) v: attention over merged tokens that weighs each by its size.

    Equal to attention over all tokens, where all members of a slot have the slot's key and value. Source: Bolya et al.
    2023 (ToMe, arXiv 2210.09461). log(sizes) counts in float32 at least, whatever the dtype of q is. It has derivatives
    by q, k and v; autocast changes nothing inside.

    Args:
        q: (B, heads, Nq, d); float16, bfloat16, float32 or float64.
        k: (B, heads, keys, d), the dtype of q.
        v: (B, heads, keys, d), the dtype of q.
        sizes: (P, keys), how many tokens each key stands for, as `MergePlan.sizes` has them: positive, int32, int64 or
            floating. P divides B, and batch row b uses row b mod P.
        scale: factor of the scores; None is 1 / sqrt(d).
        route: how the weights reach the scores. "op": the op `kv_downsample_attention`, whose kernels add them in
            registers; its derivative attends once more. "mask": an additive mask for PyTorch's attention. "channels":
            further channels of q and k, through any kernel for plain attention; with |scale| from 2^-15 to 2^14. None:
            the op where no derivative is asked for, otherwise what the table in `backends/key_bias.py` says.

    Returns:
        (B, heads, Nq, d) in the dtype of q.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, scale or route.
    """
    for name, each in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, each, 4)
        if each.dtype != q.dtype:
            raise TypeError(f"{name}: got {each.dtype}, expected {q.dtype}, the dtype of q")
    expected = (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    for name, each in (("k", k), ("v", v)):
        if each.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(each.shape)}, expected {expected}")
    if k.shape[2] == 0:
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected at least one key")
    check_tensor("sizes", sizes, 2, _SIZES)
    if sizes.shape[1] != k.shape[2]:
        raise ValueError(f"sizes: got shape {tuple(sizes.shape)}, expected {k.shape[2]} keys")
    rows, batch = sizes.shape[0], q.shape[0]
    if (rows == 0 and batch != 0) or (rows != 0 and batch % rows != 0):
        raise ValueError(f"sizes: got {rows} rows, expected a divisor of {batch}, the batch of q")
    check_same_device(q=q, k=k, v=v, sizes=sizes)
    if scale is not None:
        scale = check_number("scale", scale)
    if route is not None:
        check_choice("route", route, ("op", *ROUTES))
    bias = sizes.to(torch.promote_types(q.dtype, torch.float32)).log()
    if route == "op" or (route is None and not needs_derivative(q, k, v, sizes)):
        return kv_downsample_attention(q, k, v, (1, k.shape[2]), 1, 1.0, scale, key_bias=bias)
    with torch.autocast(q.device.type, enabled=False):
        return attend_with_bias(q, k, v, bias, scale, route)


def needs_derivative(*tensors: Tensor) -> bool:
    """Whether PyTorch records what becomes of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
