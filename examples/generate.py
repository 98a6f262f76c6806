"""Stable Diffusion, SDXL and Flux, compressed and not: how far the results are apart.

python examples/generate.py [PIPELINE], a folder or hub id; without one, tiny models with random weights run once.
"""

from __future__ import annotations

import sys

import tiny
import torch
from diffusers import DiffusionPipeline

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression, token_compression


def pipeline(name: str) -> None:
    """A real pipeline: compress it and call it as before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(name, dtype=torch.bfloat16).to(device)
    # SDXL has its first attention at half resolution.
    config = IEKVDConfig(factor=2) if hasattr(pipe, "transformer") else LGTMConfig(ratio=0.5, max_downsample=2)
    print(apply_token_compression(pipe, config))
    pipe("a lighthouse on a cliff", generator=torch.Generator().manual_seed(0)).images[0].save("lighthouse.png")


@torch.no_grad()
def models() -> None:
    text, noise = torch.randn(2, 7, 16), torch.randn(2, 4, 16, 24)
    steps = torch.tensor([500, 500])
    for name, model, level in (("SD", tiny.unet(), 1), ("SDXL", tiny.unet(xl=True), 2)):
        plain = model(noise, steps, encoder_hidden_states=text).sample
        with token_compression(model, LGTMConfig(ratio=0.5, max_downsample=level, share_plan=2)) as report:
            merged = model(noise, steps, encoder_hidden_states=text).sample
        print(f"{name}: {len(report.patched)} layers compressed, error {float((merged - plain).square().mean()):.2e}")

    height, width = 8, 12
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    call = {
        "hidden_states": torch.randn(1, height * width, 16),
        "encoder_hidden_states": text[:1],
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float(),
        "txt_ids": torch.zeros(7, 3),
    }
    model = tiny.flux()
    plain = model(**call).sample
    with token_compression(model, IEKVDConfig(factor=2, alpha=0.9)) as report:
        pooled = model(**call).sample
    print(f"Flux: {len(report.patched)} layers compressed, error {float((pooled - plain).square().mean()):.2e}")


if __name__ == "__main__":
    pipeline(sys.argv[1]) if len(sys.argv) > 1 else models()
