"""Average pooling of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config import PoolConfig


@dataclass(frozen=True, kw_only=True)
class AvgPoolConfig(PoolConfig):
    """Average pooling of keys and values: IE-KVD with alpha = 0.

    Args:
        others: see `PoolConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "avgpool"

    @property
    def alpha(self) -> float:
        return 0.0
