"""Ops `bigain::token_merge` and `bigain::token_unmerge`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import FLOAT_DTYPES, check_choice, check_plan, check_same_device, check_tensor
from ..plan import MergePlan
from ._library import define, inference_only

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
define(
    "token_unmerge(Tensor y, Tensor slot, Tensor offsets, Tensor members, Tensor anchor, Tensor? residual,"
    " Tensor? gate) -> Tensor",
    lambda y, slot, offsets, members, anchor, residual, gate: reference.token_unmerge(
        y, _plan(slot, offsets, members, anchor), residual, gate
    ),
    lambda y, slot, offsets, members, anchor, residual, gate: y.new_empty((y.shape[0], slot.shape[1], y.shape[2])),
)


def token_merge(x: Tensor, plan: MergePlan, mode: str = "mean", weights: Tensor | None = None) -> Tensor:
    """Merge tokens into the slots of a plan.

    Args:
        x: (B, N, C) tokens of any channel count; float16, bfloat16, float32 or float64, any strides.
        plan: MergePlan for N tokens whose P rows divide B; batch row b uses plan row b mod P.
        mode: "mean" over the members of a slot, accumulated in float32 in an order that never changes, so that the
            result is the same to the bit every time; "mlerp", the mean rescaled to the largest L2 norm among the
            members, the destination's own included; "prune", the anchor alone.
        weights: (B, N) positive floating-point weights of the tokens in the mean, for example how many tokens each
            stands for since an earlier merge; None weighs all alike.

    Returns:
        (B, M, C) in the dtype of x.

    Raises:
        TypeError, ValueError: wrong type, dtype, rank, device, plan, mode, or weights given with "prune".
        RuntimeError: on backward; the op is for inference.
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
        weights = inference_only("token_merge", weights)
    x = inference_only("token_merge", x)
    return torch.ops.bigain.token_merge(x, plan.slot, plan.offsets, plan.members, plan.anchor, mode, weights)


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
        RuntimeError: on backward; the op is for inference.
    """
    check_tensor("y", y, 3)
    check_plan(plan, "y", y, "num_slots")
    if residual is not None:
        check_tensor("residual", residual, 3, FLOAT_DTYPES)
        expected = (y.shape[0], plan.num_tokens, y.shape[2])
        if residual.shape != expected:
            raise ValueError(f"residual: got shape {tuple(residual.shape)}, expected {expected}")
        check_same_device(y=y, residual=residual)
        residual = inference_only("token_unmerge", residual)
    if gate is not None:
        check_tensor("gate", gate, 2, FLOAT_DTYPES)
        if gate.shape != (y.shape[0], y.shape[2]):
            raise ValueError(f"gate: got shape {tuple(gate.shape)}, expected {(y.shape[0], y.shape[2])}")
        check_same_device(y=y, gate=gate)
        gate = inference_only("token_unmerge", gate)
    y = inference_only("token_unmerge", y)
    return torch.ops.bigain.token_unmerge(y, plan.slot, plan.offsets, plan.members, plan.anchor, residual, gate)
