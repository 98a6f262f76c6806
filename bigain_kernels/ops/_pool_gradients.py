"""Derivatives of pooling, of projections of pooled tokens, and of attention over them.

Pooling is linear, and its gradient the transposed map: a share for every token of a window, and alpha for the nearest.
By alpha the derivative is what is blended: the nearest token less the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from ..backends.compositions import kv_downsample_attention
from ..declaration import PUBLIC, Gradient

Gradients = Sequence[Tensor | None]
Needs = frozenset[str]
Pair = tuple[int, int]


def _nearest(size: int, factor: int, device: torch.device) -> Tensor:
    """The token along an axis that is nearest to each window, floor((i + 0.5) * size / (size // factor))."""
    count = size // factor
    return (2 * torch.arange(count, device=device) + 1) * size // (2 * count)


def _unpool(gradient: Tensor, grid: Pair, factor: Pair, alpha: float | Tensor) -> Tensor:
    """(B, (H // sy) * (W // sx), C) to (B, N, C), in float32 at least. No two windows have one nearest token."""
    (height, width), (sy, sx) = grid, factor
    out_y, out_x = height // sy, width // sx
    batch, _, channels = gradient.shape
    values = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(batch, out_y, out_x, channels)
    weight = alpha.to(values.dtype)[:, None, None, None] if isinstance(alpha, Tensor) else alpha
    if isinstance(alpha, Tensor) or alpha != 1:
        share = (values * ((1 - weight) / (sy * sx)))[:, :, None, :, None]
        image = share.expand(-1, -1, sy, -1, sx, -1).reshape(batch, out_y * sy, out_x * sx, channels)
        if image.shape[1:3] != grid:
            image = F.pad(image, (0, 0, 0, width - out_x * sx, 0, height - out_y * sy))
        # A window as large as the grid leaves one share for all tokens: a view, which could not be added to.
        image = image.reshape(batch, height * width, channels).contiguous()
    else:
        image = values.new_zeros(batch, height * width, channels)
    if isinstance(alpha, Tensor) or alpha != 0:
        rows, columns = (_nearest(n, s, values.device) for n, s in zip(grid, factor, strict=True))
        place = (rows[:, None] * width + columns).flatten()
        image.index_add_(1, place, (values * weight).reshape(batch, out_y * out_x, channels))
    return image


def _pool(xs: list[Tensor], grid: Pair, factor: Pair, alpha: float | Tensor) -> list[Tensor]:
    number, rows = (0.0, alpha) if isinstance(alpha, Tensor) else (alpha, None)
    return PUBLIC.kv_downsample(xs, *grid, *factor, number, rows)


def _blended(x: Tensor, grid: Pair, factor: Pair) -> Tensor:
    """The derivative of pooled tokens by alpha, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return _pool([x], grid, factor, 1.0)[0] - _pool([x], grid, factor, 0.0)[0]


def _pool_backward(
    gradients: Gradients, needs: Needs, xs: list[Tensor], grid: Pair, factor: Pair, alpha: float | Tensor
) -> dict[str, Tensor]:
    found, by_alpha = {}, []
    for i, (gradient, x) in enumerate(zip(gradients, xs, strict=True)):
        if gradient is None:
            continue
        if f"xs[{i}]" in needs:
            found[f"xs[{i}]"] = _unpool(gradient, grid, factor, alpha)
        if "row_alpha" in needs:
            by_alpha.append((gradient * _blended(x, grid, factor)).sum((1, 2)))
    if by_alpha:
        found["row_alpha"] = torch.stack(by_alpha).sum(0)
    return found


def _project_backward(
    gradients: Gradients,
    needs: Needs,
    x: Tensor,
    grid: Pair,
    factor: Pair,
    alpha: float | Tensor,
    *weights: Tensor,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    inner = []
    pooled = _pool([x], grid, factor, alpha)[0].reshape(-1, x.shape[2]) if needs & {"w_k", "w_v"} else None
    for name, gradient, weight in zip("kv", gradients, weights[:2], strict=True):
        if gradient is None:
            continue
        inner.append(gradient @ weight)
        if pooled is not None:
            found[f"w_{name}"] = gradient.reshape(-1, gradient.shape[2]).T @ pooled
        found[f"b_{name}"] = gradient.sum((0, 1))
    if needs & {"x", "row_alpha"}:
        total = inner[0] if len(inner) == 1 else inner[0] + inner[1]
        found |= _pool_backward([total], _renamed(needs), [x], grid, factor, alpha)
        if "xs[0]" in found:
            found["x"] = found.pop("xs[0]")
    return found


def _renamed(needs: Needs) -> Needs:
    """The needed names of a projection as those of the pooling in it."""
    return frozenset("xs[0]" if name == "x" else name for name in needs)


def _attention_backward(
    gradients: Gradients,
    needs: Needs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Pair,
    factor: Pair,
    alpha: float | Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    image_tokens: Pair,
) -> dict[str, Tensor]:
    """Pools and attends once more, this time through PyTorch's attention, whose derivative it is."""
    (gradient,) = gradients
    assert gradient is not None
    number, rows = (0.0, alpha) if isinstance(alpha, Tensor) else (alpha, None)
    given = {"q": q, "k": k, "v": v, "row_alpha": rows, "key_bias": key_bias}
    attend = kv_downsample_attention(PUBLIC.kv_downsample.default)

    def again(*values: Tensor) -> Tensor:
        now: dict[str, Any] = given | dict(zip(names, values, strict=True))
        if "key_bias" in needs:
            # PyTorch has no kernel for this one: its steps would round to 16 bits, one after another.
            now |= {name: now[name].to(torch.promote_types(q.dtype, torch.float32)) for name in "qkv"}
        states = now["q"], now["k"], now["v"]
        return attend(*states, *grid, *factor, number, now["row_alpha"], scale, now["key_bias"], *image_tokens)

    names = sorted(needs)
    values = [given[name] for name in names]
    with _no_hooks():
        pulled: Any = torch.func.vjp(again, *values)
        out, pull = pulled
        return dict(zip(names, pull(gradient.to(out.dtype)), strict=True))


@contextmanager
def _no_hooks() -> Iterator[None]:
    """Without the hooks on saved tensors that are in force, such as those of offloading: torch.func refuses them, and
    what is saved in here is gone when the backward pass of the op is."""
    hooks = []
    while (top := _C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _C._autograd._push_saved_tensors_default_hooks(pack, unpack)


POOL = Gradient(_pool_backward, lambda needs, *_: set() if "row_alpha" in needs else {"xs"})
PROJECT = Gradient(
    _project_backward,
    lambda needs, *_: {"b_k", "b_v"} if needs & {"w_k", "w_v", "row_alpha"} else {"x", "b_k", "b_v"},
)
ATTENTION = Gradient(_attention_backward, lambda *_: set())
