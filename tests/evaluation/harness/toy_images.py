"""A data set of noisy prototypes, whose errors are known in closed form."""

from __future__ import annotations

from pathlib import Path

import torch

from bigain_kernels.evaluation.images import DamagedImage

from ..toys import SHAPE, PrototypeDenoiser


class ToyImages:
    """n images of the prototypes in turn, of which some are damaged."""

    def __init__(self, denoiser: PrototypeDenoiser, n: int, damaged: tuple[int, ...] = (), first: int = 0) -> None:
        self._damaged, self._first = damaged, first
        self.paths = [f"folder/{i:03d}.png" for i in range(first, first + n)]
        self.labels = [(i % denoiser.num_classes,) for i in range(first, first + n)]
        noise = torch.randn(first + n, *SHAPE, generator=torch.Generator().manual_seed(1))
        self._pixels = denoiser.prototypes[[label[0] for label in self.labels]] + 1.5 * noise[first:]

    def read(self, i: int) -> torch.Tensor:
        if i in self._damaged:
            raise DamagedImage(Path(self.paths[i]), "broken")
        return self._pixels[i]
