"""Op `bigain::token_merge`."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_choice, check_number, check_plan, check_same_device, check_tensor
from ..declaration import Op, choice, optional_tensor, plan, tables_of, tensor
from ..plan import MergePlan
from ._flops import none
from ._library import define
from .token_merge_norm import call as merge_norm

MODES = ("mean", "mlerp", "prune")

OP = Op(
    "token_merge",
    (tensor("x"), plan(), choice("mode"), optional_tensor("weights")),
    "Tensor",
    fake=lambda x, plan, mode, weights: x.new_empty((x.shape[0], plan.num_slots, x.shape[2])),
    flops=none,
    samples=lambda s: {
        "mean": (s.x, s.plan, "mean", None),
        "mlerp": (s.x, s.plan, "mlerp", s.weights),
        "prune": (s.x, s.plan, "prune", None),
    },
    gradient="_merge_gradients.MERGE",
)
_call = define(OP)


def _check_norm(x: Tensor, mode: str, norm_eps: float | None, operands: dict[str, Tensor | None]) -> float | None:
    """The norm of a merge: `operands` are norm_weight, norm_bias, scale and shift. Returns norm_eps."""
    given = [name for name in operands if operands[name] is not None]
    if norm_eps is None:
        if given:
            raise ValueError(f"{given[0]}: got a tensor, expected None without norm_eps, which asks for a LayerNorm")
        return None
    norm_eps = check_number("norm_eps", norm_eps)
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
    return norm_eps


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
        RuntimeError: on differentiation in forward mode; docs/training.md has the gradients.
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
    norm_eps = _check_norm(x, mode, norm_eps, operands)
    tables = tables_of(plan)
    if norm_eps is None:
        return _call(x, *tables, mode, weights)
    return merge_norm(x, *tables, weights, norm_eps, *operands.values())
