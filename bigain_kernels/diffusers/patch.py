"""What hangs on a patched model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry  # there is no public way to tell it a class
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..methods import CompressionConfig
from ..methods.mixed import Compression, parts_of
from .attention import CompressedAttention
from .context import Forward, Pass, make_forward
from .families import Family
from .grids import GridReader
from .hooks import skip_attention
from .schedulers import Pipeline, TimestepRange, numbered, range_of, reads_timesteps

logger = logging.getLogger(__name__)


@dataclass
class PatchedLayer:
    """A compressed layer; `previous` holds the processors to restore, by the class that stands in for them."""

    name: str
    attn: Any
    previous: dict[type, Any] = field(default_factory=dict)


@dataclass
class Patch:
    """What hangs on a patched model as `_bigain`.

    Attributes:
        family: of the model.
        config: as applied, with the `num_train_timesteps` of the pipeline's scheduler.
        count: of compressed layers.
        layers: the compressed attentions.
        told_modules: what else holds `_bigain`: compressed MLPs and blocks whose layers share a plan.
        handles: of the hooks.
        pipeline: what the pipeline is asked, if the model has one.
        told: the range of timesteps that the config names itself; None asks the scheduler.
        idle: layers that run another processor for now, by name: its class and a hook that keeps the context from it.
        watching: until a forward pass was looked back at.
        known: the scheduler asked last, and its range.
    """

    family: Family
    config: Compression
    count: int
    layers: list[PatchedLayer]
    told_modules: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    pipeline: Pipeline = field(default_factory=Pipeline)
    told: TimestepRange | None = None
    grid_reader: GridReader = field(default_factory=GridReader)
    idle: dict[str, tuple[type, RemovableHandle]] = field(default_factory=dict)
    watching: bool = True
    known: tuple[Any, TimestepRange] | None = None

    def install(self, layer: PatchedLayer) -> None:
        """Replace the processor of a layer by the one that compresses the same kind of projections."""
        previous = layer.attn.processor
        stand_in = self.family.stand_in(previous)
        layer.previous[type(stand_in)] = previous
        layer.attn.set_processor(stand_in)
        move_backend(previous, stand_in)
        _tell_diffusers(type(stand_in))

    def verify(self, model: nn.Module) -> None:
        """Before every forward pass: compression is in place, whatever was done to the model since.

        `fuse_qkv_projections` and its like overwrite all processors; known ones are replaced again. A processor that
        does something else (an image adapter's, or that of perturbed attention, which is there for one call) stays: its
        layer runs uncompressed as long as it is there, as it would had it been there before, and that is said once.

        Raises:
            ValueError: the model was made context-parallel.
        """
        refuse_context_parallel(model)
        for layer in self.layers:
            processor = type(layer.attn.processor)
            ours = issubclass(processor, CompressedAttention)
            if not ours and not self.family.stands_in(processor):
                self._leave(layer, processor)
                continue
            if not ours:
                logger.info("%s: compressing again, in place of %s", layer.name, processor.__name__)
                self.install(layer)
            if layer.name in self.idle:
                self.idle.pop(layer.name)[1].remove()

    def _leave(self, layer: PatchedLayer, processor: type) -> None:
        """Let a layer run uncompressed under a processor that compression cannot stand in for."""
        if layer.name in self.idle:
            if self.idle[layer.name][0] is processor:
                return
            self.idle.pop(layer.name)[1].remove()
        handle = layer.attn.register_forward_pre_hook(skip_attention, with_kwargs=True)
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
        reading = next(filter(None, map(reads_timesteps, parts_of(self.config))), None)
        if found is None and reading is not None:
            raise ValueError(
                f"{reading}: got a config that depends on the timestep and {type(scheduler).__name__}, expected a "
                "scheduler whose timesteps are known; if they are steps from T - 1 to 0, give num_train_timesteps=T"
            )
        return found or numbered(self.config.train_timesteps)

    def start(self, sample: torch.Tensor, timestep: Any) -> Forward:
        """What is decided for a forward pass, from its batch and the timestep that the model is told."""
        steps = numbered(self.config.train_timesteps)
        parts = parts_of(self.config)
        told = self.family.told(parts[0]) or self.timestep_range()
        if told != steps and timestep is not None:
            timestep = told.noise(timestep) * steps.noisiest
        forwards = [make_forward(part, sample, timestep) for part in parts]
        if not torch.compiler.is_compiling():
            active = any(forward.active for forward in forwards)
            watched = Pass() if self.watching and active else None
            forwards = [self._watched(part, forward, watched) for part, forward in zip(parts, forwards, strict=True)]
        return forwards[0] if len(forwards) == 1 else forwards[0]._replace(parts=tuple(forwards), slots=None)

    def _watched(self, config: CompressionConfig, forward: Forward, watched: Pass | None) -> Forward:
        """What else is known of a pass that is not being compiled."""
        if getattr(config, "share_plan", None) is not None:
            forward = forward._replace(conditions=self.pipeline.conditions())
        return forward._replace(watched=watched)

    def look_back(self, model: nn.Module, forward: Forward) -> None:
        """After a forward pass: warns, once, when nothing of it went through a compressed layer."""
        if forward.watched is None or torch.compiler.is_compiling():
            return
        if not forward.watched.reached and not self.idle:
            logger.warning(
                "%s: a forward pass reached none of its %d compressed layers, so nothing was compressed: something "
                "replaced the forward methods of its blocks or attentions",
                type(model).__name__,
                self.count,
            )
        self.watching = False


def _tell_diffusers(ours: type) -> None:
    """Its layer skipping knows processors by their class: ours are skipped as those that they stand in for."""
    for theirs in (*ours.__mro__[1:], AttnProcessor2_0):
        try:
            metadata = AttentionProcessorRegistry.get(theirs)
        except ValueError:  # it does not know this one
            continue
        AttentionProcessorRegistry.register(ours, metadata)
        return


def move_backend(source: Any, target: Any) -> None:
    """Hand on what `set_attention_backend` left on a processor."""
    if getattr(source, "_attention_backend", None) is not getattr(target, "_attention_backend", None):
        target._attention_backend = source._attention_backend


def refuse_context_parallel(model: nn.Module) -> None:
    parallel = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    # The class attribute _cp_plan only says that a model could be; one on the instance is meant for it.
    if parallel is not None or vars(model).get("_cp_plan") is not None:
        raise ValueError(
            "model_or_pipe: got a context-parallel model, expected one whose devices each hold all tokens: "
            "matching and pooling look at the whole grid"
        )
