"""A server's model: warmed up before the first request, then called in fixed shapes; on a GPU from a CUDA graph."""

from __future__ import annotations

import tiny
import torch

import bigain_kernels
from bigain_kernels.diffusers import LGTMConfig, apply_token_compression


class Server:
    """A compressed U-Net for requests of one shape.

    On a GPU the forward pass is captured once and replayed: with compression it reads no value on the host. A config
    with `start`, `end` or a scheduled ratio would, and cannot be captured.
    """

    def __init__(self, batch: int = 2) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = tiny.unet().to(self.device)
        apply_token_compression(self.model, LGTMConfig(ratio=0.5, share_plan=2))
        self.noisy = torch.zeros(batch, 4, 16, 16, device=self.device)
        self.text = torch.zeros(batch, 7, 16, device=self.device)
        self.timestep = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.warmed = bigain_kernels.warm_up(self.run, [()])
        self.graph = None
        if self.device.type == "cuda":
            with torch.no_grad():
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.out = self.run()

    def run(self) -> torch.Tensor:
        return self.model(self.noisy, self.timestep, encoder_hidden_states=self.text).sample

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Predict; the result is the caller's."""
        for mine, given in ((self.noisy, noisy), (self.timestep, timestep), (self.text, text)):
            mine.copy_(given)
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.out.clone()


if __name__ == "__main__":
    server = Server()
    print(f"on {server.device}, kernels compiled: {server.warmed.kernels or 'none to compile'}")
    for request in range(3):
        given = torch.randn(2, 4, 16, 16), torch.tensor([500, 500]), torch.randn(2, 7, 16)
        print(f"request {request}: {float(server(*given).std()):.4f}")
