"""Putting token compression into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..methods import CompressionConfig, MergeConfig, MixedConfig, PoolConfig
from ..methods.mixed import Compression, each, parts_of
from .attention import CompressedAttention, LayerPatch
from .current import forget_checkpoints
from .families import REFUSED, Family, Layer, family_of, registered
from .hooks import BlockPatch, enter_block, enter_model, leave_block, leave_model
from .mlp import enter_mlp, leave_mlp
from .patch import Patch, PatchedLayer, move_backend, refuse_context_parallel
from .projections import path_of
from .report import CompressionReport, Decision
from .schedulers import Pipeline, TimestepRange, numbered
from .whole import enter_whole_block, leave_whole_block


def find_model(model_or_pipe: Any) -> tuple[Any, Family]:
    """The model to patch and its family: the argument, the `unet` or `transformer` of a pipeline, or what torch.compile
    wrapped.

    Raises:
        TypeError: it is of no family that is known.
    """
    model = model_or_pipe
    if not isinstance(model, nn.Module):
        model = getattr(model_or_pipe, "unet", None) or getattr(model_or_pipe, "transformer", None)
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    if family is None:
        came = type(model_or_pipe).__name__
        if model is not None and model is not model_or_pipe:
            came += f" with {type(model).__name__}"
        if type(model).__name__ in REFUSED:
            raise TypeError(f"model_or_pipe: got {came}, which cannot be compressed: {REFUSED[type(model).__name__]}")
        known = [family.model.__name__ for family in registered()]
        names = ", ".join(known[:-1]) + f" or {known[-1]}"
        raise TypeError(f"model_or_pipe: got {came}, expected a {names}, or a pipeline with one as unet or transformer")
    return model, family


def recommended_config(model_or_pipe: Any) -> CompressionConfig:
    """The config to begin with for a model or pipeline: that of its family, with its reason in docs/models.md.

    Raises:
        TypeError: the model is of no family that is known.
        ValueError: its family, one of another package, recommends nothing.
    """
    model, family = find_model(model_or_pipe)
    config = family.recommend(model)
    if config is None:
        raise ValueError(f"model_or_pipe: got {type(model).__name__}, expected a model with a recommendation")
    return config


def _merge(family: Family, config: CompressionConfig) -> str:
    """Where a config merges in models of a family."""
    merge = getattr(config, "merge", "auto")
    return family.merges[0] if merge == "auto" else merge


def _unable(family: Family, config: CompressionConfig) -> str | None:
    """Why no layer of the family can be compressed like this, or None."""
    if isinstance(config, MergeConfig) and _merge(family, config) not in family.merges:
        return f"merge={config.merge!r}, this model offers {' or '.join(map(repr, family.merges))}"
    if isinstance(config, PoolConfig) and config.pool not in family.pools:
        return f"pool={config.pool!r}, this model offers {' or '.join(map(repr, family.pools))}"
    return None


def decide(family: Family, config: CompressionConfig, layer: Layer, processor: Any) -> tuple[bool, str]:
    """Whether `config` compresses `layer`, whose processor would be replaced, and the reason."""
    if layer.kind not in config.modules:
        return False, f"modules={config.modules}"
    if config.blocks is not None and layer.index not in config.blocks:
        return False, f"block {layer.index} is not among blocks={config.blocks}"
    if not config.compresses(layer.level):
        asked = f"max_downsample={config.max_downsample}" if config.levels is None else f"levels={list(config.levels)}"
        return False, f"{_resolution(layer)}, {asked}"
    if layer.kind == "ff":
        reason = None if layer.attn is not None else family.no_mlp
        if layer.is_whole and ("attn1" not in config.modules or _merge(family, config) != "hidden"):
            reason = f"{family.no_mlp}: they merge with 'attn1' among the modules and merge='hidden'"
    else:
        reason = _unable(family, config) or family.refuses(config, layer)
        if reason is None and not family.stands_in(type(processor)):
            reason = f"it has a processor of its own, {type(processor).__name__}"
    if reason is not None:
        return False, reason
    return True, _resolution(layer)


def _resolution(layer: Layer) -> str:
    return "full resolution" if layer.level == 1 else f"1/{layer.level} resolution"


def _previous_processor(attn: Any, patch: Patch | None) -> Any:
    """The processor that a layer has without compression; None of an MLP."""
    processor = getattr(attn, "processor", None)
    if patch is None or not isinstance(processor, CompressedAttention):
        return processor
    return next(layer.previous[type(processor)] for layer in patch.layers if layer.attn is attn)


def _path(family: Family, layer: Layer, config: CompressionConfig, processor: Any) -> str:
    """`Decision.path` of a layer that is compressed in the place of `processor`."""
    if layer.kind == "ff":
        return "merge the tokens of the whole block" if layer.is_whole else "merge tokens"
    if isinstance(config, MergeConfig):
        what = "tokens" if _merge(family, config) == "hidden" else "queries, keys and values"
        return f"merge {what}" + (", weigh keys by size" if config.proportional else "")
    stand_in = family.stand_in(processor)
    early = stand_in.pools_early(layer.attn, config)
    return path_of(layer.attn, early, stand_in.uses_fused(layer.attn), family.text_inside(layer))


def _check_places(config: CompressionConfig, layers: list[Layer]) -> None:
    count = 1 + max((layer.index for layer in layers), default=-1)
    unknown = [index for index in config.blocks or () if index >= count]
    if unknown:
        raise ValueError(f"blocks: got {unknown}, expected indices below {count}, the number of blocks of the model")
    has = sorted({layer.level for layer in layers})
    missing = [level for level in config.levels or () if level not in has]
    if missing:
        name = "ratio" if isinstance(config, MergeConfig) else "factor"
        raise ValueError(f"{name}: got {config.by_level} with the levels {missing}, expected those of the model, {has}")


def _layers(family: Family, model: Any, config: Compression) -> list[Layer]:
    """The attentions of a model, and its MLPs where these are asked for, in module order."""
    layers = family.layers(model)
    if "ff" not in config.modules:
        return layers
    if family.mlp is None:
        raise ValueError(
            f"modules: got {config.modules}, expected attentions alone: tokens are not merged around the MLPs of a "
            f"{type(model).__name__}"
        )
    return sorted(layers + family.mlps(layers), key=lambda layer: layer.index)


def _part_of(config: Compression, layer: Layer) -> int | None:
    """Which config of a `MixedConfig` speaks of a layer; None where none does."""
    if not isinstance(config, MixedConfig):
        return 0
    return next((i for i, part in enumerate(config.configs) if layer.index in (part.blocks or ())), None)


def _decision(family: Family, config: Compression, layer: Layer, processor: Any) -> Decision:
    """What becomes of a layer, whose processor would be replaced."""
    number = _part_of(config, layer)
    if number is None:
        reason = f"block {layer.index} is in none of the {len(parts_of(config))} configs"
        return Decision(layer.name, layer.kind, layer.index, False, reason)
    part = parts_of(config)[number]
    yes, reason = decide(family, part, layer, processor)
    path = _path(family, layer, part, processor) if yes else ""
    return Decision(layer.name, layer.kind, layer.index, yes, reason, path, part if yes else None)


def _resolve(config: Compression, scheduler: Any) -> Compression:
    """The config with `num_train_timesteps` filled in from the scheduler of a pipeline."""
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if config.num_train_timesteps is not None or steps is None:
        return config
    return each(config, lambda part: replace(part, num_train_timesteps=steps))


def apply_token_compression(model_or_pipe: Any, config: Compression) -> CompressionReport:
    """Compress the tokens of a diffusers model's attention, in place.

    Works on the models of `bigain_kernels.diffusers.families` (docs/models.md lists them: Stable Diffusion 1.5 to 3.5,
    SDXL, DiT, PixArt, Flux, Qwen-Image, Wan, LTX, HunyuanVideo, CogVideoX and others), bare or in a pipeline. A second
    call replaces the first. Weights, `state_dict` and the saved config stay as they are. Call the model as
    before, at any resolution; fusing projections, loading IP-Adapters, `compile_repeated_blocks`, offloading and
    `copy.deepcopy` work before and after. A layer whose processor is replaced later by one that compression cannot
    stand in for (an IP-Adapter's, perturbed attention's during a call) runs uncompressed as long as that one is there,
    and a warning says so once. Compressed models can be trained; docs/training.md.

    In a pipeline, the scheduler that it has at each call tells what timesteps mean; of a model alone, and with
    `num_train_timesteps` given, they are steps from T - 1 to 0 (sigma where the model is told sigma).

    The grid of the tokens of Flux, Flux.2 and Chroma is read from `img_ids`, once for each such tensor, which waits for
    the device. To avoid that, in CUDA graphs or `torch.compile(model, fullgraph=True)`, give it with the call, in
    tokens: `joint_attention_kwargs={"bigain_grid": (H, W)}`.

    Args:
        model_or_pipe: the model, or a pipeline with it as `unet` or `transformer`.
        config: LGTMConfig, ABMConfig, ToMeConfig, SiToConfig, IEKVDConfig, ToDoConfig, AvgPoolConfig, or the config
            of a method from elsewhere; or several of them for different blocks, in a `MixedConfig`.

    Returns:
        CompressionReport: what was patched, what was not and why; print it.

    Raises:
        TypeError: the model or the config is of another type.
        ValueError: the config compresses no layer of this model (the model stays as it was), or the model is
            context-parallel. A patched model raises ValueError on an attention mask, on a ratio or factor that a grid
            is too small for, and on timesteps that differ within a batch where `start`, `end` or a scheduled ratio
            need a single one.
    """
    model, _ = find_model(model_or_pipe)
    pipeline = Pipeline(None if isinstance(model_or_pipe, nn.Module) else model_or_pipe)
    steps = getattr(config, "num_train_timesteps", None)
    return _apply(model, config, pipeline, None if steps is None else numbered(steps))


def _apply(model: Any, config: Compression, pipeline: Pipeline, told: TimestepRange | None) -> CompressionReport:
    if not isinstance(config, (CompressionConfig, MixedConfig)):
        raise TypeError(f"config: got {type(config).__name__}, expected a config such as LGTMConfig or IEKVDConfig")
    refuse_context_parallel(model)
    _, family = find_model(model)
    old = getattr(model, "_bigain", None)
    layers = _layers(family, model, config)
    for part in parts_of(config):
        _check_places(part, layers)
    processors = [_previous_processor(layer.attn, old) for layer in layers]
    resolved = _resolve(config, pipeline.scheduler)
    decisions = [_decision(family, resolved, *pair) for pair in zip(layers, processors, strict=True)]
    report = CompressionReport(type(model).__name__, resolved, tuple(decisions))
    parts = parts_of(resolved)
    for part, given in zip(parts, parts_of(config), strict=True):
        if not any(row.config is part for row in report.rows):
            raise ValueError(f"config: got {given}, expected one that compresses at least one layer\n{report}")
    compressed = [layer for layer, decision in zip(layers, decisions, strict=True) if decision.patched]
    attentions = [PatchedLayer(layer.name, layer.attn) for layer in compressed if layer.kind != "ff"]
    patch = Patch(family, resolved, len(compressed), attentions, pipeline=pipeline, told=told)
    if family.told(parts[0]) is None:
        patch.timestep_range()
    remove_token_compression(model)

    wholes: dict[Any, LayerPatch] = {}
    for layer in compressed:
        number = _part_of(resolved, layer) or 0
        part = parts[number]
        needs_source = isinstance(part, MergeConfig) and family.needs_source
        told_layer = LayerPatch(
            part,
            _merge(family, part),
            needs_source,
            layer.level,
            number,
            layer.kind == "ff" and family.text_in_mlp(layer),
        )
        if layer.is_whole:
            wholes[layer.attn] = told_layer
        else:
            layer.attn._bigain = told_layer
        if part.is_random:
            device = next(layer.attn.parameters()).device
            # Offloading may have left nothing but a meta tensor there.
            index = torch.tensor(layer.index, device="cpu" if device.type == "meta" else device)
            layer.attn.register_buffer("bigain_block", index, persistent=False)
    for entry in patch.layers:
        patch.install(entry)
    merges = any(isinstance(part, MergeConfig) for part in parts)
    hooks: list[tuple[Any, Callable[..., Any]]] = [(model, enter_model), *family.hooks(model, compressed, merges)]
    patch.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    blocks = [module for module, hook in hooks if hook in (enter_block, enter_whole_block)]
    _enter_blocks(patch, blocks, [layer for layer in compressed if layer.kind == "ff"], wholes)
    # After an exception too: the next pass must not find what this one left.
    patch.handles.append(model.register_forward_hook(leave_model, always_call=True))
    model._bigain = patch
    return report


def _enter_blocks(patch: Patch, blocks: list[Any], mlps: list[Layer], wholes: dict[Any, LayerPatch]) -> None:
    """Tell blocks whose layers share a plan, and put hooks around MLPs and behind blocks."""
    family, handles = patch.family, patch.handles
    with_mlp = {layer.block for layer in mlps if not layer.is_whole}
    for block in blocks:
        form = family.wholes.get(type(block))
        block._bigain = BlockPatch(family.block, family.needs_source, block in with_mlp, wholes.get(block), form)
        patch.told_modules.append(block)
    for layer in mlps:
        leave = leave_whole_block if layer.is_whole else leave_block
        handles.append(layer.block.register_forward_hook(leave, always_call=True))
        if not layer.is_whole:
            patch.told_modules.append(layer.attn)
            handles.append(layer.attn.register_forward_pre_hook(enter_mlp))
            handles.append(layer.attn.register_forward_hook(leave_mlp))


def remove_token_compression(model_or_pipe: Any) -> None:
    """Take token compression out of a model: processors, hooks and attributes are as before it was applied.

    A model without compression stays as it is.

    Raises:
        TypeError: `model_or_pipe` is of no supported type.
    """
    model, _ = find_model(model_or_pipe)
    patch = getattr(model, "_bigain", None)
    if patch is None:
        return
    for handle in (*patch.handles, *(handle for _, handle in patch.idle.values())):
        handle.remove()
    forget_checkpoints(model)
    # What unfuse_qkv_projections would put back.
    kept = getattr(model, "original_attn_processors", None) or {}
    for layer in patch.layers:
        key, current = f"{layer.name}.processor", layer.attn.processor
        if isinstance(kept.get(key), CompressedAttention):
            kept[key] = layer.previous[type(kept[key])]
        if isinstance(current, CompressedAttention):
            previous = layer.previous[type(current)]
            move_backend(current, previous)
            layer.attn.set_processor(previous)
    for module in (*(layer.attn for layer in patch.layers), *patch.told_modules):
        del module._bigain
        if hasattr(module, "bigain_block"):
            del module.bigain_block
    del model._bigain


@contextmanager
def token_compression(model_or_pipe: Any, config: Compression) -> Iterator[CompressionReport]:
    """Compress within a `with` block; afterwards, also after an exception, what was there before is back.

    Yields the report; arguments and errors are those of `apply_token_compression`.
    """
    model, _ = find_model(model_or_pipe)
    outer = getattr(model, "_bigain", None)
    try:
        yield apply_token_compression(model_or_pipe, config)
    finally:
        if outer is None:
            remove_token_compression(model)
        elif getattr(model, "_bigain", None) is not outer:
            _apply(model, outer.config, outer.pipeline, outer.told)
