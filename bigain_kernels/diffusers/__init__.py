"""Token compression in diffusers models: `print(apply_token_compression(pipe, LGTMConfig(ratio=0.5)))`."""

from ..methods import (
    ABMConfig,
    AvgPoolConfig,
    IEKVDConfig,
    LGTMConfig,
    MixedConfig,
    SiToConfig,
    ToDoConfig,
    ToMeConfig,
    load_config,
    save_config,
)
from .apply import apply_token_compression, remove_token_compression, token_compression
from .families import Family, Layer, Place, register_family, unregister_family
from .finding import recommended_config
from .report import CompressionReport, Decision

__all__ = [
    "ABMConfig",
    "AvgPoolConfig",
    "CompressionReport",
    "Decision",
    "Family",
    "IEKVDConfig",
    "LGTMConfig",
    "Layer",
    "MixedConfig",
    "Place",
    "SiToConfig",
    "ToDoConfig",
    "ToMeConfig",
    "apply_token_compression",
    "load_config",
    "recommended_config",
    "register_family",
    "remove_token_compression",
    "save_config",
    "token_compression",
    "unregister_family",
]
