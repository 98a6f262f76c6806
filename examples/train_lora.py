"""LoRA on a compressed U-Net: fewer tokens in forward and backward pass. Needs peft."""

from __future__ import annotations

import tiny
import torch
from peft import LoraConfig

from bigain_kernels.diffusers import LGTMConfig, apply_token_compression


def main(steps: int = 5) -> list[float]:
    model = tiny.unet().requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    apply_token_compression(model, LGTMConfig(ratio=0.5))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    noisy, target = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    text, losses = torch.randn(2, 7, 16, generator=generator), []
    for _ in range(steps):
        loss = (model(noisy, 500, encoder_hidden_states=text).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{sum(p.numel() for p in learned)} parameters, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
