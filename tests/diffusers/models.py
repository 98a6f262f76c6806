"""Tiny models with random weights, and what the tests of this folder share."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from bigain_kernels.diffusers import planning

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
    make_plan = planning.make_plan

    def record(config, x, *args, **kwargs):
        plan = make_plan(config, x, *args, **kwargs)
        records.append((x, plan))
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(planning, "make_plan", record)
        yield records
