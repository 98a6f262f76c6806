"""Blocks whose attention and MLP share their output projection: tokens are merged in front of the whole block.

The block sees the merged tokens m = merge(x), and what it adds to them is added to all that they stand for:
x + unmerge(block(m) - m). So norm, projections, attention, MLP and output see fewer tokens, and no token loses what it
was.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..methods import MergeConfig
from .attention import CompressedAttention, LayerPatch, is_perturbed
from .context import Context, of_part
from .current import begin_block, end_block
from .hooks import BlockPatch, Call, WholeForm, argument, context_of, with_argument, with_context
from .mlp import refuse_hooks
from .planning import plan_of_call, planned
from .steps import MergedStep, MergeStep, fold


def _step(block: Any, layer: LayerPatch, form: WholeForm, context: Context, x: Tensor) -> MergeStep | None:
    """What merges the (B, tokens, C) input of a block; None where nothing merges."""
    context = of_part(context, layer.part)
    config, forward = layer.config, context.forward
    assert isinstance(config, MergeConfig)
    start, stop = context.image_tokens
    if not forward.active or stop - start < config.min_tokens:
        return None
    # An attention that runs as it is needs all tokens.
    if not isinstance(block.attn.processor, CompressedAttention) or is_perturbed(block.attn):
        return None
    for module in (block, block.attn):
        refuse_hooks(module)
    inside = (start, stop) if form.has_text else (0, stop - start)
    context = planned(config, context)
    source = fold(x[:, inside[0] : inside[1]], context.frames)
    plan = plan_of_call(config, context, source, forward.ratio_at(layer.level), getattr(block, "bigain_block", None))
    if plan is None:
        return None
    return MergeStep(plan, config.mode, config.proportional, (start, stop), inside, context.frames)


def enter_whole_block(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a block that is merged as a whole; its attention is told that its tokens are merged."""
    patch: BlockPatch = block._bigain
    signature, layer, form = patch.signature, patch.whole, patch.form
    context = context_of(signature, args, kwargs)
    if context is None or layer is None or form is None:
        return args, kwargs
    x = argument(signature, args, kwargs, "hidden_states")
    step = _step(block, layer, form, context, x)
    if step is None:
        return args, kwargs
    few = step.enter(x)
    inside = MergedStep(step.plan, step.mode, step.weigh, step.image_tokens, step.inside, step.frames)
    context = context._replace(merged=inside)
    begin_block(patch, context, (x, few, step))
    args, kwargs = with_argument(signature, args, kwargs, "hidden_states", few)
    return with_context(signature, args, kwargs, context)


def leave_whole_block(block: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a block that is merged as a whole, called after an exception too, then without an output."""
    patch: BlockPatch = block._bigain
    held = end_block(patch)
    if held is None or output is None:
        return None
    assert patch.form is not None
    x, few, step = held
    place = patch.form.returned
    if place is None:
        return step.restore(x, few, output)
    return (*output[:place], step.restore(x, few, output[place]), *output[place + 1 :])
