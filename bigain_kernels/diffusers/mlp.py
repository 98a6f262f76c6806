"""Compression around the MLP of a block: its tokens are merged in front of it and copied back behind it.

An MLP is handed hidden states alone, so its block tells it the rest, for as long as it runs (`current.in_block`). What
it is inside, and what other software makes of it, stays as it is: a hook stands on either side.
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks.group_offloading import (
    GroupOffloadingHook,
    LayerExecutionTrackerHook,
    LazyPrefetchGroupOffloadingHook,
)
from diffusers.hooks.layer_skip import FeedForwardSkipHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook, PeftInputAutocastDisableHook
from torch import Tensor

from ..methods import MergeConfig
from .context import Context, of_part
from .current import current, in_block, set_step
from .planning import plan_of_call, planned
from .steps import MergeStep, fold

# Those that change nothing of what a module computes.
_PLACING = (
    GroupOffloadingHook,
    LayerExecutionTrackerHook,
    LayerwiseCastingHook,
    LazyPrefetchGroupOffloadingHook,
    PeftInputAutocastDisableHook,
)


def refuse_hooks(module: Any) -> None:
    """ValueError on a hook of diffusers that would see merged tokens, such as that of a cache over steps."""
    registry = getattr(module, "_diffusers_hook", None)
    for hook in () if registry is None else registry.hooks.values():
        if not isinstance(hook, _PLACING):
            raise ValueError(
                f"modules: got 'ff' and {type(hook).__name__} on {type(module).__name__}, expected attentions alone: "
                "it would see merged tokens, which are others at every step"
            )


def _is_skipped(mlp: Any) -> bool:
    """Whether a guider of diffusers leaves the MLP out of this call."""
    registry = getattr(mlp, "_diffusers_hook", None)
    return registry is not None and any(isinstance(hook, FeedForwardSkipHook) for hook in registry.hooks.values())


def _step(mlp: Any, context: Context, x: Tensor) -> MergeStep | None:
    """What merges the (B, tokens, C) input of an MLP; None where nothing merges."""
    if _is_skipped(mlp):
        return None
    refuse_hooks(mlp)
    layer = mlp._bigain
    context = of_part(context, layer.part)
    config, forward = layer.config, context.forward
    assert isinstance(config, MergeConfig)
    if forward.watched is not None:
        forward.watched.reached = True
    start, stop = context.image_tokens
    count = stop - start
    if not forward.active or count < config.min_tokens:
        return None
    context = planned(config, context)
    inside = (start, stop) if layer.has_text else (0, count)
    source = x[:, inside[0] : inside[1]] if context.source is None else context.source
    source, ratio = fold(source, context.frames), forward.ratio_at(layer.level)
    plan = plan_of_call(config, context, source, ratio, getattr(mlp, "bigain_block", None))
    if plan is None:
        return None
    return MergeStep(plan, config.mode, False, (start, stop), inside, context.frames, own_keys=False)


def enter_mlp(mlp: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a compressed MLP. Outside of its block's pass it runs as it is."""
    context = current() if in_block() is not None else None
    if context is None:
        return args
    step = _step(mlp, context, args[0])
    set_step(step)
    return args if step is None else (step.enter(args[0]), *args[1:])


def leave_mlp(mlp: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a compressed MLP."""
    block = in_block()
    if block is None or block.step is None:
        return output
    set_step(None)
    return block.step.leave(output)
