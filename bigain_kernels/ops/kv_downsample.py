"""Op `bigain::kv_downsample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .. import reference
from ..checks import check_factor, check_grid, check_number, check_same_device, check_tensor
from ._library import define


def _reference(
    xs: list[Tensor], height: int, width: int, sy: int, sx: int, alpha: float, row_alpha: Tensor | None
) -> list[Tensor]:
    weight = alpha if row_alpha is None else row_alpha
    return list(reference.kv_downsample(xs, (height, width), (sy, sx), weight))


define(
    "kv_downsample(Tensor[] xs, SymInt height, SymInt width, SymInt sy, SymInt sx, float alpha, Tensor? row_alpha)"
    " -> Tensor[]",
    _reference,
    lambda xs, height, width, sy, sx, alpha, row_alpha: [
        x.new_empty((x.shape[0], (height // sy) * (width // sx), x.shape[2])) for x in xs
    ],
    device_of=lambda xs, *rest: xs[0].device.type,
)


def check_alpha(alpha: object, like: Tensor, like_name: str) -> tuple[float, Tensor | None]:
    """`alpha` as the op takes it: a number, and the (B,) float32 tensor that replaces it when one was given."""
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha)
        return float(alpha), None  # type: ignore[arg-type]
    check_tensor("alpha", alpha, 1, (torch.float32,))
    if alpha.shape[0] != like.shape[0]:
        raise ValueError(f"alpha: got {alpha.shape[0]} values, expected {like.shape[0]}, the batch of {like_name}")
    check_same_device(**{like_name: like, "alpha": alpha})
    return 0.0, alpha


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
        RuntimeError: on differentiation; the op is for inference.
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
    pooled = torch.ops.bigain.kv_downsample(tensors, height, width, sy, sx, number, row_alpha)
    return pooled[0] if isinstance(x, Tensor) else tuple(pooled)
