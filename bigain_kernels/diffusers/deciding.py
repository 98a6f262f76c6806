"""Which layers of a model a config compresses, and why the others are not."""

from __future__ import annotations

from typing import Any

from ..methods import CompressionConfig, MergeConfig, MixedConfig, PoolConfig
from ..methods.mixed import Compression, parts_of
from .attention import CompressedAttention
from .families import Family, Layer
from .patch import Patch
from .projections import path_of
from .report import Decision


def merge_place(family: Family, config: CompressionConfig) -> str:
    """Where a config merges in models of a family."""
    merge = getattr(config, "merge", "auto")
    return family.merges[0] if merge == "auto" else merge


def _unable(family: Family, config: CompressionConfig) -> str | None:
    """Why no layer of the family can be compressed like this, or None."""
    if isinstance(config, MergeConfig) and merge_place(family, config) not in family.merges:
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
        if layer.is_whole and ("attn1" not in config.modules or merge_place(family, config) != "hidden"):
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


def previous_processor(attn: Any, patch: Patch | None) -> Any:
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
        what = "tokens" if merge_place(family, config) == "hidden" else "queries, keys and values"
        return f"merge {what}" + (", weigh keys by size" if config.proportional else "")
    stand_in = family.stand_in(processor)
    early = stand_in.pools_early(layer.attn, config)
    return path_of(layer.attn, early, stand_in.uses_fused(layer.attn), family.text_inside(layer))


def check_places(config: CompressionConfig, layers: list[Layer]) -> None:
    count = 1 + max((layer.index for layer in layers), default=-1)
    unknown = [index for index in config.blocks or () if index >= count]
    if unknown:
        raise ValueError(f"blocks: got {unknown}, expected indices below {count}, the number of blocks of the model")
    has = sorted({layer.level for layer in layers})
    missing = [level for level in config.levels or () if level not in has]
    if missing:
        name = "ratio" if isinstance(config, MergeConfig) else "factor"
        raise ValueError(f"{name}: got {config.by_level} with the levels {missing}, expected those of the model, {has}")


def layers_of(family: Family, model: Any, config: Compression) -> list[Layer]:
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


def part_of(config: Compression, layer: Layer) -> int | None:
    """Which config of a `MixedConfig` speaks of a layer; None where none does."""
    if not isinstance(config, MixedConfig):
        return 0
    return next((i for i, part in enumerate(config.configs) if layer.index in (part.blocks or ())), None)


def decision_on(family: Family, config: Compression, layer: Layer, processor: Any) -> Decision:
    """What becomes of a layer, whose processor would be replaced."""
    number = part_of(config, layer)
    if number is None:
        reason = f"block {layer.index} is in none of the {len(parts_of(config))} configs"
        return Decision(layer.name, layer.kind, layer.index, False, reason)
    part = parts_of(config)[number]
    yes, reason = decide(family, part, layer, processor)
    path = _path(family, layer, part, processor) if yes else ""
    return Decision(layer.name, layer.kind, layer.index, yes, reason, path, part if yes else None)
