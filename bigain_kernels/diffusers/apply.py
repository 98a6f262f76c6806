"""Putting token compression into a model and taking it out again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.hooks._helpers import AttentionProcessorRegistry  # there is no public way to tell it a class
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..methods import CompressionConfig, MergeConfig
from . import context as hooks
from .grids import GridReader
from .joint import FluxPoolAttnProcessor, QwenPoolAttnProcessor, SD3PoolAttnProcessor
from .layers import ATTENTIONS, REPLACEABLE, Layer, decide, find_layers, find_model
from .processors import (
    FusedMergeAttnProcessor,
    FusedPoolAttnProcessor,
    LayerPatch,
    MergeAttnProcessor,
    PoolAttnProcessor,
)
from .projections import path_of
from .report import CompressionReport, Decision
from .schedulers import Pipeline, TimestepRange, numbered, range_of, reads_timesteps

logger = logging.getLogger(__name__)

_JOINT = {"flux": FluxPoolAttnProcessor, "sd3": SD3PoolAttnProcessor, "qwen": QwenPoolAttnProcessor}
PROCESSORS = (
    MergeAttnProcessor,
    FusedMergeAttnProcessor,
    PoolAttnProcessor,
    FusedPoolAttnProcessor,
    *_JOINT.values(),
)
_ENTER = {
    UNet2DConditionModel: hooks.enter_unet,
    DiTTransformer2DModel: hooks.enter_dit,
    FluxTransformer2DModel: hooks.enter_flux,
    SD3Transformer2DModel: hooks.enter_sd3,
    QwenImageTransformer2DModel: hooks.enter_qwen,
}


@dataclass
class _PatchedLayer:
    """A compressed layer; `previous` holds the processors to restore, by whether they use fused projections."""

    name: str
    attn: Any
    family: str
    previous: dict[bool, Any] = field(default_factory=dict)


@dataclass
class Patch:
    """What hangs on a patched model as `_bigain`.

    Attributes:
        config: as applied, with the `num_train_timesteps` of the pipeline's scheduler.
        layers: the compressed layers.
        handles: of the hooks.
        pipeline: what the pipeline is asked, if the model has one.
        told: the range of timesteps that the config names itself; None asks the scheduler.
        idle: layers that run another processor for now, by name: its class and a hook that keeps the context from it.
        last_pass, watching: the forward pass in progress, until one was looked back at.
        known: the scheduler asked last, and its range.
    """

    config: CompressionConfig
    layers: list[_PatchedLayer]
    handles: list[RemovableHandle]
    pipeline: Pipeline = field(default_factory=Pipeline)
    told: TimestepRange | None = None
    grid_reader: GridReader = field(default_factory=GridReader)
    idle: dict[str, tuple[type, RemovableHandle]] = field(default_factory=dict)
    last_pass: hooks.Pass | None = None
    watching: bool = True
    known: tuple[Any, TimestepRange] | None = None

    def install(self, layer: _PatchedLayer) -> None:
        """Replace the processor of a layer by the one that compresses the same kind of projections."""
        previous = layer.attn.processor
        fused = isinstance(previous, FusedAttnProcessor2_0)
        layer.previous[fused] = previous
        layer.attn.set_processor(_stand_in(self.config, layer.family, fused))
        _move_backend(previous, layer.attn.processor)

    def verify(self, model: nn.Module) -> None:
        """Before every forward pass: compression is in place, whatever was done to the model since.

        `fuse_qkv_projections` and its like overwrite all processors; known ones are replaced again. A processor that
        does something else (an image adapter's, or that of perturbed attention, which is there for one call) stays: its
        layer runs uncompressed as long as it is there, as it would had it been there before, and that is said once.

        Raises:
            ValueError: the model was made context-parallel.
        """
        _refuse_context_parallel(model)
        for layer in self.layers:
            processor = type(layer.attn.processor)
            if processor not in PROCESSORS and processor not in REPLACEABLE[layer.family]:
                self._leave(layer, processor)
                continue
            if processor not in PROCESSORS:
                logger.info("%s: compressing again, in place of %s", layer.name, processor.__name__)
                self.install(layer)
            if layer.name in self.idle:
                self.idle.pop(layer.name)[1].remove()

    def _leave(self, layer: _PatchedLayer, processor: type) -> None:
        """Let a layer run uncompressed under a processor that compression cannot stand in for."""
        if layer.name in self.idle:
            if self.idle[layer.name][0] is processor:
                return
            self.idle.pop(layer.name)[1].remove()
        handle = layer.attn.register_forward_pre_hook(hooks.skip_attention, with_kwargs=True)
        self.idle[layer.name] = processor, handle
        logger.warning(
            "%s: runs uncompressed while its processor is %s, which compression cannot stand in for",
            layer.name,
            processor.__name__,
        )

    def timestep_range(self) -> TimestepRange:
        """The timesteps that the model is told: of the scheduler that the pipeline has now.

        Compiled code keeps what was known when it was compiled.

        Raises:
            ValueError: the config depends on the timestep, and the scheduler is not known.
        """
        if self.told is not None:
            return self.told
        # Asked again when the pipeline got another one. A copy of the model, which has no pipeline, keeps what it knew.
        scheduler = None if torch.compiler.is_compiling() else self.pipeline.scheduler
        if self.known is None or (scheduler is not None and self.known[0] is not scheduler):
            self.known = scheduler, self._range_of(scheduler)
        return self.known[1]

    def _range_of(self, scheduler: Any) -> TimestepRange:
        if scheduler is None:
            return numbered(self.config.train_timesteps)
        found = range_of(scheduler)
        reading = reads_timesteps(self.config)
        if found is None and reading is not None:
            raise ValueError(
                f"{reading}: got a config that depends on the timestep and {type(scheduler).__name__}, expected a "
                "scheduler whose timesteps are known; if they are steps from T - 1 to 0, give num_train_timesteps=T"
            )
        return found or numbered(self.config.train_timesteps)

    def watch(self, context: hooks.Context) -> hooks.Context:
        """The context, which tells as well what the config needs to know of this pass."""
        if torch.compiler.is_compiling():
            return context
        if getattr(self.config, "share_plan", None) is not None:
            context["conditions"] = self.pipeline.conditions()
        self.last_pass = hooks.Pass() if self.watching and context["active"] else None
        if self.last_pass is not None:
            context["pass"] = self.last_pass
        return context

    def look_back(self, model: nn.Module) -> None:
        """After a forward pass: warns, once, when nothing of it went through a compressed layer."""
        if self.last_pass is None or torch.compiler.is_compiling():
            return
        if not self.last_pass.reached and not self.idle:
            logger.warning(
                "%s: a forward pass reached none of its %d compressed layers, so nothing was compressed: something "
                "replaced the forward methods of its blocks or attentions",
                type(model).__name__,
                len(self.layers),
            )
        self.watching, self.last_pass = False, None


def _tell_hooks() -> None:
    """diffusers' layer skipping knows processors by their class: ours are skipped as those that they stand in for."""
    for ours in PROCESSORS:
        for theirs in (*ours.__mro__[1:], AttnProcessor2_0):
            if theirs in AttentionProcessorRegistry._registry:
                AttentionProcessorRegistry.register(ours, AttentionProcessorRegistry.get(theirs))
                break


def _stand_in(config: CompressionConfig, family: str, fused: bool) -> Any:
    """A new processor that compresses the attention of a family of layers."""
    if family in _JOINT:
        return _JOINT[family]()
    if isinstance(config, MergeConfig):
        return FusedMergeAttnProcessor() if fused else MergeAttnProcessor()
    return FusedPoolAttnProcessor() if fused else PoolAttnProcessor()


def _move_backend(source: Any, target: Any) -> None:
    """Hand on what `set_attention_backend` left on a processor."""
    if getattr(source, "_attention_backend", None) is not getattr(target, "_attention_backend", None):
        target._attention_backend = source._attention_backend


def _refuse_context_parallel(model: nn.Module) -> None:
    parallel = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    # The class attribute _cp_plan only says that a model could be; one on the instance is meant for it.
    if parallel is not None or vars(model).get("_cp_plan") is not None:
        raise ValueError(
            "model_or_pipe: got a context-parallel model, expected one whose devices each hold all tokens: "
            "matching and pooling look at the whole grid"
        )


def _previous_processor(attn: Any, patch: Patch | None) -> Any:
    """The processor that a layer has without compression."""
    processor = attn.processor
    if type(processor) not in PROCESSORS or patch is None:
        return processor
    return next(layer.previous[processor.fused] for layer in patch.layers if layer.attn is attn)


def _path(layer: Layer, config: CompressionConfig, old: Patch | None) -> str:
    """`Decision.path` of a layer that is compressed."""
    processor = _previous_processor(layer.attn, old)
    # Attention, unlike FluxAttention, keeps this attribute when its projections are no longer used fused.
    flux = layer.family == "flux"
    fused = layer.attn.fused_projections if flux else isinstance(processor, FusedAttnProcessor2_0)
    return path_of(layer.attn, config, fused, text_inside=flux and layer.attn.added_kv_proj_dim is None)


def _check_blocks(config: CompressionConfig, layers: list[Layer]) -> None:
    count = 1 + max((layer.index for layer in layers), default=-1)
    unknown = [index for index in config.blocks or () if index >= count]
    if unknown:
        raise ValueError(f"blocks: got {unknown}, expected indices below {count}, the number of blocks of the model")


def _resolve(config: CompressionConfig, scheduler: Any) -> CompressionConfig:
    """The config with `num_train_timesteps` filled in from the scheduler of a pipeline."""
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if config.num_train_timesteps is not None or steps is None:
        return config
    return replace(config, num_train_timesteps=steps)


def _look_back(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a patched model."""
    model._bigain.look_back(model)


def _register_hooks(model: nn.Module, patched: list[Layer], merges: bool) -> list[RemovableHandle]:
    """Install the hooks that carry the context to the layers of `patched` and keep it from all others."""
    handles: list[RemovableHandle] = []

    def hook(module: nn.Module, function: Callable[..., Any]) -> None:
        handles.append(module.register_forward_pre_hook(function, with_kwargs=True))

    hook(model, next(enter for cls, enter in _ENTER.items() if isinstance(model, cls)))
    handles.append(model.register_forward_hook(_look_back))
    compressed = {id(layer.attn) for layer in patched}
    transformers = {id(layer.transformer) for layer in patched}
    blocks = {id(layer.block) for layer in patched}
    untouched: set[int] = set()
    for module in model.modules():
        if isinstance(module, Transformer2DModel) and id(module) not in transformers:
            hook(module, hooks.skip_transformer)
            untouched.update(id(m) for m in module.modules())
        elif isinstance(module, Transformer2DModel):
            hook(module, hooks.enter_transformer)
        elif id(module) in blocks and merges and isinstance(model, UNet2DConditionModel):
            hook(module, hooks.enter_block)
        elif isinstance(module, ATTENTIONS) and id(module) not in compressed and id(module) not in untouched:
            hook(module, hooks.skip_attention)
    return handles


def apply_token_compression(model_or_pipe: Any, config: CompressionConfig) -> CompressionReport:
    """Compress the tokens of a diffusers model's attention, in place.

    Works on UNet2DConditionModel (Stable Diffusion 1.5, 2.x, SDXL), DiTTransformer2DModel and, with IE-KVD and ToDo,
    FluxTransformer2DModel, SD3Transformer2DModel and QwenImageTransformer2DModel, bare or in a pipeline. A second call
    replaces the first. Weights, `state_dict` and the saved config stay as they are. Call the model as
    before, at any resolution; fusing projections, loading IP-Adapters, `compile_repeated_blocks`, offloading and
    `copy.deepcopy` work before and after. A layer whose processor is replaced later by one that compression cannot
    stand in for (an IP-Adapter's, perturbed attention's during a call) runs uncompressed as long as that one is there,
    and a warning says so once. Inference only.

    In a pipeline, the scheduler that it has at each call tells what timesteps mean; of a model alone, and with
    `num_train_timesteps` given, they are steps from T - 1 to 0 (sigma where the model is told sigma).

    The grid of a Flux model's tokens is read from `img_ids`, once for each such tensor, which waits for the device. To
    avoid that, in CUDA graphs or `torch.compile(model, fullgraph=True)`, give it with the call, in tokens:
    `joint_attention_kwargs={"bigain_grid": (H, W)}`.

    Args:
        model_or_pipe: the model, or a pipeline with it as `unet` or `transformer`.
        config: LGTMConfig, ABMConfig, ToMeConfig, SiToConfig, IEKVDConfig, ToDoConfig, AvgPoolConfig, or the config
            of a method from elsewhere.

    Returns:
        CompressionReport: what was patched, what was not and why; print it.

    Raises:
        TypeError: the model or the config is of another type.
        ValueError: the config compresses no layer of this model (the model stays as it was), or the model is
            context-parallel. A patched model raises ValueError on an attention mask, on a ratio or factor that a grid
            is too small for, and on timesteps that differ within a batch where `start`, `end` or a scheduled ratio
            need a single one.
    """
    model: Any = find_model(model_or_pipe)
    pipeline = Pipeline(None if isinstance(model_or_pipe, nn.Module) else model_or_pipe)
    steps = getattr(config, "num_train_timesteps", None)
    return _apply(model, config, pipeline, None if steps is None else numbered(steps))


def _apply(model: Any, config: CompressionConfig, pipeline: Pipeline, told: TimestepRange | None) -> CompressionReport:
    if not isinstance(config, CompressionConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a config such as LGTMConfig or IEKVDConfig")
    _refuse_context_parallel(model)
    old = getattr(model, "_bigain", None)
    layers = find_layers(model)
    _check_blocks(config, layers)
    decisions = [decide(config, layer, _previous_processor(layer.attn, old)) for layer in layers]
    resolved = _resolve(config, pipeline.scheduler)
    report = CompressionReport(
        type(model).__name__,
        resolved,
        tuple(
            Decision(layer.name, layer.kind, layer.index, yes, reason, _path(layer, config, old) if yes else "")
            for layer, (yes, reason) in zip(layers, decisions, strict=True)
        ),
    )
    if not report.patched:
        raise ValueError(f"config: got {config}, expected one that compresses at least one layer\n{report}")
    patched = [layer for layer, (yes, _) in zip(layers, decisions, strict=True) if yes]
    entries = [_PatchedLayer(layer.name, layer.attn, layer.family) for layer in patched]
    patch = Patch(resolved, entries, [], pipeline, told)
    if patched[0].family == "plain":
        patch.timestep_range()
    remove_token_compression(model)
    _tell_hooks()

    merges = isinstance(config, MergeConfig)
    needs_source = merges and isinstance(model, UNet2DConditionModel)
    for layer, entry in zip(patched, patch.layers, strict=True):
        layer.attn._bigain = LayerPatch(resolved, needs_source)
        if resolved.is_random:
            device = layer.attn.to_q.weight.device
            # Offloading may have left nothing but a meta tensor there.
            index = torch.tensor(layer.index, device="cpu" if device.type == "meta" else device)
            layer.attn.register_buffer("bigain_block", index, persistent=False)
        patch.install(entry)
    patch.handles = _register_hooks(model, patched, merges)
    model._bigain = patch
    return report


def remove_token_compression(model_or_pipe: Any) -> None:
    """Take token compression out of a model: processors, hooks and attributes are as before it was applied.

    A model without compression stays as it is.

    Raises:
        TypeError: `model_or_pipe` is of no supported type.
    """
    model: Any = find_model(model_or_pipe)
    patch = getattr(model, "_bigain", None)
    if patch is None:
        return
    for handle in (*patch.handles, *(handle for _, handle in patch.idle.values())):
        handle.remove()
    # What unfuse_qkv_projections would put back.
    kept = getattr(model, "original_attn_processors", None) or {}
    for layer in patch.layers:
        key, current = f"{layer.name}.processor", layer.attn.processor
        if type(kept.get(key)) in PROCESSORS:
            kept[key] = layer.previous[kept[key].fused]
        if type(current) in PROCESSORS:
            _move_backend(current, layer.previous[current.fused])
            layer.attn.set_processor(layer.previous[current.fused])
        del layer.attn._bigain
        if hasattr(layer.attn, "bigain_block"):
            del layer.attn.bigain_block
    del model._bigain


@contextmanager
def token_compression(model_or_pipe: Any, config: CompressionConfig) -> Iterator[CompressionReport]:
    """Compress within a `with` block; afterwards, also after an exception, what was there before is back.

    Yields the report; arguments and errors are those of `apply_token_compression`.
    """
    model: Any = find_model(model_or_pipe)
    outer = getattr(model, "_bigain", None)
    try:
        yield apply_token_compression(model_or_pipe, config)
    finally:
        if outer is None:
            remove_token_compression(model)
        elif getattr(model, "_bigain", None) is not outer:
            _apply(model, outer.config, outer.pipeline, outer.told)
