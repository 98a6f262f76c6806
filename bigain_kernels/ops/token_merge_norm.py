"""Op `bigain::token_merge_norm`: `token_merge` with a LayerNorm in front of it."""

from __future__ import annotations

from ..declaration import Op, number, optional_tensor, plan, tensor
from ._flops import none
from ._library import define

_OPERANDS = ("norm_weight", "norm_bias", "scale", "shift")

OP = Op(
    "token_merge_norm",
    (tensor("x"), plan(), optional_tensor("weights"), number("norm_eps"), *map(optional_tensor, _OPERANDS)),
    "Tensor",
    fake=lambda x, plan, *norm: x.new_empty((x.shape[0], plan.num_slots, x.shape[2])),
    flops=none,
    samples=lambda s: {
        "": (s.x, s.plan, None, 1e-5, None, None, None, None),
        "all": (s.x, s.plan, s.weights, 1e-6, s.x[0, 0], s.x[0, 1], s.x[:, 2], s.x[:, 3]),
    },
    gradient="_merge_gradients.MERGE_NORM",
)
# For `token_merge`, the public function, which checks the arguments.
call = define(OP)
