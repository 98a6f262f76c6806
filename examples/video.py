"""Wan, a video model: windows stay inside a frame, so every frame is pooled as a picture is."""

from __future__ import annotations

import tiny
import torch

from bigain_kernels.diffusers import IEKVDConfig, token_compression


@torch.no_grad()
def main() -> None:
    model = tiny.wan()
    frames, height, width = 3, 16, 24
    call = {
        "hidden_states": torch.randn(1, 4, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    plain = model(**call).sample
    with token_compression(model, IEKVDConfig(factor=2, alpha=0.9)) as report:
        pooled = model(**call).sample
    tokens = frames * height * width // 4
    print(f"{len(report.patched)} layers attend to {tokens // 4} of {tokens} keys")
    print(f"error {float((pooled - plain).square().mean()):.2e} beside {float(plain.square().mean()):.2e}")


if __name__ == "__main__":
    main()
