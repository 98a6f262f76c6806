"""Putting token compression into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..methods import CompressionConfig, MergeConfig, MixedConfig
from ..methods.mixed import Compression, each, parts_of
from .attention import CompressedAttention, LayerPatch
from .current import forget_checkpoints
from .deciding import check_places, decision_on, layers_of, merge_place, part_of, previous_processor
from .families import Layer
from .finding import Found, find_models
from .hooks import BlockPatch, enter_block, enter_model, hide_hooks, leave_block, leave_model, show_hooks
from .mlp import enter_mlp, leave_mlp
from .numbering import follow_model, forget_number, number_layer
from .patch import Patch, PatchedLayer, move_backend, refuse_context_parallel
from .report import CompressionReport, joined
from .schedulers import Pipeline, TimestepRange, numbered
from .whole import enter_whole_block, leave_whole_block


@dataclass
class _Prepared:
    """What is to be put into a model, all of it decided and none of it done."""

    model: Any
    patch: Patch
    compressed: list[Layer]
    report: CompressionReport


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
        model_or_pipe: the model, or a pipeline with it as `unet` or `transformer`. The two that denoise in Wan 2.2,
            `transformer` and `transformer_2`, are both compressed, each by the same config; the timesteps of the config
            are those of the whole schedule.
        config: LGTMConfig, ABMConfig, ToMeConfig, SiToConfig, IEKVDConfig, ToDoConfig, AvgPoolConfig, or the config
            of a method from elsewhere; or several of them for different blocks, in a `MixedConfig`.

    Returns:
        CompressionReport: what was patched, what was not and why; print it. That of two models names the layers of
            both, `transformer_2.blocks.0.attn1`.

    Raises:
        TypeError: the model or the config is of another type.
        ValueError: the config compresses no layer of a model (all stays as it was), or a model is
            context-parallel. A patched model raises ValueError on an attention mask, on a ratio or factor that a grid
            is too small for, and on timesteps that differ within a batch where `start`, `end` or a scheduled ratio
            need a single one.
    """
    models = find_models(model_or_pipe)
    pipeline = Pipeline(None if isinstance(model_or_pipe, nn.Module) else model_or_pipe)
    steps = getattr(config, "num_train_timesteps", None)
    told = None if steps is None else numbered(steps)
    # What is refused for one model is refused before another is touched.
    prepared = [_prepare(found, config, pipeline, told) for found in models]
    for one in prepared:
        _install(one)
    return joined([one.report for one in prepared])


def _prepare(found: Found, config: Compression, pipeline: Pipeline, told: TimestepRange | None) -> _Prepared:
    """Decide on all layers of a model, which stays as it is."""
    if not isinstance(config, (CompressionConfig, MixedConfig)):
        raise TypeError(f"config: got {type(config).__name__}, expected a config such as LGTMConfig or IEKVDConfig")
    name, model, family = found
    refuse_context_parallel(model)
    old = getattr(model, "_bigain", None)
    layers = layers_of(family, model, config)
    for part in parts_of(config):
        check_places(part, layers)
    processors = [previous_processor(layer.attn, old) for layer in layers]
    resolved = _resolve(config, pipeline.scheduler)
    decisions = [decision_on(family, resolved, *pair) for pair in zip(layers, processors, strict=True)]
    report = CompressionReport(type(model).__name__, resolved, tuple(decisions)).within(name)
    parts = parts_of(resolved)
    for part, given in zip(parts, parts_of(config), strict=True):
        if not any(row.config is part for row in report.rows):
            raise ValueError(f"config: got {given}, expected one that compresses at least one layer\n{report}")
    compressed = [layer for layer, decision in zip(layers, decisions, strict=True) if decision.patched]
    attentions = [PatchedLayer(layer.name, layer.attn) for layer in _once(compressed) if layer.kind != "ff"]
    patch = Patch(family, resolved, len(compressed), attentions, pipeline=pipeline, told=told)
    if family.told(parts[0]) is None:
        patch.timestep_range()
    return _Prepared(model, patch, compressed, report)


def _once(layers: list[Layer]) -> list[Layer]:
    """The layers without those whose module came before: a block may stand in several places of a model."""
    return list({id(layer.attn): layer for layer in reversed(layers)}.values())[::-1]


def _install(prepared: _Prepared) -> None:
    """Put into a model what was decided, in the place of what is there."""
    model, patch, compressed = prepared.model, prepared.patch, prepared.compressed
    family, parts = patch.family, parts_of(patch.config)
    remove_token_compression(model)

    wholes: dict[Any, LayerPatch] = {}
    for layer in _once(compressed):
        number = part_of(patch.config, layer) or 0
        part = parts[number]
        needs_source = isinstance(part, MergeConfig) and family.needs_source
        told_layer = LayerPatch(
            part,
            merge_place(family, part),
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
            number_layer(layer.attn, layer.index)
    for entry in patch.layers:
        patch.install(entry)
    merges = any(isinstance(part, MergeConfig) for part in parts)
    hooks: list[tuple[Any, Callable[..., Any]]] = [(model, enter_model), *family.hooks(model, compressed, merges)]
    if any(part.is_random for part in parts):
        hooks.append((model, follow_model))
    hooks = list(dict.fromkeys(hooks))
    patch.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    blocks = [module for module, hook in hooks if hook in (enter_block, enter_whole_block)]
    _enter_blocks(patch, blocks, [layer for layer in compressed if layer.kind == "ff"], wholes)
    # After an exception too: the next pass must not find what this one left.
    patch.handles.append(model.register_forward_hook(leave_model, with_kwargs=True, always_call=True))
    model._bigain = patch


def _enter_blocks(patch: Patch, blocks: list[Any], mlps: list[Layer], wholes: dict[Any, LayerPatch]) -> None:
    """Tell blocks whose layers share a plan, and put hooks around MLPs and behind blocks."""
    family, handles = patch.family, patch.handles
    with_mlp = {layer.block for layer in mlps if not layer.is_whole}
    for block in blocks:
        form = family.whole_form(block)
        block._bigain = BlockPatch(family.block, family.needs_source, block in with_mlp, wholes.get(block), form)
        patch.told_modules.append(block)
    for block, is_whole in {layer.block: layer.is_whole for layer in mlps}.items():
        leave = leave_whole_block if is_whole else leave_block
        handles.append(block.register_forward_hook(leave, always_call=True))
    for layer in _once(mlps):
        if not layer.is_whole:
            patch.told_modules.append(layer.attn)
            handles.append(layer.attn.register_forward_pre_hook(enter_mlp))
            handles.append(layer.attn.register_forward_hook(leave_mlp))
            show_hooks(layer.attn)


def remove_token_compression(model_or_pipe: Any) -> None:
    """Take token compression out of a model, or out of those of a pipeline.

    Processors, hooks and attributes are as before it was applied.

    A model without compression stays as it is.

    Raises:
        TypeError: `model_or_pipe` is of no supported type.
    """
    for found in find_models(model_or_pipe):
        if getattr(found.model, "_bigain", None) is not None:
            _remove(found.model)


def _remove(model: Any) -> None:
    patch: Patch = model._bigain
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
        hide_hooks(module)
        del module._bigain
        forget_number(module)
    del model._bigain


@contextmanager
def token_compression(model_or_pipe: Any, config: Compression) -> Iterator[CompressionReport]:
    """Compress within a `with` block; afterwards, also after an exception, what was there before is back.

    Yields the report; arguments and errors are those of `apply_token_compression`.
    """
    before = [(found, getattr(found.model, "_bigain", None)) for found in find_models(model_or_pipe)]
    try:
        yield apply_token_compression(model_or_pipe, config)
    finally:
        for found, outer in before:
            if outer is None:
                remove_token_compression(found.model)
            elif getattr(found.model, "_bigain", None) is not outer:
                _install(_prepare(found, outer.config, outer.pipeline, outer.told))
