"""Tiny models with random weights, and what the tests of this folder share."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from bigain_kernels import methods
from bigain_kernels.diffusers.context import Context, at_grid, make_forward
from bigain_kernels.methods import MergeConfig

TEXT_DIM = 32


def tiny_unet(**changes) -> UNet2DConditionModel:
    """Two levels, 7 blocks: 0, 4 and 5 at full resolution, 1, 2, 3 and 6 (the middle) at half."""
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_dit(**changes) -> DiTTransformer2DModel:
    """Four blocks on 8 x 8 tokens."""
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
    }
    return DiTTransformer2DModel(**{**config, **changes}).eval()


def tiny_flux(**changes) -> FluxTransformer2DModel:
    """Two blocks of two streams and two of one, heads of 16 channels."""
    torch.manual_seed(0)
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "axes_dims_rope": (4, 6, 6),
    }
    return _strong(FluxTransformer2DModel(**{**config, **changes}).eval())


def tiny_sd3(**changes) -> SD3Transformer2DModel:
    """Three blocks, the first with dual attention, as in Stable Diffusion 3.5: four attentions."""
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 32,
        "pooled_projection_dim": TEXT_DIM,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return _strong(SD3Transformer2DModel(**{**config, **changes}).eval())


def tiny_qwen(**changes) -> QwenImageTransformer2DModel:
    """Three blocks of two streams, heads of 16 channels."""
    torch.manual_seed(0)
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "axes_dims_rope": (4, 6, 6),
    }
    return _strong(QwenImageTransformer2DModel(**{**config, **changes}).eval())


@torch.no_grad()
def _strong(model):
    """Random norms and larger queries and keys: attention that is far from uniform, so that errors in it show."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight") and parameter.dim() == 1:
            parameter.uniform_(0.5, 2.5)
        elif name.split(".")[-2:-1] in (["to_q"], ["to_k"], ["add_q_proj"], ["add_k_proj"]):
            parameter.mul_(2.0)
    return model


def unet_inputs(batch=2, size=(16, 16), timestep=500, seed=1, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator).to(dtype),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype),
    }


def dit_inputs(batch=2, size=16, timestep=500, seed=1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    timestep = timestep if torch.is_tensor(timestep) else torch.full((batch,), timestep)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": timestep,
        "class_labels": torch.arange(batch) % 10,
    }


def image_ids(height: int, width: int, picture: int = 0) -> torch.Tensor:
    """Positions of a Flux picture's tokens, (H * W, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1).reshape(-1, 3).float()


def flux_inputs(batch=2, size=(6, 10), timestep=0.5, seed=1, dtype=torch.float32) -> dict:
    """`size` in tokens; `timestep` is sigma."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, size[0] * size[1], 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, TEXT_DIM, generator=generator).to(dtype),
        "timestep": timestep.to(dtype) if torch.is_tensor(timestep) else torch.full((batch,), timestep, dtype=dtype),
        "img_ids": image_ids(*size),
        "txt_ids": torch.zeros(5, 3),
    }


def qwen_inputs(batch=2, size=(6, 10), timestep=0.5, seed=1, dtype=torch.float32) -> dict:
    """`size` in tokens; `timestep` is sigma."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, size[0] * size[1], 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype),
        "timestep": timestep.to(dtype) if torch.is_tensor(timestep) else torch.full((batch,), timestep, dtype=dtype),
        "img_shapes": [[(1, *size)]] * batch,
    }


def sd3_inputs(batch=2, size=(12, 20), timestep=500.0, seed=1, dtype=torch.float32) -> dict:
    """`size` in latent pixels, two for each token; `timestep` is 1000 sigma."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, *size, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, TEXT_DIM, generator=generator).to(dtype),
        "timestep": timestep.to(dtype) if torch.is_tensor(timestep) else torch.full((batch,), timestep, dtype=dtype),
    }


def layer_context(config, active=True, grid=(8, 8)) -> Context:
    """What a layer of a DiT is told, for calls of the layer itself."""
    return at_grid(make_forward(config, torch.zeros(1), 500)._replace(active=active), grid)


@torch.no_grad()
def run(model, inputs) -> torch.Tensor:
    return model(**inputs).sample


def only(inputs, rows) -> dict:
    """The given rows of a batch."""
    return {k: v[rows] if torch.is_tensor(v) and v.dim() > 0 else v for k, v in inputs.items()}


@contextmanager
def recorded_plans(monkeypatch):
    """Lists (hidden states, plan) of every planning call while it is open."""
    records = []

    def recorded(make_plan):
        def record(config, x, *args, **kwargs):
            plan = make_plan(config, x, *args, **kwargs)
            records.append((x, plan))
            return plan

        return record

    with monkeypatch.context() as patch:
        for config in map(methods.config_class, methods.names()):
            if issubclass(config, MergeConfig):
                patch.setattr(config, "plan", recorded(config.plan))
        yield records
