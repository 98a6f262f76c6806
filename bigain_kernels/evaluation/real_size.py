"""Speed at real size: the first level of Stable Diffusion 2 and a layer of DiT-XL/2, both for images of 512 x 512.

Weights are random, so this says nothing of quality.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..diffusers import token_compression
from .points import NONE, Point

_POINTS = (
    NONE,
    Point("L-GTM 0.5", "lgtm", {"ratio": 0.5}),
    Point("L-GTM 0.7", "lgtm", {"ratio": 0.7}),
    Point("IE-KVD 2", "iekvd", {"factor": 2, "alpha": 0.9}),
)
# Each point so often in turn, after once that does not count.
_ROUNDS = 3


def _first_level_of_sd2() -> Any:
    """(model, call): 4,096 tokens of 320 channels, one transformer layer on the way down and two on the way up."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=5,
        cross_attention_dim=1024,
        use_linear_projection=True,
    )
    x, text, t = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 1024), torch.tensor([500])
    return model, lambda: model(x, t, encoder_hidden_states=text)


def _layer_of_dit_xl() -> Any:
    """(model, call): 1,024 tokens of 1,152 channels, one layer."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, num_layers=1, sample_size=64)
    x, t = torch.randn(1, 4, 64, 64), torch.tensor([500])
    return model, lambda: model(x, t, class_labels=torch.tensor([1]))


MODELS: dict[str, Callable[[], Any]] = {
    "SD 2 at 512, first level": _first_level_of_sd2,
    "DiT-XL/2 at 512, one layer": _layer_of_dit_xl,
}


@dataclass(frozen=True)
class RealSizeRow:
    """Median milliseconds of one forward pass of one row, and the speed against no compression."""

    model: str
    title: str
    milliseconds: float
    speed: float


class RealSize:
    """The timing and what it found."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}

    @property
    def total(self) -> int:
        """Steps of progress in all."""
        return len(MODELS) * len(_POINTS) * (_ROUNDS + 1)

    @torch.no_grad()
    def run(self, progress: Callable[[str], None]) -> None:
        """Time every model under every point, in turns."""
        for name, make in MODELS.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, call = make()
            model.eval()
            for turn in range(_ROUNDS + 1):
                for point in _POINTS:
                    seconds = self._once(model, call, point)
                    if turn:
                        self.seconds.setdefault((name, point.title), []).append(seconds)
                    progress(f"{name}: {point.title}")

    @staticmethod
    def _once(model: Any, call: Callable[[], Any], point: Point) -> float:
        config = point.compression()
        if config is None:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        with token_compression(model, config):
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

    def rows(self) -> list[RealSizeRow]:
        """What has been timed so far."""
        medians = {key: statistics.median(times) for key, times in self.seconds.items()}
        return [
            RealSizeRow(name, title, 1000 * seconds, medians[name, NONE.title] / seconds)
            for (name, title), seconds in medians.items()
            if (name, NONE.title) in medians
        ]
