"""Op `bigain::pooled_kv_projection`."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_alpha, check_factor, check_grid, check_same_device, check_tensor
from ..declaration import Op, alpha, grid, optional_tensor, pair, tensor
from ._flops import projections
from ._library import define
from ._shapes import tiles


def _fake(
    x: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *biases: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = (x.shape[0], tiles("factor", grid, factor))
    return x.new_empty((*rows, w_k.shape[0])), x.new_empty((*rows, w_v.shape[0]))


OP = Op(
    "pooled_kv_projection",
    (
        tensor("x"),
        grid(),
        pair("factor", "sy", "sx"),
        alpha(),
        *map(tensor, ("w_k", "w_v")),
        *map(optional_tensor, ("b_k", "b_v")),
    ),
    "(Tensor, Tensor)",
    fake=_fake,
    flops=lambda x, grid, factor, alpha, w_k, w_v, *biases: projections(x, tiles("factor", grid, factor), w_k, w_v),
    samples=lambda s: {
        "": (s.x, s.grid, (2, 2), 0.9, s.w, s.w[:3], None, None),
        "rows": (s.x, s.grid, (2, 1), s.alphas, s.w, s.w, s.w[0, :6], s.w[0, -6:]),
    },
    gradient="_pool_gradients.PROJECT",
)
_call = define(OP)


def pooled_kv_projection(
    x: Tensor,
    grid: tuple[int, int],
    factor: int | tuple[int, int],
    alpha: float | Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of `kv_downsample`d hidden states: linear(kv_downsample(x), w_k, b_k) and the same with w_v, b_v.

    The weights of a pooling window sum to one, so this equals projecting all tokens and pooling the results, biases
    included, with sy * sx times less work. Source of the pooling: BiGain (IE-KVD), arXiv 2603.12240.

    Precision: the pooled hidden states are computed in float32 and rounded once to the dtype of x, whether they are
    stored between two kernels or pass from registers into the product; the products accumulate in float32.

    Args:
        x: (B, N, C) hidden states; float16, bfloat16, float32 or float64, any strides.
        grid: (H, W) with H * W = N.
        factor: s or (sy, sx), at most the grid.
        alpha: a number, or a (B,) float32 tensor with one value per batch row; see `kv_downsample`.
        w_k: (inner_k, C) in the dtype of x, the weight of a linear layer.
        w_v: (inner_v, C) in the dtype of x.
        b_k: (inner_k,) in the dtype of x, or None.
        b_v: (inner_v,) in the dtype of x, or None.

    Returns:
        k (B, (H // sy) * (W // sx), inner_k) and v (B, (H // sy) * (W // sx), inner_v) in the dtype of x.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, grid, factor or alpha.
        RuntimeError: on differentiation in forward mode; docs/training.md has the gradients.
    """
    check_tensor("x", x, 3)
    for name, weight, bias_name, bias in (("w_k", w_k, "b_k", b_k), ("w_v", w_v, "b_v", b_v)):
        check_tensor(name, weight, 2)
        _check_like(name, weight, x)
        if weight.shape[1] != x.shape[2]:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {x.shape[2]} columns, the C of x")
        if bias is not None:
            check_tensor(bias_name, bias, 1)
            _check_like(bias_name, bias, x)
            if bias.shape[0] != weight.shape[0]:
                raise ValueError(f"{bias_name}: got shape {tuple(bias.shape)}, expected {(weight.shape[0],)}")
    height, width = check_grid(grid, x.shape[1], "x")
    sy, sx = check_factor(factor, (height, width))
    number, row_alpha = check_alpha(alpha, x, "x")
    return _call(x, height, width, sy, sx, number, row_alpha, w_k, w_v, b_k, b_v)


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` has the dtype and the device of x."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {x.dtype}, the dtype of x")
    check_same_device(**{"x": x, name: tensor})
