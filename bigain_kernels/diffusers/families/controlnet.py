"""ControlNets: copies of a model's first blocks, compressed beside their model or alone.

Those of Flux and Stable Diffusion 3 pass nothing on to their attention, so theirs are rebound.
"""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel

from ..context import Grid
from ..hooks import Signature
from .family import Place
from .flux import Flux
from .layout import of_img_ids, of_latent, sigma, steps_of_sigma
from .qwen import Qwen
from .rebound import ReboundFamily
from .unet import UNet


class UNetControlNet(UNet):
    """ControlNetModel, of Stable Diffusion 1.5, 2.x and SDXL."""

    model = ControlNetModel
    signature = Signature(sample=0, timestep=1, cross_attention_kwargs=9)


class FluxControlNet(ReboundFamily):
    """FluxControlNetModel, the union of several too, which has the mode in front of the text."""

    model = FluxControlNetModel
    mlp = "ff"
    wholes = Flux.wholes
    merges = ("hidden", "attention")
    signature = Signature(hidden_states=0, encoder_hidden_states=4, timestep=6, img_ids=7, joint_attention_kwargs=10)
    told = sigma
    layer_names = r"(single_)?transformer_blocks\.\d+\.attn"

    def place(self, model: Any, call: dict[str, Any], given: Grid | None) -> Place:
        place = of_img_ids(self, model, call, given)
        return place._replace(start=place.start + bool(model.union))


class SD3ControlNet(ReboundFamily):
    """SD3ControlNetModel. That of Stable Diffusion 3.5 large is given tokens without a grid, and is refused."""

    model = SD3ControlNetModel
    mlp = "ff"
    merges = ("hidden", "attention")
    signature = Signature(hidden_states=0, timestep=5)
    place = of_latent
    told = steps_of_sigma
    layer_names = r"transformer_blocks\.\d+\.attn2?"


class QwenControlNet(Qwen):
    """QwenImageControlNetModel."""

    model = QwenImageControlNetModel
    signature = Signature(hidden_states=0, encoder_hidden_states=3, timestep=5, img_shapes=6, joint_attention_kwargs=7)
