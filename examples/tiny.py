"""Tiny models with random weights, for examples that are run without downloads."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel


def unet(xl: bool = False) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion; `xl` has no attention at full resolution, as SDXL."""
    torch.manual_seed(0)
    first = ("DownBlock2D", "UpBlock2D") if xl else ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=(first[0], "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", first[1]),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    ).eval()
