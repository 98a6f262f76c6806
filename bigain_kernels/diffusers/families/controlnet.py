"""ControlNets: copies of a model's first blocks, compressed beside their model or alone.

Those of Flux and Stable Diffusion 3 pass nothing on to their attention, so theirs are rebound.
"""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel

from ...methods import CompressionConfig
from ..context import Grid
from ..hooks import Signature
from ..schedulers import SIGMA, TimestepRange, sigma_steps
from .family import Place
from .flux import Flux
from .qwen import Qwen
from .rebound import ReboundFamily
from .unet import UNet


class UNetControlNet(UNet):
    """ControlNetModel, of Stable Diffusion 1.5, 2.x and SDXL."""

    model = ControlNetModel
    signature = Signature(
        (
            "sample",
            "timestep",
            "encoder_hidden_states",
            "controlnet_cond",
            "conditioning_scale",
            "class_labels",
            "timestep_cond",
            "attention_mask",
            "added_cond_kwargs",
            "cross_attention_kwargs",
        ),
        "cross_attention_kwargs",
    )


class FluxControlNet(ReboundFamily):
    """FluxControlNetModel, the union of several too, which has the mode in front of the text."""

    model = FluxControlNetModel
    mlp = "ff"
    wholes = Flux.wholes
    merges = ("hidden", "attention")
    signature = Signature(
        (
            "hidden_states",
            "controlnet_cond",
            "controlnet_mode",
            "conditioning_scale",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
            "joint_attention_kwargs",
        ),
        "joint_attention_kwargs",
    )
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        grid = model._bigain.grid_reader(call["img_ids"]) if given is None else given
        return Place(grid, call["encoder_hidden_states"].shape[1] + bool(model.union))

    def told(self, config: CompressionConfig) -> TimestepRange:
        return SIGMA


class SD3ControlNet(ReboundFamily):
    """SD3ControlNetModel. That of Stable Diffusion 3.5 large is given tokens without a grid, and is refused."""

    model = SD3ControlNetModel
    mlp = "ff"
    merges = ("hidden", "attention")
    signature = Signature(
        (
            "hidden_states",
            "controlnet_cond",
            "conditioning_scale",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
        )
    )
    layer_names = r"transformer_blocks\.\d+\.attn2?"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        x = call["hidden_states"]
        if x.dim() != 4:
            raise ValueError(f"hidden_states: got {tuple(x.shape)}, expected a latent picture, which has a grid")
        return Place((x.shape[-2] // model.config.patch_size, x.shape[-1] // model.config.patch_size))

    def told(self, config: CompressionConfig) -> TimestepRange:
        return sigma_steps(config.train_timesteps)


class QwenControlNet(Qwen):
    """QwenImageControlNetModel."""

    model = QwenImageControlNetModel
    signature = Signature(
        (
            "hidden_states",
            "controlnet_cond",
            "conditioning_scale",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "timestep",
            "img_shapes",
            "joint_attention_kwargs",
        ),
        "joint_attention_kwargs",
    )
