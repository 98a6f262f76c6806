"""Whole models with random weights at their real sizes: unpatched against compressed, with diffusers.

    python -m benchmarks.bench_model [--model dit_512_b32] [--compile] [--csv FILE]

Attention is PyTorch's with the backend it chooses. "eager" is the model as Python runs it, "graph" a CUDA graph of it;
with --compile, providers ending in "+compile" are the same models under torch.compile. The output of every provider
must be finite, and that of a compressed model near the unpatched one: how good it is, the demo measures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression

from . import harness

Inputs = dict[str, Any]


class Model(NamedTuple):
    """A model to build on the meta device, its inputs, and the methods that support it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[str, torch.dtype], Inputs]
    configs: dict[str, Any]


def _unet(latent: int, **config: Any) -> Callable[[], nn.Module]:
    return lambda: UNet2DConditionModel(sample_size=latent, use_linear_projection=True, **config)


SD2: dict[str, Any] = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


# A small latent U-Net: the attention levels of SD at half its widths.
SMALL: dict[str, Any] = {
    "block_out_channels": (160, 320, 640, 640),
    "layers_per_block": 1,
    "attention_head_dim": (4, 8, 16, 16),
    "cross_attention_dim": 512,
}


def _unet_inputs(batch: int, latent: int, text: int, pooled: int | None = None) -> Callable[[str, torch.dtype], Inputs]:
    def make(device: str, dtype: torch.dtype) -> Inputs:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        inputs: Inputs = {
            "sample": noise(batch, 4, latent, latent),
            "timestep": torch.full((batch,), 500, device=device),
            "encoder_hidden_states": noise(batch, 77, text),
        }
        if pooled is not None:
            inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
        return inputs

    return make


def _dit(layers: int, heads: int, head_dim: int, latent: int) -> Callable[[], nn.Module]:
    return lambda: DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=latent,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def _dit_inputs(batch: int, latent: int) -> Callable[[str, torch.dtype], Inputs]:
    return lambda device, dtype: {
        "hidden_states": torch.randn(batch, 4, latent, latent, device=device).to(dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": torch.arange(batch, device=device) % 1000,
    }


def _flux_inputs(device: str, dtype: torch.dtype) -> Inputs:
    side, text = 64, 512
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    return {
        "hidden_states": torch.randn(1, side * side, 64, device=device).to(dtype),
        "encoder_hidden_states": torch.randn(1, text, 4096, device=device).to(dtype),
        "pooled_projections": torch.randn(1, 768, device=device).to(dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_ids": ids.to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
    }


def _methods(max_downsample: int = 1, share: int | None = None) -> dict[str, Any]:
    return {
        "lgtm": LGTMConfig(ratio=0.7, max_downsample=max_downsample),
        "lgtm_shared": LGTMConfig(ratio=0.7, max_downsample=max_downsample, share_plan=share or 2),
        "iekvd": IEKVDConfig(factor=2, alpha=0.9, max_downsample=max_downsample),
    }


MODELS = {
    "sd2_512": Model(_unet(64, **SD2), _unet_inputs(2, 64, 1024), _methods()),
    "unet_small": Model(_unet(64, **SMALL), _unet_inputs(2, 64, 512), _methods()),
    "sd2_768": Model(_unet(96, **SD2), _unet_inputs(2, 96, 1024), _methods()),
    # Its attention begins at half the latent's resolution; 4 takes in both levels.
    "sdxl_1024": Model(_unet(128, **SDXL), _unet_inputs(2, 128, 2048, 1280), _methods(4)),
    "dit_256": Model(_dit(28, 16, 72, 32), _dit_inputs(2, 32), _methods()),
    "dit_512": Model(_dit(28, 16, 72, 64), _dit_inputs(2, 64), _methods()),
    "dit_512_b32": Model(_dit(28, 16, 72, 64), _dit_inputs(32, 64), _methods(share=32)),
    # Flux's widths, with 4 + 8 of its 19 + 38 blocks: all blocks of a kind are alike.
    "flux_1024": Model(
        lambda: FluxTransformer2DModel(num_layers=4, num_single_layers=8, guidance_embeds=True),
        _flux_inputs,
        {"iekvd": IEKVDConfig(factor=2, alpha=0.9)},
    ),
    # For trying the programs out.
    "dit_tiny": Model(_dit(2, 2, 16, 16), _dit_inputs(2, 16), _methods()),
    "unet_tiny": Model(
        _unet(
            16,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
        ),
        _unet_inputs(2, 16, 16),
        _methods(),
    ),
}
TINY = ("dit_tiny", "unet_tiny")


def instances(model: Model, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The unpatched model and a patched one per method, all with the same weights in memory."""
    with torch.device(device):
        first = model.build().to(dtype).eval()
    found = {"unpatched": first}
    for name, config in model.configs.items():
        with torch.device("meta"):
            patched = model.build().eval()
        patched.load_state_dict(first.state_dict(), assign=True)
        # Buffers that are computed, and not in the state dict.
        for path, buffer in first.named_buffers():
            parent, _, leaf = path.rpartition(".")
            setattr(patched.get_submodule(parent), leaf, buffer)
        apply_token_compression(patched, config)
        found[name] = patched
    return found


def build(model: Model, device: str, dtype: torch.dtype, compiled: bool) -> harness.Case:
    inputs = model.inputs(device, dtype)
    expected: dict[str, Tensor] = {}

    def check(provider: str, out: Any) -> None:
        assert out.isfinite().all(), "not finite"
        base = expected.setdefault("unpatched", out).double()
        distance = (out.double() - base).norm() / base.norm()
        assert distance < 1, f"relative distance {distance:.2f} to the unpatched model"

    def call(module: Any) -> Callable[[], Tensor]:
        return lambda: module(**inputs, return_dict=False)[0]

    modules = instances(model, device, dtype)
    providers = {name: call(module) for name, module in modules.items()}
    if compiled:
        providers |= {f"{name}+compile": call(torch.compile(module)) for name, module in modules.items()}
    return harness.Case(providers, check, 0)


def main() -> int:
    options = harness.parser(__doc__)
    options.add_argument("--model", action="append", choices=tuple(MODELS), help="default: all but the tiny ones")
    options.add_argument("--compile", action="store_true", help="time the models under torch.compile as well")
    arguments = options.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    session = harness.session_of(arguments)
    harness.print_heading(session)
    for name in arguments.model or [name for name in MODELS if name not in TINY]:
        if session.is_late("model", name):
            continue
        torch.compiler.reset()
        case = build(MODELS[name], session.device, harness.DTYPES[session.dtype], arguments.compile)
        times = harness.run_case(session, "model", name, case, ())
        for (provider, mode), timing in times.items():
            base = "unpatched+compile" if provider.endswith("+compile") else "unpatched"
            if provider != base and (base, mode) in times:
                print(f"    {provider} {mode}: {times[base, mode].median / timing.median:.2f}x over {base}", flush=True)
    return harness.finish(session)


if __name__ == "__main__":
    sys.exit(main())
