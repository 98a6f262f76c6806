"""A diffusion model whose errors are known in closed form, and a random one with all the parts of a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

SHAPE = (1, 4, 4)


class PrototypeDenoiser:
    """Believes that every image of class c is prototype c.

    Its noise prediction is exact for that image, so its error for another image x is
    mean((x - prototype)^2) * a / (1 - a) with a = alphas_cumprod[t]. `calls` keeps the arguments of every call.
    """

    def __init__(self, classes: int, prediction_type: str = "epsilon") -> None:
        self.model = torch.nn.Identity()
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)
        self.num_classes, self.sample_shape = classes, SHAPE
        self.prototypes = torch.randn(classes + 1, *SHAPE, generator=torch.Generator().manual_seed(3))
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls.append((noisy, timestep, labels))
        clean = self.prototypes[labels]
        alpha = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        return clean if kind == "sample" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def save_latent_dit(folder: Path, layers: int = 1, classes: int = 3) -> None:
    """A random DiT that learns variances, over a random VAE: the shape of facebook/DiT-XL-2, very small."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
