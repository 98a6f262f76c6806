"""The two shipped models of digits of 32 x 32 pixels, a U-Net and a DiT: how they are built, and what drives them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel

from .data import MNIST_SIZE
from .denoisers import Denoiser, LabelDenoiser, PromptDenoiser
from .tiny_models import NUM_CLASSES, build_tiny_dit

# By kind, the folder of the model within its checkpoint, which is diffusers' name for what it is.
FOLDERS = {"unet": "unet", "dit": "transformer"}
# The "prompt" of a class: tokens and width of its embedding.
_TOKENS, _WIDTH = 4, 32


def class_embeddings() -> torch.Tensor:
    """(NUM_CLASSES + 1, 4, 32) float32: what stands for the text of each class and, last, for no text.

    Random and never trained, as the output of a frozen text encoder.
    """
    return torch.randn(NUM_CLASSES + 1, _TOKENS, _WIDTH, generator=torch.Generator().manual_seed(0))


def build_mnist_unet() -> UNet2DConditionModel:
    """A U-Net made as Stable Diffusion's is, with self-attention over all 32 x 32 pixels in its first and last level.

    The class comes in by cross-attention and, pooled, with the time embedding (as in DeepFloyd's U-Net), because by
    cross-attention alone a model of this size learns to use it much later.
    """
    model = UNet2DConditionModel(
        sample_size=MNIST_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_WIDTH,
        # In diffusers this is the number of heads.
        attention_head_dim=1,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def build_mnist_dit() -> DiTTransformer2DModel:
    """The DiT of the small digits for images of twice the side: 16 x 16 tokens of 2 x 2 pixels each."""
    return build_tiny_dit(size=MNIST_SIZE)


def build_mnist_model(kind: str) -> Any:
    """The model of a kind, "unet" or "dit", with new weights."""
    return build_mnist_unet() if kind == "unet" else build_mnist_dit()


def build_mnist_scheduler() -> DDPMScheduler:
    """1,000 steps, cosine schedule, v-prediction: most timesteps have noise at which something can be learned."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def mnist_denoiser(kind: str, model: Any) -> Denoiser:
    """The denoiser of a model of that kind."""
    scheduler = build_mnist_scheduler()
    if kind == "unet":
        return PromptDenoiser(model, scheduler, class_embeddings())
    return LabelDenoiser(model, scheduler)
