"""Derivatives of merging and unmerging, made of the ops themselves.

Unmerging copies a slot to its members, so its gradient is the sum over them: a mean times the size. The gradient of a
mean is that of the slot over its size, copied to the members: an unmerge. So each backend runs them on its own kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..declaration import PUBLIC, Gradient, tables_of
from ..plan import MergePlan

Gradients = tuple[Tensor | None, ...]
Needs = frozenset[str]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(table: Tensor, batch: int) -> Tensor:
    """A table of a plan (P, ...) for all rows of the batch."""
    return table.repeat(batch // max(table.shape[0], 1), 1)


def _merge(x: Tensor, plan: MergePlan, weights: Tensor | None = None) -> Tensor:
    """(B, N, C) to the means (B, M, C)."""
    return PUBLIC.token_merge(x, *tables_of(plan), "mean", weights)


def _spread(y: Tensor, plan: MergePlan) -> Tensor:
    """(B, M, C) to all members (B, N, C)."""
    return PUBLIC.token_unmerge(y, *tables_of(plan), None, None)


def _sizes(plan: MergePlan, like: Tensor) -> Tensor:
    """(B, M, 1), in float32 at least."""
    sizes = plan.sizes().to(torch.promote_types(like.dtype, torch.float32))
    return _rows(sizes, like.shape[0])[..., None]


def _total(x: Tensor, plan: MergePlan) -> Tensor:
    """Sums over the members of each slot, (B, N, C) to (B, M, C) in float32 at least."""
    return _merge(_wide(x), plan) * _sizes(plan, x)


def _unmerge(
    gradients: Gradients,
    needs: Needs,
    y: Tensor | None,
    plan: MergePlan,
    residual: None,
    gate: Tensor | None,
) -> dict[str, Tensor]:
    (gradient,) = gradients
    assert gradient is not None
    found = {"residual": gradient}
    if needs & {"y", "gate"}:
        total = _total(gradient, plan)
        found["y"] = total if gate is None else total * gate[:, None]
        if "gate" in needs:
            assert y is not None
            found["gate"] = (total * y).sum(1)
    return found


def _mean(
    gradient: Tensor, needs: Needs, x: Tensor | None, plan: MergePlan, weights: Tensor | None
) -> dict[str, Tensor]:
    """From the gradient of the means of x, those of x and of the weights."""
    if weights is None:
        # Rounded before it is copied, so that the copies are as small as what they are the gradient of.
        return {"x": _spread((gradient / _sizes(plan, gradient)).to(gradient.dtype), plan)}
    gradient = _wide(gradient)
    weights = weights[..., None].to(gradient.dtype)
    spread = _spread(gradient / _total(weights, plan), plan)
    found = {"x": spread * weights}
    if "weights" in needs:
        assert x is not None
        x = x.to(gradient.dtype)
        found["weights"] = (spread * (x - _spread(_merge(x, plan, weights[..., 0]), plan))).sum(-1)
    return found


def _prune(gradient: Tensor, plan: MergePlan) -> dict[str, Tensor]:
    batch, _, channels = gradient.shape
    anchors = _rows(plan.anchor, batch).long()[..., None].expand(-1, -1, channels)
    return {"x": gradient.new_zeros(batch, plan.num_tokens, channels).scatter_(1, anchors, gradient)}


def _mlerp(gradient: Tensor, needs: Needs, x: Tensor, plan: MergePlan, weights: Tensor | None) -> dict[str, Tensor]:
    """Of mean * largest / |mean|; several members of the largest norm share its part."""
    gradient, x = _wide(gradient), _wide(x)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    with torch.no_grad():
        slots = _rows(plan.slot, x.shape[0]).long()[..., None]
        largest = norms.new_zeros(x.shape[0], plan.num_slots, 1).scatter_reduce(1, slots, norms, "amax")
        is_largest = (norms == largest.gather(1, slots)).to(norms.dtype)
        share = is_largest / _total(is_largest, plan).gather(1, slots)
    largest = _total(norms * share, plan)
    mean = _merge(x, plan, weights)
    length = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    length = torch.where(length == 0, 1, length)
    direction = mean / length
    along = (gradient * direction).sum(-1, keepdim=True)
    found = _mean((gradient - direction * along) * (largest / length), needs, x, plan, weights)
    # By x / |x|, whose factors of one a token come first, so that no more tokens are made.
    factors = _spread(along, plan) * share / torch.where(norms == 0, 1, norms)
    found["x"] = torch.addcmul(found["x"], x, factors)
    return found


def _merge_backward(
    gradients: Gradients, needs: Needs, x: Tensor | None, plan: MergePlan, mode: str, weights: Tensor | None
) -> dict[str, Tensor]:
    (gradient,) = gradients
    assert gradient is not None
    if mode == "prune":
        return _prune(gradient, plan)
    if mode == "mean":
        return _mean(gradient, needs, x, plan, weights)
    assert x is not None
    return _mlerp(gradient, needs, x, plan, weights)


def _norm_backward(
    gradients: Gradients,
    needs: Needs,
    x: Tensor,
    plan: MergePlan,
    weights: Tensor | None,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> dict[str, Tensor]:
    """The affine parts come after the mean, so their gradients are made of slots, not of tokens."""
    (given,) = gradients
    assert given is not None
    gradient, x, channels = _wide(given), _wide(x), x.shape[2]
    found = {"shift": gradient.sum(1)}
    merged = None
    if needs & {"norm_weight", "scale"}:
        merged = PUBLIC.token_merge_norm(x, *tables_of(plan), weights, eps, None, None, None, None)
    if scale is not None:
        if "scale" in needs:
            assert merged is not None
            plain = norm_weight is None or norm_bias is None
            found["scale"] = (gradient * (merged if plain else merged * norm_weight + norm_bias)).sum(1)
        gradient = gradient * (1 + scale.to(gradient.dtype)[:, None])
    found["norm_bias"] = gradient.sum((0, 1))
    if norm_weight is not None:
        if "norm_weight" in needs:
            assert merged is not None
            found["norm_weight"] = (gradient * merged).sum((0, 1))
        # What stands in front of the affine parts is in the dtype of the tokens, whatever theirs is.
        gradient = gradient * norm_weight.to(gradient.dtype)
    if not needs & {"x", "weights"}:
        return found
    variance, mean = torch.var_mean(x.detach(), -1, correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    normalized = torch.nn.functional.layer_norm(x, (channels,), eps=eps) if "weights" in needs else None
    found |= _mean(gradient, needs, normalized, plan, weights)
    found["x"] = torch.ops.aten.native_layer_norm_backward(
        found["x"], x, [channels], mean, inverse, None, None, [True, False, False]
    )[0]
    return found


UNMERGE = Gradient(_unmerge, lambda needs, *_: {"residual"} if "gate" in needs else {"y", "residual"})
MERGE = Gradient(
    _merge_backward,
    lambda needs, x, plan, mode, weights: set() if mode == "mlerp" or "weights" in needs else {"x"},
)
MERGE_NORM = Gradient(_norm_backward, lambda *_: {"shift"})
