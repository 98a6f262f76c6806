"""The forward pass in progress, for models that hand nothing on to their attention.

Where a model passes a dict of arguments on to its processors, the context travels in it. Others are told here, by hooks
of the model, for as long as its forward pass lasts; each thread has its own. The numbers that shape tokens are kept as
the shape of a tensor without storage: `torch.compile` takes sizes of tensors as dynamic and integers as constants.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .context import Context, Forward, PlanSlot


class Running(NamedTuple):
    """A forward pass in progress.

    Attributes:
        owner: what began it, the patch of the model.
        forward: what was decided for it.
        sizes: a tensor shaped (tokens in front of the image, frames, height, width).
        slot: of cached assignment, or None.
        outer: the pass of another model that this one interrupts, or None.
    """

    owner: object
    forward: Forward
    sizes: Tensor
    slot: PlanSlot | None
    outer: Running | None


# Holds `running`. A plain one without a default in its class, which torch.compile would take for what it holds.
_current = threading.local()


def _running() -> Running | None:
    return getattr(_current, "running", None)


def begin(owner: object, context: Context) -> None:
    """Make `context` that of the thread until `owner` ends its pass."""
    sizes = torch.empty((context.image_tokens[0], context.frames, *context.grid), device="meta")
    _current.running = Running(owner, context.forward, sizes, context.slot, _running())


def end(owner: object) -> None:
    """Go back to what was before the pass of `owner`; a pass that failed before it began has nothing to end."""
    running = _running()
    if running is not None and running.owner is owner:
        _current.running = running.outer


def current() -> Context | None:
    """The context of the forward pass in progress, or None."""
    running = _running()
    if running is None:
        return None
    start, frames, height, width = running.sizes.shape
    stop = start + frames * height * width
    return Context(running.forward, (height, width), (start, stop), frames, running.slot)
