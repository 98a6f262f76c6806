"""The two shipped models of handwritten digits, a U-Net and a DiT: how they are built, and what drives them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel

from .data import MNIST_SIZE
from .denoisers import Denoiser, LabelDenoiser, PromptDenoiser
from .tiny_models import NUM_CLASSES, build_tiny_dit

# By kind, the folder of the model within its checkpoint, which is diffusers' name for what it is.
FOLDERS = {"unet": "unet", "dit": "transformer"}
# And the side of its images; those of the DiT have no more detail than this side's.
SIZES = {"unet": MNIST_SIZE, "dit": 64}
DETAIL = 16
# The "prompt" of a class: tokens and width of its embedding.
_TOKENS, _WIDTH = 4, 32


def class_embeddings() -> torch.Tensor:
    """(NUM_CLASSES + 1, 4, 32) float32: what stands for the text of each class and, last, for no text.

    Random and never trained, as the output of a frozen text encoder.
    """
    return torch.randn(NUM_CLASSES + 1, _TOKENS, _WIDTH, generator=torch.Generator().manual_seed(0))


def build_mnist_unet() -> UNet2DConditionModel:
    """A U-Net made as Stable Diffusion's is, with self-attention over all 32 x 32 pixels in its first level.

    A digit as a whole is seen in the third level, of 8 x 8. The class comes in by cross-attention and, pooled, with the
    time embedding (as in DeepFloyd's U-Net), because by cross-attention alone a model of this size learns to use it
    much later; both scale and shift what is in every residual block, as they do in a DiT.
    """
    model = UNet2DConditionModel(
        sample_size=SIZES["unet"],
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=_WIDTH,
        # In diffusers this is the number of heads.
        attention_head_dim=1,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def build_mnist_dit() -> DiTTransformer2DModel:
    """The DiT of the small digits for images of four times the side: 32 x 32 tokens of 2 x 2 pixels each."""
    return build_tiny_dit(size=SIZES["dit"])


def build_mnist_model(kind: str) -> Any:
    """The model of a kind, "unet" or "dit", with new weights."""
    return build_mnist_unet() if kind == "unet" else build_mnist_dit()


def resized(kind: str, images: torch.Tensor, size: int) -> torch.Tensor:
    """Digits (n, 1, 32, 32) as the model of a kind sees them, at its own size or a coarser one: (n, 1, size, size).

    The U-Net sees them as they are, or means of pixels. The DiT sees 16 x 16 means, enlarged smoothly: what is smooth
    over neighbouring tokens, as images of high resolution and latents are, can be merged.
    """
    coarse = size if kind == "unet" else DETAIL
    if coarse != images.shape[-1]:
        images = F.interpolate(images, size=(coarse, coarse), mode="area")
    if size > coarse:
        images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False).clamp(-1.0, 1.0)
    return images


def build_mnist_scheduler(kind: str, size: int) -> DDPMScheduler:
    """1,000 steps, v-prediction, on a cosine schedule: most timesteps have noise at which something can be learned.

    For the DiT the ratio of signal to noise falls with the square of the enlargement, so that a timestep hides as much
    of a digit at every size (Hoogeboom et al., "simple diffusion", 2023).
    """
    same: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "v_prediction", "clip_sample": False}
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2", **same)
    if kind == "unet":
        return cosine
    alphas = cosine.alphas_cumprod.double()
    alphas = alphas / (alphas + (size / DETAIL) ** 2 * (1 - alphas))
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    return DDPMScheduler(trained_betas=[float(f"{beta:.6g}") for beta in betas.clamp(max=0.999).tolist()], **same)


def mnist_denoiser(kind: str, model: Any, size: int) -> Denoiser:
    """The denoiser of a model of that kind for images of that size."""
    scheduler = build_mnist_scheduler(kind, size)
    if kind == "unet":
        return PromptDenoiser(model, scheduler, class_embeddings())
    return LabelDenoiser(model, scheduler)
