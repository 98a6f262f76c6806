"""Ops `bigain::token_merge`, `bigain::token_merge_norm` and `bigain::token_unmerge`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import FLOAT_DTYPES, check_choice, check_number, check_plan, check_same_device, check_tensor
from ..plan import MergePlan
from ._library import define

MODES = ("mean", "mlerp", "prune")


def _plan(slot: Tensor, offsets: Tensor, members: Tensor, anchor: Tensor) -> MergePlan:
    return MergePlan(slot, offsets, members, anchor, (1, slot.shape[1]), anchor.shape[1])


define(
    "token_merge(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, str mode, Tensor? weights)"
    " -> Tensor",
    lambda x, slot, offsets, members, anchor, mode, weights: reference.token_merge(
        x, _plan(slot, offsets, members, anchor), mode, weights
    ),
    lambda x, slot, offsets, members, anchor, mode, weights: x.new_empty((x.shape[0], anchor.shape[1], x.shape[2])),
)


def _merge_norm(
    x: Tensor,
    slot: Tensor,
    offsets: Tensor,
    members: Tensor,
    anchor: Tensor,
    weights: Tensor | None,
    norm_eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return reference.token_merge(
        x,
        _plan(slot, offsets, members, anchor),
        "mean",
        weights,
        norm_eps=norm_eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        scale=scale,
        shift=shift,
    )


define(
    "token_merge_norm(Tensor x, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? weights,"
    " float norm_eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? shift) -> Tensor",
    _merge_norm,
    lambda x, slot, offsets, members, anchor, *norm: x.new_empty((x.shape[0], anchor.shape[1], x.shape[2])),
)
define(
    "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
    " Tensor? gate) -> Tensor",
    lambda y, slot, offsets, members, anchor, residual, gate: reference.token_unmerge(
        y, _plan(slot, offsets, members, anchor), residual, gate
    ),
    lambda y, slot, offsets, members, anchor, residual, gate: y.new_empty((y.shape[0], slot.shape[1], y.shape[2])),
)


def _check_norm(x: Tensor, mode: str, norm_eps: float | None, operands: dict[str, Tensor | None]) -> None:
    """The norm of a merge: `operands` are norm_weight, norm_bias, scale and shift."""
    given = [name for name, tensor in operands.items() if tensor is not None]
    if norm_eps is None:
        if given:
            raise ValueError(f"{given[0]}: got a tensor, expected None without norm_eps, which asks for a LayerNorm")
        return
    check_number("norm_eps", norm_eps)
    if norm_eps < 0:
        raise ValueError(f"norm_eps: got {norm_eps}, expected at least 0")
    if mode != "mean":
        raise ValueError(f"norm_eps: got {norm_eps} with mode={mode!r}, expected None or mode='mean'")
    for pair in (("norm_weight", "norm_bias"), ("scale", "shift")):
        for name, other in (pair, pair[::-1]):
            if operands[name] is None and operands[other] is not None:
                raise ValueError(f"{name}: got None, expected a tensor, as {other} is one")
    for name in given:
        tensor = operands[name]
        expected = (x.shape[2],) if name.startswith("norm_") else (x.shape[0], x.shape[2])
        check_tensor(name, tensor, len(expected))
        assert tensor is not None
        if tensor.shape != expected:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
        check_same_device(**{"x": x, name: tensor})


def token_merge(
    x: Tensor,
    plan: MergePlan,
    mode: str = "mean",
    weights: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Merge tokens into the slots of a plan; with `norm_eps`, the tokens of LayerNorm(x).

    The norm is over the channels of each token, computed in float32 and not rounded before the mean: merge(norm(x))
    without norm(x) in memory. Merging is linear, so its affine parts cost one operation per slot, not per token.

    Args:
        x: (B, N, C) tokens of any channel count; float16, bfloat16, float32 or float64, any strides.
        plan: MergePlan for N tokens whose P rows divide B; batch row b uses plan row b mod P.
        mode: "mean" over the members of a slot, accumulated in float32 in an order that never changes, so that the
            result is the same to the bit every time; "mlerp", the mean rescaled to the largest L2 norm among the
            members, the destination's own included; "prune", the anchor alone.
        weights: (B, N) positive floating-point weights of the tokens in the mean, for example how many tokens each
            stands for since an earlier merge; None weighs all alike.
        norm_eps: merge LayerNorm(x), with this added to the variances; mode "mean" only. None merges x itself.
        norm_weight, norm_bias: (C,) affine part of the LayerNorm, both or neither.
        scale, shift: (B, C), both or neither: (1 + scale) * normalized + shift, as adaLN has it (Peebles and Xie,
            "Scalable Diffusion Models with Transformers", arXiv 2212.09748), after the affine part.

    Returns:
        (B, M, C) in the dtype of x.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, plan, mode, weights given with "prune", a norm with
            another mode than "mean", half of a pair, or what belongs to a norm without norm_eps.
        RuntimeError: on differentiation; the op is for inference.
    """
    check_tensor("x", x, 3)
    check_plan(plan, "x", x, "num_tokens")
    check_choice("mode", mode, MODES)
    if weights is not None:
        if mode == "prune":
            raise ValueError("weights: got a tensor, expected None with mode='prune', which takes no mean")
        check_tensor("weights", weights, 2)
        if weights.shape != x.shape[:2]:
            raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected {tuple(x.shape[:2])}")
        check_same_device(x=x, weights=weights)
    operands = {"norm_weight": norm_weight, "norm_bias": norm_bias, "scale": scale, "shift": shift}
    _check_norm(x, mode, norm_eps, operands)
    tables = (plan.slot, plan.offsets, plan.members, plan.anchor)
    if norm_eps is None:
        return torch.ops.bigain.token_merge(x, *tables, mode, weights)
    return torch.ops.bigain.token_merge_norm(x, *tables, weights, float(norm_eps), *operands.values())


def token_unmerge(y: Tensor, plan: MergePlan, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """Copy each slot back to all its tokens: `gate * y[slot] + residual`, computed in float32 and rounded once.

    Args:
        y: (B, M, C) slots; float16, bfloat16, float32 or float64, any strides.
        plan: MergePlan with M slots whose P rows divide B; batch row b uses plan row b mod P.
        residual: (B, N, C) added to the result, or None.
        gate: (B, C) multiplied channel by channel, or None.

    Returns:
        (B, N, C) in the dtype of y.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, shape or plan.
        RuntimeError: on differentiation; the op is for inference.
    """
    check_tensor("y", y, 3)
    check_plan(plan, "y", y, "num_slots")
    if residual is not None:
        check_tensor("residual", residual, 3, FLOAT_DTYPES)
        expected = (y.shape[0], plan.num_tokens, y.shape[2])
        if residual.shape != expected:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {expected}")
        check_same_device(y=y, residual=residual)
    if gate is not None:
        check_tensor("gate", gate, 2, FLOAT_DTYPES)
        if gate.shape != (y.shape[0], y.shape[2]):
            raise ValueError(f"gate: got shape {tuple(gate.shape)}, expected {(y.shape[0], y.shape[2])}")
        check_same_device(y=y, gate=gate)
    return torch.ops.bigain.token_unmerge(y, plan.slot, plan.offsets, plan.members, plan.anchor, residual, gate)
