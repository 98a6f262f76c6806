"""The forward pass in progress, for models that hand nothing on to their attention.

Where a model passes a dict of arguments on to its processors, the context travels in it. Others are told here, by hooks
of the model, for as long as its forward pass lasts; each thread has its own. The numbers that shape tokens are kept as
the shape of a tensor without storage: `torch.compile` takes sizes of tensors as dynamic and integers as constants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .context import Context, Forward, PlanSlot

if TYPE_CHECKING:
    from .steps import MergedStep, MergeStep


class Told(NamedTuple):
    """A context; `sizes` is a tensor shaped (tokens in front of the image, frames, height, width)."""

    forward: Forward
    sizes: Tensor
    slot: PlanSlot | None
    source: Tensor | None
    block: PlanSlot | None
    merged: MergedStep | None


class InBlock(NamedTuple):
    """A block in progress that is merged, or whose MLP is, to which hidden states are handed and nothing else.

    Attributes:
        owner: what began it, unique to the block.
        told: the context of its layers.
        outer: the block that this one interrupts, or None.
        step: around the MLP while that runs, or None.
        held: of a block that is merged as a whole: what came, what it was merged to, and how.
    """

    owner: object
    told: Told
    outer: InBlock | None
    step: MergeStep | None = None
    held: tuple[Tensor, Tensor, MergeStep] | None = None


class Running(NamedTuple):
    """A forward pass in progress.

    Attributes:
        owner: what began it, the patch of the model.
        told: its context.
        outer: the pass of another model that this one interrupts, or None.
        block: the block of that model, or None.
    """

    owner: object
    told: Told
    outer: Running | None
    block: InBlock | None


# Holds `running` and `block`. A plain one without defaults in its class, which torch.compile would take for what it
# holds.
_current = threading.local()


def _running() -> Running | None:
    return getattr(_current, "running", None)


def _pack(context: Context) -> Told:
    sizes = torch.empty((context.image_tokens[0], context.frames, *context.grid), device="meta")
    return Told(context.forward, sizes, context.slot, context.source, context.block, context.merged)


def _unpack(told: Told) -> Context:
    start, frames, height, width = told.sizes.shape
    stop = start + frames * height * width
    numbers = (height, width), (start, stop), frames
    return Context(told.forward, *numbers, told.slot, told.source, told.block, told.merged)


def begin(owner: object, context: Context) -> None:
    """Make `context` that of the thread until `owner` ends its pass."""
    _current.running = Running(owner, _pack(context), _running(), in_block())
    _current.block = None


def end(owner: object) -> None:
    """Go back to what was before the pass of `owner`; a pass that failed before it began has nothing to end."""
    running = _running()
    if running is not None and running.owner is owner:
        _current.running, _current.block = running.outer, running.block


def in_block() -> InBlock | None:
    """The block in progress whose MLP is compressed, or None."""
    return getattr(_current, "block", None)


def begin_block(owner: object, context: Context, held: tuple[Tensor, Tensor, MergeStep] | None = None) -> None:
    """Make `context` that of the thread until `owner` ends its block."""
    _current.block = InBlock(owner, _pack(context), in_block(), None, held)


def end_block(owner: object) -> tuple[Tensor, Tensor, MergeStep] | None:
    """Go back to what was before the block of `owner`, if it began, and give back what was held for it."""
    block = in_block()
    if block is None or block.owner is not owner:
        return None
    _current.block = block.outer
    return block.held


def set_step(step: MergeStep | None) -> None:
    """Keep what is around the MLP of the block in progress."""
    block = in_block()
    assert block is not None
    _current.block = block._replace(step=step)


def current() -> Context | None:
    """The context of the block or the forward pass in progress, or None."""
    progress = in_block() or _running()
    return None if progress is None else _unpack(progress.told)


class Resuming:
    """A function for gradient checkpointing whose layers are told the same when they are called again.

    That is in the backward pass, when the forward pass is over, and perhaps in a thread of autograd's.

    Args:
        checkpoint: called with a layer and its arguments, as `enable_gradient_checkpointing` takes it.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_Resumed(layer, _running()), *args, **kwargs)


class _Resumed:
    """A layer, called in the pass that was in progress when it was first called."""

    def __init__(self, layer: Callable[..., Any], running: Running | None) -> None:
        self._layer, self._running = layer, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What is compiled is traced in its pass alone, and computed again without being called.
        if torch.compiler.is_compiling():
            return self._layer(*args, **kwargs)
        before = _running(), in_block()
        _current.running, _current.block = self._running, None
        try:
            return self._layer(*args, **kwargs)
        finally:
            _current.running, _current.block = before


def resume_checkpoints(model: Any) -> None:
    """Have the checkpointing of a model resume its passes, if it does any and whoever switched it on."""
    if not getattr(model, "gradient_checkpointing", False) or torch.compiler.is_compiling():
        return
    if not isinstance(model._gradient_checkpointing_func, Resuming):
        model._gradient_checkpointing_func = Resuming(model._gradient_checkpointing_func)


def forget_checkpoints(model: Any) -> None:
    """The inverse."""
    if isinstance(getattr(model, "_gradient_checkpointing_func", None), Resuming):
        model._gradient_checkpointing_func = model._gradient_checkpointing_func.checkpoint
