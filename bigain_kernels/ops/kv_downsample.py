"""Op `bigain::kv_downsample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from ..checks import check_alpha, check_factor, check_grid, check_same_device, check_tensor
from ..declaration import Op, alpha, grid, pair, tensors
from ._flops import none
from ._library import define
from ._shapes import tiles

OP = Op(
    "kv_downsample",
    (tensors("xs"), grid(), pair("factor", "sy", "sx"), alpha()),
    "Tensor[]",
    fake=lambda xs, grid, factor, alpha: [
        x.new_empty((x.shape[0], tiles("factor", grid, factor), x.shape[2])) for x in xs
    ],
    flops=none,
    samples=lambda s: {"": ([s.x, s.x], s.grid, (2, 2), 0.9), "rows": ([s.x], s.grid, (2, 1), s.alphas)},
    gradient="_pool_gradients.POOL",
)
_call = define(OP)


@overload
def kv_downsample(x: Tensor, grid: tuple[int, int], factor: int | tuple[int, int], alpha: float | Tensor) -> Tensor: ...
@overload
def kv_downsample(
    x: Sequence[Tensor], grid: tuple[int, int], factor: int | tuple[int, int], alpha: float | Tensor
) -> tuple[Tensor, ...]: ...
def kv_downsample(
    x: Tensor | Sequence[Tensor], grid: tuple[int, int], factor: int | tuple[int, int], alpha: float | Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Interpolate-extrapolate downsampling: `alpha * nearest + (1 - alpha) * average` over sy x sx windows.

    alpha = 1 is nearest (ToDo, Smith et al. 2024), 0 is average pooling, values outside [0, 1] extrapolate. nearest
    takes token floor((i + 0.5) * H / (H // sy)) along each axis ("nearest-exact"); the windows of the average cover the
    top-left (H // sy * sy) x (W // sx * sx) region. Source: BiGain, arXiv 2603.12240.

    At exactly 1 and exactly 0, as a number or in a row of a tensor, the part of weight zero is left out: infinite or
    NaN tokens in it do not show. At the number 1 the kernels read the nearest tokens alone.

    The weights of a window sum to one, so pooling commutes with linear layers, bias included.

    Args:
        x: (B, N, C) tokens, or several such tensors (their C may differ) to be pooled in one call; float16, bfloat16,
            float32 or float64, any strides.
        grid: (H, W) with H * W = N.
        factor: s or (sy, sx), at most the grid.
        alpha: a number, or a (B,) float32 tensor with one value per batch row.

    Returns:
        (B, (H // sy) * (W // sx), C) in the dtype of x; a tuple of them when several tensors were given.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, grid, factor or alpha.
        RuntimeError: on differentiation in forward mode; docs/training.md has the gradients.
    """
    if not isinstance(x, (Tensor, list, tuple)):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor or a sequence of them")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x: got an empty sequence, expected at least one tensor")
    for i, tensor in enumerate(tensors):
        name = "x" if isinstance(x, Tensor) else f"x[{i}]"
        check_tensor(name, tensor, 3)
        if tensor.shape[:2] != tensors[0].shape[:2]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(tensors[0].shape[:2])} and any C"
            )
        check_same_device(**{"x[0]": tensors[0], name: tensor})
    height, width = check_grid(grid, tensors[0].shape[1], "x")
    sy, sx = check_factor(factor, (height, width))
    number, row_alpha = check_alpha(alpha, tensors[0], "x")
    pooled = _call(tensors, height, width, sy, sx, number, row_alpha)
    return pooled[0] if isinstance(x, Tensor) else tuple(pooled)
