"""Op `bigain::kv_downsample_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checks import check_alpha, check_count, check_factor, check_grid, check_number, check_same_device, check_tensor
from ..declaration import Op, alpha, grid, optional_number, optional_tensor, pair, tensor
from ._flops import attention
from ._library import define
from ._shapes import tiles

if TYPE_CHECKING:
    from ..testing import Inputs


def _fake(q: Tensor, *rest: object) -> Tensor:
    batch, heads, n, d = q.shape
    return q.new_empty((batch, n, heads, d)).transpose(1, 2)


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    alpha: float | Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    image_tokens: tuple[int, int],
) -> int:
    return attention(q, k.shape[2] - (image_tokens[1] - image_tokens[0]) + tiles("factor", grid, factor))


def _with_text(s: Inputs) -> tuple[Any, ...]:
    """All but the last row of the tokens are the image, two tokens behind the start."""
    (height, width), text = (s.grid[0] - 1, s.grid[1]), s.grid[1]
    keys = (height // 2) * (width // 3) + text
    image = (2, 2 + height * width)
    return s.q, s.q, s.q, (height, width), (2, 3), s.alphas, 0.3, s.weights[:2, :keys], image


OP = Op(
    "kv_downsample_attention",
    (
        *map(tensor, ("q", "k", "v")),
        grid(),
        pair("factor", "sy", "sx"),
        alpha(),
        optional_number("scale"),
        optional_tensor("key_bias"),
        pair("image_tokens", "image_start", "image_stop"),
    ),
    "Tensor",
    fake=_fake,
    flops=_flops,
    samples=lambda s: {
        "": (s.q, s.q, s.q, s.grid, (2, 2), 0.9, None, None, (0, s.n)),
        "text": _with_text(s),
        "bias": (s.q[:, :, :9], s.q, s.q, (1, s.n), (1, 1), 1.0, None, s.score, (0, s.n)),
    },
    gradient="_pool_gradients.ATTENTION",
)
_call = define(OP)


def kv_downsample_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    factor: int | tuple[int, int],
    alpha: float | Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    image_tokens: tuple[int, int] | None = None,
) -> Tensor:
    """Attention whose keys and values are downsampled by `kv_downsample`; queries keep full resolution.

    softmax(scale * q k'^T + key_bias) v' where k' and v' are k and v with their image tokens pooled; the tokens in
    front of and behind the image (text) stay whole and in their places. Source: BiGain (IE-KVD), arXiv 2603.12240.

    With factor 1 nothing is pooled, which leaves attention with a bias per key: `grid=(1, T), factor=1, alpha=1.0,
    key_bias=size.log()` is the proportional attention over merged tokens of Bolya et al. 2023 (ToMe).

    Args:
        q: (B, heads, Nq, d); float16, bfloat16, float32 or float64. Views of a projection (B, Nq, heads * d) are
            taken as they are, as is every layout whose last stride is 1.
        k: (B, heads, T, d), image tokens in raster order.
        v: (B, heads, T, d).
        grid: (H, W) with H * W the number of image tokens.
        factor: s or (sy, sx), at most the grid.
        alpha: a number, or a (B,) float32 tensor with one value per batch row; see `kv_downsample`.
        scale: factor of the scores; None is 1 / sqrt(d).
        key_bias: (P, keys) of any floating dtype, added to the scores of each key after scaling, or None. keys is
            start + (H // sy) * (W // sx) + T - stop; P divides B, and batch row b uses row b mod P, as with plans.
        image_tokens: (start, stop), the image tokens are k[:, :, start:stop]; None: all T tokens.

    Returns:
        (B, heads, Nq, d) in the dtype of q, laid out as (B, Nq, heads, d): joining the heads for the output projection
        takes no copy.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape, grid, factor, alpha, scale or image_tokens.
        RuntimeError: on differentiation in forward mode; docs/training.md has the gradients.
    """
    for name, each in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, each, 4)
        if each.dtype != q.dtype:
            raise TypeError(f"{name}: got {each.dtype}, expected {q.dtype}, the dtype of q")
    tokens = k.shape[2]
    expected = (q.shape[0], q.shape[1], tokens, q.shape[3])
    for name, each in (("k", k), ("v", v)):
        if each.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(each.shape)}, expected {expected}")
    check_same_device(q=q, k=k, v=v)
    start, stop = _check_image_tokens(image_tokens, tokens)
    height, width = check_grid(grid, stop - start, "k" if image_tokens is None else "image_tokens")
    sy, sx = check_factor(factor, (height, width))
    number, row_alpha = check_alpha(alpha, q, "q")
    if scale is not None:
        scale = check_number("scale", scale)
    if key_bias is not None:
        check_tensor("key_bias", key_bias, 2)
        keys = start + (height // sy) * (width // sx) + tokens - stop
        if key_bias.shape[1] != keys:
            raise ValueError(f"key_bias: got shape {tuple(key_bias.shape)}, expected {keys} keys")
        rows, batch = key_bias.shape[0], q.shape[0]
        if (rows == 0 and batch != 0) or (rows != 0 and batch % rows != 0):
            raise ValueError(f"key_bias: got {rows} rows, expected a divisor of {batch}, the batch of q")
        check_same_device(q=q, key_bias=key_bias)
    return _call(q, k, v, height, width, sy, sx, number, row_alpha, scale, key_bias, start, stop)


def _check_image_tokens(image_tokens: object, tokens: int) -> tuple[int, int]:
    """`image_tokens` is None or (start, stop) with 0 <= start < stop <= tokens."""
    if image_tokens is None:
        return 0, tokens
    if not isinstance(image_tokens, (tuple, list)) or len(image_tokens) != 2:
        raise TypeError(f"image_tokens: got {image_tokens!r}, expected two integers, (start, stop)")
    start, stop = (check_count("image_tokens", each) for each in image_tokens)
    if not start < stop <= tokens:
        raise ValueError(f"image_tokens: got {(start, stop)}, expected start < stop <= {tokens}, the tokens of k")
    return start, stop
