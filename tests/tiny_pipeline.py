"""A whole pipeline of diffusers with random weights, small enough to run in a test."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def tiny_pipeline(**parts):
    """Stable Diffusion in two levels, with attention in the first; `parts` are its text encoder and the like."""
    torch.manual_seed(0)
    levels = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **levels,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **levels,
    )
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    parts = dict.fromkeys(names) | parts
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=LCMScheduler(steps_offset=1), requires_safety_checker=False, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
