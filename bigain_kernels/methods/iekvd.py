"""Interpolate-extrapolate downsampling of keys and values (IE-KVD), BiGain, arXiv 2603.12240."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config import PoolConfig
from .options import Scheduled, option


@dataclass(frozen=True, kw_only=True)
class IEKVDConfig(PoolConfig):
    """Interpolate-extrapolate downsampling of keys and values (BiGain, arXiv 2603.12240).

    Args:
        alpha: weight of nearest against average pooling, outside [0, 1] it extrapolates; or (first, last), over the
            timesteps. A pair moves linearly from the first denoising step (t = T - 1) to the last (t = 0), computed on
            the device for every row of the batch. 1 is nearest pooling, 0 average pooling.
        others: see `PoolConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "iekvd"

    alpha: float | tuple[float, float] = option(0.9, Scheduled())
