"""From a merge config and hidden states to the plan of a layer."""

from __future__ import annotations

from torch import Tensor

from ..methods import abm_plan, lgtm_plan, sito_plan, tome_plan
from ..plan import MergePlan
from .configs import ABMConfig, LGTMConfig, MergeConfig, SiToConfig, ToMeConfig
from .context import Context


def make_plan(
    config: MergeConfig, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None
) -> MergePlan:
    """The plan that the method of `config` makes from hidden states.

    Args:
        config: of a merge method.
        x: (B, N, C) hidden states to match on, N = H * W in raster order.
        grid: (H, W).
        ratio: fraction of tokens to remove, of this timestep.
        timestep: (B,) what random methods vary with.

    Returns:
        MergePlan with B rows, or B / share_plan.

    Raises:
        TypeError, ValueError: `config` is of no merge method, or the method refuses its arguments.
    """
    stride, share = config.stride, config.share_plan
    if isinstance(config, LGTMConfig):
        return lgtm_plan(x, grid, ratio, stride, window=config.window, share_plan=share)
    if isinstance(config, ABMConfig):
        return abm_plan(x, grid, ratio, stride, reduce=config.reduce, share_plan=share)
    if isinstance(config, ToMeConfig):
        return tome_plan(
            x,
            grid,
            ratio,
            stride,
            destinations=config.destinations,
            seed=config.seed,
            timestep=timestep,
            window=config.window,
            share_plan=share,
        )
    if isinstance(config, SiToConfig):
        return sito_plan(
            x, grid, ratio, stride, noise=config.noise, seed=config.seed, timestep=timestep, share_plan=share
        )
    raise TypeError(f"config: got {type(config).__name__}, expected the config of a merge method")


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
    plan = make_plan(config, x, grid, ratio, timestep)
    if slot is not None:
        slot.plan = plan
    return plan
