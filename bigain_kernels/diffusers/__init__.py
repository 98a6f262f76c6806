"""Token compression in diffusers models: `print(apply_token_compression(pipe, LGTMConfig(ratio=0.5)))`."""

from ..methods import ABMConfig, AvgPoolConfig, IEKVDConfig, LGTMConfig, SiToConfig, ToDoConfig, ToMeConfig
from .apply import apply_token_compression, remove_token_compression, token_compression
from .report import CompressionReport, Decision

__all__ = [
    "ABMConfig",
    "AvgPoolConfig",
    "CompressionReport",
    "Decision",
    "IEKVDConfig",
    "LGTMConfig",
    "SiToConfig",
    "ToDoConfig",
    "ToMeConfig",
    "apply_token_compression",
    "remove_token_compression",
    "token_compression",
]
