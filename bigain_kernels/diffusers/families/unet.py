"""U-Nets of Stable Diffusion: a grid for every level, and blocks of self- and cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ...methods import CompressionConfig
from ..context import Forward, Grid, at_grid
from ..hooks import KEY, Call, Signature, argument, carried, with_context
from .family import Layer
from .plain import PlainFamily
from .recommended import MERGE_UNET

_TRANSFORMER = Signature(hidden_states=0, cross_attention_kwargs=5)


def enter_transformer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Transformer2DModel with compressed blocks: its (B, C, H, W) input tells the grid.

    So the grid is right at every level whatever the latent size, odd or not square.
    """
    forward = carried(_TRANSFORMER, args, kwargs, KEY)
    if not isinstance(forward, Forward):
        return args, kwargs
    height, width = argument(_TRANSFORMER, args, kwargs, "hidden_states").shape[-2:]
    return with_context(_TRANSFORMER, args, kwargs, at_grid(forward, (height, width)))


def skip_transformer(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Forward pre-hook of a Transformer2DModel without compressed blocks: its layers do not know the context."""
    return with_context(_TRANSFORMER, args, kwargs, None)


def _levels(unet: UNet2DConditionModel) -> dict[str, int]:
    """Downsampling of each stage of a U-Net, by the start of its modules' names."""
    levels, level = {}, 1
    for i, stage in enumerate(unet.down_blocks):
        levels[f"down_blocks.{i}."] = level
        level *= 2 if stage.downsamplers is not None else 1
    levels["mid_block."] = level
    for i, stage in enumerate(getattr(unet, "up_blocks", ())):  # a ControlNet has none
        levels[f"up_blocks.{i}."] = level
        level //= 2 if stage.upsamplers is not None else 1
    return levels


class UNet(PlainFamily):
    """UNet2DConditionModel: Stable Diffusion 1.5, 2.x, SDXL. Tokens are matched on the residual stream."""

    model = UNet2DConditionModel
    signature = Signature(sample=0, timestep=1, cross_attention_kwargs=6)
    sample = "sample"
    needs_source = True
    recommended = MERGE_UNET

    def layers(self, model: Any) -> list[Layer]:
        layers: list[Layer] = []
        levels, index = _levels(model), 0
        for name, transformer in model.named_modules():
            if not isinstance(transformer, Transformer2DModel):
                continue
            level = next(level for prefix, level in levels.items() if name.startswith(prefix))
            for i, block in enumerate(transformer.transformer_blocks):
                for kind in ("attn1", "attn2"):
                    attn = getattr(block, kind)
                    if attn is not None:
                        path = f"{name}.transformer_blocks.{i}.{kind}"
                        layers.append(Layer(path, kind, index, attn, block, level, transformer))
                index += 1
        return layers

    def recommend(self, model: Any) -> CompressionConfig:
        first = min((layer.level for layer in self.layers(model)), default=1)
        return replace(self.recommended.config, max_downsample=first)

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> None:
        return None

    def hooks(
        self, model: Any, compressed: list[Layer], merges: bool
    ) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        transformers = {id(layer.transformer) for layer in compressed}
        shielded: set[int] = set()
        for module in model.modules():
            if isinstance(module, Transformer2DModel) and id(module) in transformers:
                yield module, enter_transformer
            elif isinstance(module, Transformer2DModel):
                yield module, skip_transformer
                shielded.update(map(id, module.modules()))
        for module, hook in super().hooks(model, compressed, merges):
            if id(module) not in shielded:
                yield module, hook
