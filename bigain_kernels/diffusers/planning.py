"""From a merge config and hidden states to the plan of a layer."""

from __future__ import annotations

from torch import Tensor

from ..methods import MergeConfig
from ..plan import MergePlan
from .context import Context


def plan_of_call(config: MergeConfig, context: Context, x: Tensor, block: Tensor | None) -> MergePlan | None:
    """The plan of one layer in one forward pass: the one kept for it, or a new one; None where nothing merges.

    Args:
        config: of the layer.
        context: of the call; may hold the "plan" that attn1 left for attn2, or the "slot" of cached assignment.
        x: (B, N, C) hidden states to match on.
        block: () int64, the block's index, for random methods: block b at timestep t draws what the method draws for
            timestep t + b * T. A tensor, because compiled code would be specialised to an integer of each block.
    """
    if "plan" in context:
        return context["plan"]
    slot = context.get("slot")
    if slot is not None and slot.plan is not None:
        return slot.plan
    ratio, grid = context.get("ratio", config.ratio), context["grid"]
    if int(x.shape[1] * ratio) == 0:
        return None
    timestep = None
    if block is not None:
        timestep = context["timestep"].to(x.device)
        timestep = timestep + block.to(x.device) * config.train_timesteps
    plan = config.plan(x, grid, ratio, timestep)
    if slot is not None:
        slot.plan = plan
    return plan
