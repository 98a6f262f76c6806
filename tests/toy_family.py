"""A model from elsewhere, with an attention class and a processor of its own, and what compression is told of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from bigain_kernels.diffusers.attention import CompressedAttention
from bigain_kernels.diffusers.families import Family, Layer, Place
from bigain_kernels.diffusers.hooks import Signature


class ToyProcessor:
    def __call__(self, attn: ToyAttention, hidden_states: Tensor) -> Tensor:
        states = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in states)
        return attn.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ToyAttention(nn.Module):
    norm_q = norm_k = None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner_dim, self.heads, self.processor = width, heads, ToyProcessor()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.processor(self, hidden_states, **kwargs)


class ToyBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), ToyAttention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, attention_kwargs: dict[str, Any] | None = None) -> Tensor:
        x = x + self.attn(self.norm(x), **(attention_kwargs or {}))
        return x + self.mlp(x)


class ToyTransformer(ModelMixin, ConfigMixin):
    """Pixels in, pixels out, of a class; no adaLN, the label and the time are added to every token."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 16,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 10,
        width: int = 16,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.label, self.time = nn.Embedding(num_embeds_ada_norm + 1, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(ToyBlock(width, 2) for _ in range(layers))
        self.out = nn.ConvTranspose2d(width, in_channels, patch_size, patch_size)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput:
        x = self.embed(hidden_states)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.label(class_labels)[:, None]
        x = x + self.time(timestep.to(x.dtype).reshape(-1, 1) / 1000)[:, None]
        for block in self.blocks:
            x = block(x, attention_kwargs)
        return Transformer2DModelOutput(sample=self.out(x.transpose(1, 2).unflatten(2, grid)))


class CompressedToyProcessor(CompressedAttention, ToyProcessor):
    def __call__(self, attn: ToyAttention, hidden_states: Tensor, bigain: Any = None) -> Tensor:
        step = self.step(attn, bigain, hidden_states)
        if step is None:
            return super().__call__(attn, hidden_states)
        x, _ = self.run(step, attn, hidden_states)
        return step.leave(self.output(attn, x))


class Toy(Family):
    model = ToyTransformer
    signature = Signature(hidden_states=0, timestep=1, attention_kwargs=3)
    processors = (CompressedToyProcessor,)
    replaceable = (ToyProcessor,)
    attentions = (ToyAttention,)

    def layers(self, model: Any) -> list[Layer]:
        return [Layer(f"blocks.{i}.attn", "attn1", i, block.attn, block) for i, block in enumerate(model.blocks)]

    def place(self, model: Any, call: dict[str, Any], given: Any) -> Place:
        height, width = call["hidden_states"].shape[-2:]
        return Place((height // model.config.patch_size, width // model.config.patch_size))
