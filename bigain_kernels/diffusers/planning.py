"""From a merge config and hidden states to the plan of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..methods import MergeConfig
from ..plan import MergePlan
from .context import Context, Forward, for_rows


def _shares(config: MergeConfig, forward: Forward, rows: int) -> bool:
    """Whether the rows of this call share plans: whether it is sure that they are what `share_plan` counts.

    That counts samples of the batch, each of which may be several rows here, the frames of a video; fewer rows than
    samples are a part of the batch that something chose on the way.
    """
    share = config.share_plan
    batch = rows if forward.batch is None else forward.batch.shape[0]
    return share is not None and rows % batch == 0 and batch % share == 0 and forward.conditions in (None, share)


def _plan_neighbours(
    config: MergeConfig, x: Tensor, batch: int, grid: tuple[int, int], ratio: float, timestep: Tensor | None
) -> MergePlan:
    """The plan of a batch of P * k samples in which the k that share are neighbours, each with F rows of its own:
    (P * k * F, N, C), a plan with a row for each."""
    k = config.share_plan or 1
    sizes = (batch // k, k, x.shape[0] // batch)
    # The order that plans know: the rows of one sample of each k, then those of the next.
    apart = x.unflatten(0, sizes).transpose(0, 1).flatten(0, 2)
    if timestep is not None:
        timestep = timestep.unflatten(0, sizes).transpose(0, 1).flatten()
    plan = config.plan(apart, grid, ratio, timestep)
    slot, offsets, members, anchor = (
        table.unflatten(0, (sizes[0], 1, sizes[2])).expand(*sizes, -1).flatten(0, 2)
        for table in (plan.slot, plan.offsets, plan.members, plan.anchor)
    )
    return MergePlan(slot, offsets, members, anchor, plan.grid, plan.num_slots)


def planned(config: MergeConfig, context: Context) -> Context:
    """The context as plans see it: a video that is planned as a whole is one grid of three sizes."""
    if not config.spans_frames or context.frames == 1:
        return context
    grid: Any = (context.frames, *context.grid)
    return context._replace(grid=grid, frames=1)


def plan_of_call(
    config: MergeConfig, context: Context, x: Tensor, ratio: float, block: Tensor | None
) -> MergePlan | None:
    """The plan of one layer in one forward pass: the one kept for it, or a new one; None where nothing merges.

    Args:
        config: of the layer.
        context: of the call; its slots may hold the plan that attn1 left for attn2, or that of cached assignment.
        x: (B, N, C) hidden states to match on, or (B * frames, N, C), one grid each.
        ratio: fraction of tokens to merge.
        block: () int64, the block's index, for random methods: block b at timestep t draws what the method draws for
            timestep t + b * T. A tensor, because compiled code would be specialised to an integer of each block.
    """
    forward, grid = context.forward, context.grid
    if int(x.shape[1] * ratio) == 0:
        return None
    slots = [slot for slot in (context.block, context.slot) if slot is not None]
    kept = next((slot.plan for slot in slots if slot.plan is not None), None)
    if kept is not None:
        return kept
    timestep = None
    if block is not None and forward.timestep is not None:
        timestep = for_rows(forward.timestep.to(x.device), x.shape[0], context.frames)
        timestep = timestep + block.to(x.device) * config.train_timesteps
    if config.share_plan is not None and not _shares(config, forward, x.shape[0]):
        config = replace(config, share_plan=None)
    if config.share_plan is not None and config.share_order == "interleave":
        batch = x.shape[0] if forward.batch is None else forward.batch.shape[0]
        plan = _plan_neighbours(config, x, batch, grid, ratio, timestep)
    else:
        plan = config.plan(x, grid, ratio, timestep)
    for slot in slots:
        slot.plan = plan
    return plan
