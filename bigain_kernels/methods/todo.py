"""Nearest downsampling of keys and values (ToDo), Smith et al. 2024, arXiv 2402.13573."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config import PoolConfig


@dataclass(frozen=True, kw_only=True)
class ToDoConfig(PoolConfig):
    """Nearest downsampling of keys and values (ToDo, Smith et al. 2024, arXiv 2402.13573): IE-KVD with alpha = 1.

    Args:
        others: see `PoolConfig` and `CompressionConfig`.
    """

    method: ClassVar[str] = "todo"

    @property
    def alpha(self) -> float:
        return 1.0
