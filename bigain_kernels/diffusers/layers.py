"""The attention layers of the supported models, and which of them a config compresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from ..methods import CompressionConfig, MergeConfig

# Models with joint attention, by the name of their family.
JOINT = {
    "flux": FluxTransformer2DModel,
    "sd3": SD3Transformer2DModel,
    "qwen": QwenImageTransformer2DModel,
}
SUPPORTED = (UNet2DConditionModel, DiTTransformer2DModel, *JOINT.values())
ATTENTIONS = (Attention, FluxAttention)

# By the kind of model, processors that compute one and the same attention: a compressing one can stand in for them.
# FusedJointAttnProcessor2_0 is not among them: it leaves out the norm of queries and keys.
REPLACEABLE: dict[str, tuple[type, ...]] = {
    "plain": (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor),
    "flux": (FluxAttnProcessor,),
    "sd3": (JointAttnProcessor2_0,),
    "qwen": (QwenDoubleStreamAttnProcessor2_0,),
}


@dataclass(frozen=True)
class Layer:
    """One attention of one transformer block.

    Attributes:
        name: path of the attention in the model.
        kind: "attn1", self-attention or joint attention, or "attn2", cross-attention.
        index: of the block, in module order.
        level: downsampling of its resolution from the latent grid, 1, 2, 4, ...
        attn: the attention module.
        block: its transformer block.
        transformer: the Transformer2DModel around the block; the model itself where there is none.
        family: "plain", "flux", "sd3" or "qwen", a key of `REPLACEABLE`.
    """

    name: str
    kind: str
    index: int
    level: int
    attn: Any
    block: nn.Module
    transformer: nn.Module
    family: str = "plain"


def find_model(model_or_pipe: Any) -> nn.Module:
    """The model to patch: the argument, the `unet` or `transformer` of a pipeline, or what torch.compile wrapped.

    Raises:
        TypeError: it is none of the supported models.
    """
    model = model_or_pipe
    if not isinstance(model, nn.Module):
        model = getattr(model_or_pipe, "unet", None) or getattr(model_or_pipe, "transformer", None)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, SUPPORTED):
        came = type(model_or_pipe).__name__
        if model is not None and model is not model_or_pipe:
            came += f" with {type(model).__name__}"
        names = ", ".join(cls.__name__ for cls in SUPPORTED[:-1]) + f" or {SUPPORTED[-1].__name__}"
        raise TypeError(f"model_or_pipe: got {came}, expected a {names}, or a pipeline with one as unet or transformer")
    return model


def _unet_levels(unet: UNet2DConditionModel) -> dict[str, int]:
    """Downsampling of each stage of a U-Net, by the start of its modules' names."""
    levels, level = {}, 1
    for i, stage in enumerate(unet.down_blocks):
        levels[f"down_blocks.{i}."] = level
        level *= 2 if stage.downsamplers is not None else 1
    levels["mid_block."] = level
    for i, stage in enumerate(unet.up_blocks):
        levels[f"up_blocks.{i}."] = level
        level //= 2 if stage.upsamplers is not None else 1
    return levels


def find_layers(model: nn.Module) -> list[Layer]:
    """All attentions of the model's transformer blocks, in module order."""
    if isinstance(model, tuple(JOINT.values())):
        return _joint_layers(model)
    if isinstance(model, DiTTransformer2DModel):
        transformers, levels = {"": model}, {"": 1}
    else:
        transformers = {name: m for name, m in model.named_modules() if isinstance(m, Transformer2DModel)}
        levels = _unet_levels(model)
    layers: list[Layer] = []
    index = 0
    for name, transformer in transformers.items():
        level = next(level for prefix, level in levels.items() if name.startswith(prefix))
        for i, block in enumerate(transformer.transformer_blocks):
            for kind in ("attn1", "attn2"):
                attn = getattr(block, kind)
                if attn is not None:
                    path = f"{name}.transformer_blocks.{i}.{kind}".removeprefix(".")
                    layers.append(Layer(path, kind, index, level, attn, block, transformer))
            index += 1
    return layers


def _joint_layers(model: Any) -> list[Layer]:
    """As `find_layers`: blocks of two streams, then, in Flux, those of one."""
    family = next(name for name, cls in JOINT.items() if isinstance(model, cls))
    blocks = [(f"transformer_blocks.{i}", block) for i, block in enumerate(model.transformer_blocks)]
    single = getattr(model, "single_transformer_blocks", ())
    blocks += [(f"single_transformer_blocks.{i}", block) for i, block in enumerate(single)]
    # attn2 is the second self-attention of Stable Diffusion 3.5's dual attention: it sees the image alone.
    return [
        Layer(f"{name}.{which}", "attn1", index, 1, getattr(block, which), block, model, family)
        for index, (name, block) in enumerate(blocks)
        for which in ("attn", "attn2")
        if getattr(block, which, None) is not None
    ]


def _unsupported(config: CompressionConfig, layer: Layer, processor: object) -> str | None:
    """Why this attention cannot be compressed, or None."""
    attn, kind = layer.attn, layer.kind
    if layer.family != "plain":
        if isinstance(config, MergeConfig):
            return "joint attention with text offers no merging, only pooling (IEKVDConfig, ToDoConfig)"
        if type(processor) not in REPLACEABLE[layer.family]:
            return f"it has a processor of its own, {type(processor).__name__}"
        return None
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "its input norm looks at all tokens"
    if attn.residual_connection or attn.rescale_output_factor != 1.0:
        return "it adds its residual or rescales its output itself"
    if attn.added_kv_proj_dim is not None or attn.inner_kv_dim != attn.inner_dim:
        return "it has added projections or fewer key heads than query heads"
    if kind == "attn1" and attn.is_cross_attention:
        return "it is a cross-attention in this block"
    if type(processor) not in REPLACEABLE[layer.family]:
        return f"it has a processor of its own, {type(processor).__name__}"
    return None


def decide(config: CompressionConfig, layer: Layer, processor: object) -> tuple[bool, str]:
    """Whether `config` compresses `layer`, whose processor would be replaced, and the reason."""
    reason = _unsupported(config, layer, processor)
    if layer.kind not in config.modules:
        return False, f"modules={config.modules}"
    if config.blocks is not None and layer.index not in config.blocks:
        return False, f"block {layer.index} is not among blocks={config.blocks}"
    if layer.level > config.max_downsample:
        return False, f"1/{layer.level} resolution, max_downsample={config.max_downsample}"
    if reason is not None:
        return False, reason
    return True, "full resolution" if layer.level == 1 else f"1/{layer.level} resolution"
