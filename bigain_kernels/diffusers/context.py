"""What the layers of one forward pass are told, and the hooks that tell them.

A forward pre-hook of the model puts a fresh context, a dict, under the key "bigain" of the call's
`cross_attention_kwargs`, or whatever that is called in the model, see `CARRIERS`; further hooks add the grid of each
resolution and the residual stream of each block, and take the key away where nobody expects it. Everything travels as
call arguments: nothing outlives a forward pass, and under `torch.compile` arguments, unlike attributes, become dynamic
and cost no graph per resolution. All hooks are plain functions, which one compiled graph can serve for all blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_pair
from ..methods import CompressionConfig, MergeConfig, PoolConfig
from ..methods.schedule import between
from ..plan import MergePlan
from .schedulers import TimestepRange, numbered

KEY = "bigain"
# In `joint_attention_kwargs` of a Flux model: its grid, from a caller who does not want it read from the positions.
GRID_KEY = "bigain_grid"
# Arguments that models pass on to their attention processors.
CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

Context = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# What flow-matching models are told: Flux and Qwen-Image sigma itself, from 1 to 0.
SIGMA = TimestepRange(0.0, 1.0)


# Arguments of the forward methods that are read here, in their order. They are written down, not asked of the classes:
# other software replaces those methods by wrappers that take whatever comes.
_UNET_ARGUMENTS = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
)
_DIT_ARGUMENTS = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs")
_FLUX_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
    "joint_attention_kwargs",
)
_SD3_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "block_controlnet_hidden_states",
    "joint_attention_kwargs",
)
_QWEN_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "timestep",
    "img_shapes",
    "guidance",
    "attention_kwargs",
)
_TRANSFORMER_ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "added_cond_kwargs",
    "class_labels",
    "cross_attention_kwargs",
)
_BLOCK_ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
)


class PlanSlot:
    """Holds the plan of one resolution during one forward pass, for `cached_assignment`."""

    def __init__(self) -> None:
        self.plan: MergePlan | None = None


class Pass:
    """One forward pass; `reached` tells whether a compressed layer took part in it."""

    def __init__(self) -> None:
        self.reached = False


class PlanSlots:
    """The slots of all resolutions of one forward pass.

    An object, not a dict: the offloading hooks of accelerate copy dicts among arguments, and copies would not share.
    """

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], PlanSlot] = {}

    def at(self, grid: tuple[int, int]) -> PlanSlot:
        return self._slots.setdefault(grid, PlanSlot())


def _get(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument `name` of a call, given by position or by keyword."""
    position = names.index(name)
    return args[position] if position < len(args) else kwargs.get(name)


def _carrier(names: tuple[str, ...]) -> str:
    return next(name for name in CARRIERS if name in names)


def _with_context(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], context: Context | None
) -> Call:
    """The call with `context` (or none) in the dict for its processors; the caller's own dict stays as it is."""
    name = _carrier(names)
    given = dict(_get(names, args, kwargs, name) or {})
    given.pop(KEY, None)
    given.pop(GRID_KEY, None)
    if context is not None:
        given[KEY] = context
    position = names.index(name)
    # None, not {}: what diffusers passes by itself, so layers that were compiled without us keep their graphs.
    if position < len(args):
        return (*args[:position], given or None, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: given or None}


def _context_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context | None:
    return (_get(names, args, kwargs, _carrier(names)) or {}).get(KEY)


def host_timestep(timestep: Tensor | float | int | None) -> float:
    """The one timestep of a batch as a Python number. For tensors this waits for the device.

    Raises:
        ValueError: there is no timestep, or the rows of the batch have different ones.
    """
    if timestep is None:
        raise ValueError("timestep: got None, expected a timestep, which start, end and a scheduled ratio depend on")
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.flatten().tolist()
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
    return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])


def make_context(config: CompressionConfig, sample: Tensor, timestep: Tensor | float | int | None) -> Context:
    """The context of one forward pass.

    Args:
        config: what is applied to the model.
        sample: (B, C, H, W) input of the model.
        timestep: steps of training, T - 1 the noisiest: a number or a tensor of one or B values. It is read on the host
            only where `start`, `end` or a scheduled `ratio` ask for it, once.

    Returns:
        "active", whether this timestep is compressed, and what the config asks for: "ratio" (float), "alpha" (B,),
        "timestep" (B,), "slots".

    Raises:
        ValueError: a timestep is needed and missing, or differs between the rows where it must not.
    """
    steps = numbered(config.train_timesteps)
    context: Context = {"active": True}
    ratio = config.ratio if isinstance(config, MergeConfig) else None
    if config.has_window or isinstance(ratio, tuple):
        noise = steps.noise(host_timestep(timestep))
        if not config.start <= 1.0 - noise <= config.end:
            return {"active": False}
        if isinstance(ratio, tuple):
            context["ratio"] = between(ratio, noise)
    if isinstance(config, PoolConfig) and isinstance(config.alpha, tuple):
        context["alpha"] = between(config.alpha, steps.noise(timestep_rows(timestep, sample)))
    if config.is_random:
        context["timestep"] = timestep_rows(timestep, sample)
    if isinstance(config, MergeConfig) and config.cached_assignment:
        context["slots"] = PlanSlots()
    return context


def _start(patch: Any, sample: Tensor, timestep: Any, told: TimestepRange | None = None) -> Context:
    """The context of a forward pass of a patched model, whose own timesteps are `told` or those of its scheduler."""
    steps = numbered(patch.config.train_timesteps)
    told = told or patch.timestep_range()
    if told != steps and timestep is not None:
        timestep = told.noise(timestep) * steps.noisiest
    return patch.watch(make_context(patch.config, sample, timestep))


def _at_grid(context: Context, height: int, width: int) -> Context:
    """The context as the layers of one resolution see it."""
    inside = {**context, "grid": (height, width)}
    slots = inside.pop("slots", None)
    if slots is not None:
        inside["slot"] = slots.at((height, width))
    return inside


def enter_unet(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a U-Net: verifies the patch and starts the context of this forward pass."""
    patch = unet._bigain
    patch.verify(unet)
    sample, timestep = (_get(_UNET_ARGUMENTS, args, kwargs, name) for name in ("sample", "timestep"))
    return _with_context(_UNET_ARGUMENTS, args, kwargs, _start(patch, sample, timestep))


def enter_dit(dit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a DiT: as `enter_unet`, and the grid of its one resolution."""
    patch = dit._bigain
    patch.verify(dit)
    sample, timestep = (_get(_DIT_ARGUMENTS, args, kwargs, name) for name in ("hidden_states", "timestep"))
    context = _start(patch, sample, timestep)
    context = _at_grid(context, sample.shape[-2] // dit.patch_size, sample.shape[-1] // dit.patch_size)
    return _with_context(_DIT_ARGUMENTS, args, kwargs, context)


def enter_flux(flux: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Flux model: as `enter_unet`, and the grid and place of the image tokens."""
    patch = flux._bigain
    patch.verify(flux)
    sample, text, timestep, ids = (
        _get(_FLUX_ARGUMENTS, args, kwargs, name)
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "img_ids")
    )
    context = _start(patch, sample, timestep, SIGMA)
    given = (_get(_FLUX_ARGUMENTS, args, kwargs, "joint_attention_kwargs") or {}).get(GRID_KEY)
    grid = patch.grid_reader(ids) if given is None else check_pair(GRID_KEY, given)
    start, count = text.shape[1], grid[0] * grid[1]
    if count > sample.shape[1]:
        raise ValueError(
            f"{GRID_KEY}: got {grid}, that is {count} tokens, expected at most {sample.shape[1]}, the image's"
        )
    place = {"image_tokens": (start, start + count)}
    return _with_context(_FLUX_ARGUMENTS, args, kwargs, {**_at_grid(context, *grid), **place})


def enter_qwen(qwen: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Qwen-Image model: as `enter_flux`, but the grid is among the arguments.

    Raises:
        ValueError: the first picture has several frames.
    """
    patch = qwen._bigain
    patch.verify(qwen)
    sample, text, timestep, shapes = (
        _get(_QWEN_ARGUMENTS, args, kwargs, name)
        for name in ("hidden_states", "encoder_hidden_states", "timestep", "img_shapes")
    )
    context = _start(patch, sample, timestep, SIGMA)
    # As the model takes it: a shape, or those of the rows, which are equal, each a shape or those of its pictures.
    first = shapes[0] if isinstance(shapes, list) else shapes
    first = first[0] if isinstance(first, list) else first
    frames, height, width = first
    if frames != 1:
        raise ValueError(f"img_shapes: got {first}, expected one frame: pooling is over one H x W grid")
    start = text.shape[1]
    place = {"image_tokens": (start, start + height * width)}
    return _with_context(_QWEN_ARGUMENTS, args, kwargs, {**_at_grid(context, height, width), **place})


def enter_sd3(sd3: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Stable Diffusion 3 model: as `enter_unet`, and the grid of its one resolution."""
    patch = sd3._bigain
    patch.verify(sd3)
    sample, timestep = (_get(_SD3_ARGUMENTS, args, kwargs, name) for name in ("hidden_states", "timestep"))
    # It is told T * sigma, from T to 0.
    context = _start(patch, sample, timestep, TimestepRange(0.0, float(patch.config.train_timesteps)))
    size = sd3.config.patch_size
    return _with_context(
        _SD3_ARGUMENTS, args, kwargs, _at_grid(context, sample.shape[-2] // size, sample.shape[-1] // size)
    )


def enter_transformer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a U-Net's Transformer2DModel with compressed blocks: its (B, C, H, W) input tells the grid.

    So the grid is right at every level whatever the latent size, odd or not square.
    """
    context = _context_of(_TRANSFORMER_ARGUMENTS, args, kwargs)
    if context is None:
        return args, kwargs
    height, width = _get(_TRANSFORMER_ARGUMENTS, args, kwargs, "hidden_states").shape[-2:]
    return _with_context(_TRANSFORMER_ARGUMENTS, args, kwargs, _at_grid(context, height, width))


def skip_transformer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Transformer2DModel without compressed blocks: its layers do not know the context."""
    return _with_context(_TRANSFORMER_ARGUMENTS, args, kwargs, None)


def enter_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a U-Net block whose tokens are merged: matching looks at the residual stream before norm1.

    The dict it makes is the block's own; attn1 leaves its plan there for attn2.
    """
    context = _context_of(_BLOCK_ARGUMENTS, args, kwargs)
    if context is None:
        return args, kwargs
    source = _get(_BLOCK_ARGUMENTS, args, kwargs, "hidden_states")
    return _with_context(_BLOCK_ARGUMENTS, args, kwargs, {**context, "source": source})


def skip_attention(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of an attention that is not compressed: diffusers would warn that it does not know the key."""
    return args, {name: value for name, value in kwargs.items() if name != KEY}
