"""Tiny models of the families that are compressed in the middle of their attention, and where their tokens stand."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from . import family_inputs
from .family_inputs import TEXT
from .models import _strong, dit_inputs, flux_inputs, qwen_inputs, sd3_inputs, tiny_dit, tiny_flux, tiny_qwen, tiny_sd3


class Case(NamedTuple):
    """A family: how to build its tiny model, its inputs, and what the oracle of the tests is told of its layout.

    `inputs` takes a batch size and a grid (frames, H, W) in tokens; `start` is how many tokens stand in front of the
    image, `text` how many of these are apart from the hidden states in the layer of that name.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[int, tuple[int, int, int]], dict[str, Any]]
    start: int = 0
    apart: Callable[[str], int] = lambda name: 0
    frames: int = 1
    batched_frames: bool = False
    make: Callable[[], nn.Module] | None = None


def _double(prefix: str = "transformer_blocks") -> Callable[[str], int]:
    """Text is apart in the blocks of two streams."""
    return lambda name: TEXT if name.startswith(prefix) else 0


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, **HEADS}
VIDEO = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
CASES = {
    "flux2": Case(
        "Flux2Transformer2DModel",
        {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        family_inputs.flux2,
        TEXT,
        _double(),
    ),
    "chroma": Case(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        family_inputs.chroma,
        TEXT,
        _double(),
    ),
    "z_image": Case(
        "ZImageTransformer2DModel",
        {
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 64, 64],
        },
        family_inputs.z_image,
    ),
    "pixart": Case(
        "PixArtTransformer2DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "caption_channels": None,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        family_inputs.pixart,
    ),
    "hunyuan_dit": Case(
        "HunyuanDiT2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        family_inputs.hunyuan_dit,
    ),
    "lumina2": Case(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 48,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (8, 4, 4),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        family_inputs.lumina2,
        TEXT,
    ),
    "aura_flow": Case(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        family_inputs.aura_flow,
        TEXT + 8,
        lambda name: TEXT + 8 if name.startswith("joint") else 0,
    ),
    "cogview4": Case(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        family_inputs.cogview4,
        TEXT,
        _double(),
    ),
    "hidream": Case(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        family_inputs.hidream,
    ),
    "wan": Case(
        "WanTransformer3DModel",
        {
            **VIDEO,
            "patch_size": (1, 2, 2),
            "attention_head_dim": 12,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        family_inputs.wan,
        frames=3,
    ),
    "ltx": Case(
        "LTXVideoTransformer3DModel",
        {
            **VIDEO,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "qk_norm": "rms_norm_across_heads",
            "caption_channels": 16,
        },
        family_inputs.ltx,
        frames=3,
    ),
    "ltx2": Case(
        "LTX2VideoTransformer3DModel",
        {
            **VIDEO,
            "patch_size": 1,
            "patch_size_t": 1,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "qk_norm": "rms_norm_across_heads",
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        family_inputs.ltx2,
        frames=3,
    ),
    "hunyuan_video": Case(
        "HunyuanVideoTransformer3DModel",
        {
            **VIDEO,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        family_inputs.hunyuan_video,
        frames=3,
    ),
    "cogvideox": Case(
        "CogVideoXTransformer3DModel",
        {
            **VIDEO,
            "attention_head_dim": 8,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 16,
            "sample_height": 12,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": TEXT,
        },
        family_inputs.cogvideox,
        TEXT,
        _double(),
        frames=3,
    ),
    "allegro": Case(
        "AllegroTransformer3DModel",
        {
            **VIDEO,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_width": 16,
            "sample_height": 12,
            "sample_frames": 3,
            "caption_channels": 8,
        },
        family_inputs.allegro,
        frames=3,
    ),
    "latte": Case(
        "LatteTransformer3DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": 3,
        },
        family_inputs.latte,
        frames=3,
        batched_frames=True,
    ),
}


# Those with processors written out, whose merging inside attention is that of all others.
WRITTEN_OUT = {
    "flux": Case(
        "FluxTransformer2DModel", {}, lambda b, grid: flux_inputs(b, grid[1:]), TEXT, _double(), make=tiny_flux
    ),
    "qwen": Case(
        "QwenImageTransformer2DModel", {}, lambda b, grid: qwen_inputs(b, grid[1:]), TEXT, _double(), make=tiny_qwen
    ),
    "dit": Case(
        "DiTTransformer2DModel",
        {},
        lambda b, grid: {**dit_inputs(b), "hidden_states": family_inputs.latent(b, grid)},
        make=tiny_dit,
    ),
    "sd3": Case("SD3Transformer2DModel", {}, lambda b, grid: sd3_inputs(b, (2 * grid[1], 2 * grid[2])), make=tiny_sd3),
}


JOINT = {"num_layers": 2, "joint_attention_dim": 32, **HEADS}
# Copies of the first blocks of a model.
CONTROLNETS = {
    "flux_controlnet": Case(
        "FluxControlNetModel",
        {
            **JOINT,
            "in_channels": 16,
            "num_single_layers": 1,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        family_inputs.tokens_controlnet(flux_inputs),
        TEXT,
        _double(),
    ),
    "sd3_controlnet": Case(
        "SD3ControlNetModel",
        {
            **JOINT,
            "sample_size": 16,
            "in_channels": 4,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "extra_conditioning_channels": 0,
        },
        family_inputs.sd3_controlnet,
    ),
    "qwen_controlnet": Case(
        "QwenImageControlNetModel",
        {**JOINT, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 6, 6)},
        family_inputs.tokens_controlnet(qwen_inputs),
        TEXT,
        _double(),
    ),
}


def case_of(name: str) -> Case:
    return {**CASES, **WRITTEN_OUT, **CONTROLNETS}[name]


def build(name: str, layers: int | None = None) -> nn.Module:
    """The tiny model of a case: the same weights at every call, zero-initialised layers filled.

    `layers` at most of each kind; all that the case has by default.
    """
    case = case_of(name)
    if case.make is not None:
        return case.make()
    torch.manual_seed(0)
    config = {
        key: min(value, layers) if layers is not None and key in ("num_layers", "n_layers") else value
        for key, value in case.config.items()
    }
    model = getattr(diffusers, case.model)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return _strong(model)


def module_of(processor: object) -> Any:
    """The module in which a processor looks up the function that attends."""
    return importlib.import_module(type(processor).__module__)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found
