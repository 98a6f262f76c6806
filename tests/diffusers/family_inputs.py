"""Inputs of the tiny models of families: each function takes a batch size and a grid (frames, H, W) in tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .models import sd3_inputs

TEXT = 5


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(grid: tuple[int, int, int], columns: int) -> Tensor:
    axes = [torch.arange(n) for n in grid] + [torch.zeros(1).long()] * (columns - 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, columns).float()


def flux2(batch, grid):
    return {
        "hidden_states": noise(batch, grid[1] * grid[2], 4),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions(grid, 4)[None].expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, TEXT, 4),
        "guidance": torch.ones(batch),
    }


def chroma(batch, grid):
    tokens = grid[1] * grid[2]
    mask = torch.ones(batch, TEXT + tokens)
    mask[0, 3:TEXT] = 0  # padding of the text
    return {
        "hidden_states": noise(batch, tokens, 4),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions(grid, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "attention_mask": mask,
    }


def z_image(batch, grid):
    return {
        "x": list(noise(batch, 16, grid[0], 2 * grid[1], 2 * grid[2])),
        "t": torch.full((batch,), 0.5),
        "cap_feats": list(noise(batch, TEXT, 16, seed=2)),
    }


def latent(batch, grid, channels=4, patch=2):
    return noise(batch, channels, patch * grid[1], patch * grid[2])


def pixart(batch, grid):
    return {
        "hidden_states": latent(batch, grid),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def hunyuan_dit(batch, grid):
    tokens = grid[1] * grid[2]
    angles = noise(tokens, 8, seed=3).repeat_interleave(1, 1)
    return {
        "hidden_states": latent(batch, grid),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, 4, 8, seed=2),
        "text_embedding_mask": torch.ones(batch, 4),
        "encoder_hidden_states_t5": noise(batch, 4, 8, seed=4),
        "text_embedding_mask_t5": torch.ones(batch, 4),
        "image_meta_size": torch.ones(batch, 6),
        "style": torch.zeros(batch, dtype=torch.int64),
        "image_rotary_emb": [angles.cos(), angles.sin()],
    }


def lumina2(batch, grid):
    return {
        "hidden_states": latent(batch, grid),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=2),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


def aura_flow(batch, grid):
    return {
        "hidden_states": latent(batch, grid),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=2),
        "timestep": torch.full((batch,), 0.5),
    }


def cogview4(batch, grid):
    sizes = torch.full((batch, 2), 64)
    return {
        "hidden_states": latent(batch, grid),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": torch.zeros(batch, 2, dtype=torch.int64),
    }


def hidream(batch, grid):
    return {
        "hidden_states": latent(batch, grid),
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": noise(batch, TEXT, 8, seed=2),
        "encoder_hidden_states_llama3": noise(2, batch, TEXT, 4, seed=3),
        "pooled_embeds": noise(batch, 8, seed=4),
    }


def wan(batch, grid):
    return {
        "hidden_states": noise(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
    }


def ltx(batch, grid):
    return {
        "hidden_states": noise(batch, grid[0] * grid[1] * grid[2], 4),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
    }


def ltx2(batch, grid):
    return {
        **ltx(batch, grid),
        "audio_hidden_states": noise(batch, 9, 4, seed=5),
        "audio_encoder_hidden_states": noise(batch, TEXT, 16, seed=6),
        "timestep": torch.full((batch,), 500.0),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def hunyuan_video(batch, grid):
    mask = torch.ones(batch, TEXT)
    mask[0, 3:] = 0
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, TEXT, 16, seed=2),
        "pooled_projections": noise(batch, 8, seed=3),
        "encoder_attention_mask": mask,
        "guidance": torch.full((batch,), 1.0),
    }


def cogvideox(batch, grid):
    return {
        "hidden_states": noise(batch, grid[0], 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
    }


def allegro(batch, grid):
    return {
        "hidden_states": noise(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
    }


def latte(batch, grid):
    return {
        "hidden_states": noise(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
    }


def controlled(inputs: dict[str, Any], condition: Tensor) -> dict[str, Any]:
    return {**inputs, "controlnet_cond": condition}


def sd3_controlnet(batch, grid):
    inputs = sd3_inputs(batch, (2 * grid[1], 2 * grid[2]))
    return controlled(inputs, noise(batch, 4, 2 * grid[1], 2 * grid[2], seed=7))


def tokens_controlnet(make):
    def inputs(batch, grid):
        return controlled(make(batch, grid[1:]), noise(batch, grid[1] * grid[2], 16, seed=7))

    return inputs
