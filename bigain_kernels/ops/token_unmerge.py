"""Op `bigain::token_unmerge`."""

from __future__ import annotations

from torch import Tensor

from ..checks import FLOAT_DTYPES, check_plan, check_same_device, check_tensor
from ..declaration import Op, optional_tensor, plan, tables_of, tensor
from ..plan import MergePlan
from ._flops import none
from ._library import define

OP = Op(
    "token_unmerge",
    (tensor("y"), plan(), optional_tensor("residual"), optional_tensor("gate")),
    "Tensor",
    fake=lambda y, plan, residual, gate: y.new_empty((y.shape[0], plan.num_tokens, y.shape[2])),
    flops=none,
    samples=lambda s: {"": (s.y, s.plan, None, None), "all": (s.y, s.plan, s.x, s.x[:, 0])},
    gradient="_merge_gradients.UNMERGE",
)
_call = define(OP)


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
        RuntimeError: on differentiation in forward mode; docs/training.md has the gradients.
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
    return _call(y, *tables_of(plan), residual, gate)
