"""The two small models that the project ships: a class-conditional DiT and a digit classifier."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
from diffusers import DDPMScheduler, DiTTransformer2DModel

from .data import DIGITS_SIZE

ASSETS = Path(__file__).parent / "assets"
NUM_CLASSES = 10


def build_tiny_dit(
    width: int = 96, heads: int = 3, layers: int = 4, patch_size: int = 2, size: int = DIGITS_SIZE
) -> DiTTransformer2DModel:
    """A class-conditional DiT for `size` x `size` gray images, initialised as DiT asks for.

    Label `NUM_CLASSES` is the null label of classifier-free guidance. Zero-initialised adaLN and output follow Peebles
    and Xie, "Scalable Diffusion Models with Transformers", 2023; the class embedding has unit variance, because with
    the usual 0.02 a model of this size never learns to use the label.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=size,
        patch_size=patch_size,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=1.0)
        # diffusers drops labels block by block; training drops them for the whole model at once.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler() -> DDPMScheduler:
    """The noise schedule of the tiny DiT: 1,000 steps, linear betas, noise prediction, no clipping."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


class DigitClassifier(nn.Module):
    """A small convolutional classifier. Its 64 features carry the Frechet distance, its labels class consistency.

    `forward` takes (n, 1, 16, 16) images in [-1, 1] and returns logits (n, 10); `features` returns (n, 64).
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * (DIGITS_SIZE // 4) ** 2, 64),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))
