"""What the layers of one forward pass are told.

`Forward` is what is decided once, when the model is called; a `Context` is that and the place of the layers of one
resolution. Everything travels as call arguments: nothing outlives a forward pass, and under `torch.compile` arguments,
unlike attributes, become dynamic and cost no graph per resolution. `hooks.py` has the hooks that hand it on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..methods import CompressionConfig, MergeConfig, PoolConfig
from ..methods.schedule import between
from ..plan import MergePlan
from .schedulers import numbered

if TYPE_CHECKING:
    from .steps import MergedStep

Grid = tuple[int, int]


class PlanSlot:
    """Holds a plan for those that come later in the same forward pass."""

    def __init__(self) -> None:
        self.plan: MergePlan | None = None


class PlanSlots:
    """The slots of all resolutions of one forward pass, for `cached_assignment`.

    An object, not a dict: the offloading hooks of accelerate copy dicts among arguments, and copies would not share.
    """

    def __init__(self) -> None:
        self._slots: dict[Grid, PlanSlot] = {}

    def at(self, grid: Grid) -> PlanSlot:
        return self._slots.setdefault(grid, PlanSlot())


class Pass:
    """One forward pass; `reached` tells whether a compressed layer took part in it."""

    def __init__(self) -> None:
        self.reached = False


class Forward(NamedTuple):
    """What is decided once for a forward pass.

    Attributes:
        active: whether this timestep is compressed.
        ratio: fraction of tokens to merge, by resolution level where the config says so; 0.0 for a method that pools.
        alpha: weight of nearest against average pooling, a number or (B,) float32; 1.0 for a method that merges.
        timestep: (B,) what random methods vary with; None for the others.
        batch: of the model's call, as the size of a tensor without storage, which compiled code takes as dynamic; None
            where no rows share a plan.
        conditions: rows of the batch that belong to one picture, where the pipeline says; see `Pipeline.conditions`.
        slots: of cached assignment, or None.
        watched: told when a compressed layer is reached, or None.
        parts: what is decided for each config of a `MixedConfig`; none where there is one config alone.
    """

    active: bool
    ratio: float | dict[int, float]
    alpha: float | Tensor
    timestep: Tensor | None = None
    batch: Tensor | None = None
    conditions: int | None = None
    slots: PlanSlots | None = None
    watched: Pass | None = None
    parts: tuple[Any, ...] = ()

    def ratio_at(self, level: int) -> float:
        """The fraction of tokens to merge at a resolution level."""
        return self.ratio[level] if isinstance(self.ratio, dict) else self.ratio


class Context(NamedTuple):
    """What the layers of one resolution are told.

    Attributes:
        forward: what was decided for the forward pass.
        grid: (H, W) of the image's tokens.
        image_tokens: (start, stop) of them among all tokens that attend to each other.
        frames: how many such grids follow each other there: 1 of a picture, more of a video.
        slot: of cached assignment at this resolution, or None.
        source: (B, N, C) residual stream of the block to match tokens on, or None where tokens are matched on the
            input of the attention itself.
        block: where the first layer of a block leaves its plan for the others, or None.
        merged: what attention does in a block whose tokens are merged already, or None.
    """

    forward: Forward
    grid: Grid
    image_tokens: tuple[int, int]
    frames: int = 1
    slot: PlanSlot | None = None
    source: Tensor | None = None
    block: PlanSlot | None = None
    merged: MergedStep | None = None


def at_grid(forward: Forward, grid: Grid, start: int = 0, frames: int = 1) -> Context:
    """The context of the layers whose image tokens form `frames` grids and stand from `start` on."""
    slot = None if forward.slots is None else forward.slots.at(grid)
    return Context(forward, grid, (start, start + frames * grid[0] * grid[1]), frames, slot)


def of_part(context: Context, part: int) -> Context:
    """The context as the layers of config number `part` of a `MixedConfig` see it."""
    if not context.forward.parts:
        return context
    forward = context.forward.parts[part]
    slot = None if forward.slots is None else forward.slots.at(context.grid)
    return context._replace(forward=forward, slot=slot)


def host_timestep(timestep: Tensor | float | int | None) -> float:
    """The one timestep of a batch as a Python number. For tensors this waits for the device.

    Raises:
        ValueError: there is no timestep, or the rows of the batch have different ones.
    """
    if timestep is None:
        raise ValueError("timestep: got None, expected a timestep, which start, end and a scheduled ratio depend on")
    if not isinstance(timestep, Tensor):
        return float(timestep)
    # Of a timestep for each token the noisiest counts, as in `timestep_rows`.
    values = (timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep.flatten()).tolist()
    if len(set(values)) != 1:
        raise ValueError(
            f"timestep: got {values}, expected one timestep for all rows of a batch: start, end and a scheduled ratio "
            "decide on shapes, which rows cannot have each for themselves"
        )
    return float(values[0])


def timestep_rows(timestep: Tensor | float | int | None, sample: Tensor) -> Tensor:
    """The timestep of each row as a (B,) tensor on the device of `sample` (B, ...); a Python number costs no copy.

    Floating-point timesteps become float32: a model in 16 bits is told timesteps of 16 bits, in which neither the sums
    that keep blocks apart nor 64ths of a step have room.
    """
    if timestep is None:
        raise ValueError("timestep: got None, expected a timestep, which this method depends on")
    if not isinstance(timestep, Tensor):
        dtype = torch.float32 if isinstance(timestep, float) else torch.int64
        return torch.full((sample.shape[0],), timestep, dtype=dtype, device=sample.device)
    if timestep.is_floating_point():
        timestep = timestep.to(torch.float32)
    if timestep.dim() > 1:
        # A timestep for each token: the noisiest counts.
        timestep = timestep.flatten(1).amax(1)
    return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])


def for_rows(values: Tensor, rows: int, frames: int = 1) -> Tensor:
    """A value of each sample of the batch (B,), for as many rows, of which each sample has `frames` that we made: the
    frames of a video, which are rows in some places, have what is their video's."""
    if values.shape[0] == rows:
        return values
    if rows // frames % values.shape[0] != 0:
        # FasterCache goes on with the conditional half of a batch, the second.
        values = values[values.shape[0] // 2 :]
    return values.repeat_interleave(rows // values.shape[0])


def make_forward(config: CompressionConfig, sample: Tensor, timestep: Tensor | float | int | None) -> Forward:
    """What is decided for one forward pass from the config and the timestep alone.

    Args:
        config: what is applied to the model.
        sample: (B, ...) input of the model.
        timestep: steps of training, T - 1 the noisiest: a number or a tensor of one or B values. It is read on the host
            only where `start`, `end` or a scheduled `ratio` ask for it, once.

    Raises:
        ValueError: a timestep is needed and missing, or differs between the rows where it must not.
    """
    steps = numbered(config.train_timesteps)
    alpha: float | Tensor | tuple[float, float] = config.alpha if isinstance(config, PoolConfig) else 1.0
    active, noise = True, 0.0
    if config.has_window or (isinstance(config, MergeConfig) and config.is_scheduled):
        noise = steps.noise(host_timestep(timestep))
        active = config.start <= 1.0 - noise <= config.end
    if isinstance(alpha, tuple):
        # Where nothing is compressed no timestep is needed either.
        alpha = between(alpha, steps.noise(timestep_rows(timestep, sample))) if active else alpha[0]
    rows = timestep_rows(timestep, sample) if active and config.is_random else None
    cached = active and isinstance(config, MergeConfig) and config.cached_assignment
    ratios: dict[int, float] = {}
    for level in config.levels or (1,):
        each = config.ratio_at(level) if isinstance(config, MergeConfig) else 0.0
        ratios[level] = between(each, noise) if isinstance(each, tuple) else each
    ratio = ratios[1] if config.levels is None else ratios
    shares = isinstance(config, MergeConfig) and config.share_plan is not None
    batch = torch.empty(sample.shape[0], device="meta") if shares else None
    return Forward(active, ratio, alpha, rows, batch, slots=PlanSlots() if cached else None)
