"""Several configs for one model, each for blocks of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import DEFAULT_TRAIN_TIMESTEPS, CompressionConfig


@dataclass(frozen=True)
class MixedConfig:
    """Several configs, each for the transformer blocks that it names: one method here, another or another ratio there.

    `bigain search` finds them, `apply_token_compression` takes them, `save_config` and `load_config` keep them.

    Args:
        configs: at least one, each with `blocks`; no block stands in two of them. A block of a U-Net must also pass its
            config's `max_downsample`.

    Raises:
        TypeError: one is no config of a method.
        ValueError: there is none, one names no blocks, two name the same, or they differ in `num_train_timesteps`.
    """

    configs: tuple[CompressionConfig, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.configs, (tuple, list)):
            raise TypeError(f"configs: got {self.configs!r}, expected a tuple of configs")
        object.__setattr__(self, "configs", tuple(self.configs))
        if not self.configs:
            raise ValueError("configs: got (), expected at least one config")
        seen: set[int] = set()
        for i, config in enumerate(self.configs):
            if not isinstance(config, CompressionConfig):
                raise TypeError(
                    f"configs[{i}]: got {type(config).__name__}, expected a config such as LGTMConfig or IEKVDConfig"
                )
            if not config.blocks:
                raise ValueError(f"configs[{i}]: got blocks={config.blocks}, expected the indices of its own blocks")
            twice = seen.intersection(config.blocks)
            if twice:
                raise ValueError(f"configs[{i}]: got blocks={config.blocks}, expected none of {sorted(twice)} again")
            seen.update(config.blocks)
        lengths = {config.num_train_timesteps for config in self.configs}
        if len(lengths) > 1:
            raise ValueError(f"num_train_timesteps: got {sorted(map(str, lengths))}, expected the same in all configs")

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of all configs."""
        return tuple(sorted(block for config in self.configs for block in config.blocks or ()))

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that at least one config compresses."""
        return tuple(dict.fromkeys(name for config in self.configs for name in config.modules))

    @property
    def num_train_timesteps(self) -> int | None:
        """T, where the configs name it."""
        return self.configs[0].num_train_timesteps

    @property
    def train_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return self.num_train_timesteps or DEFAULT_TRAIN_TIMESTEPS

    def settings(self) -> dict[str, Any]:
        """The method and the value of every option of all configs, to be written down."""
        return {"method": "mixed", "configs": [config.settings() for config in self.configs]}


Compression = CompressionConfig | MixedConfig


def parts_of(config: Compression) -> tuple[CompressionConfig, ...]:
    """The configs of a `MixedConfig`; a config of one method alone."""
    return config.configs if isinstance(config, MixedConfig) else (config,)


def each(config: Compression, change: Callable[[CompressionConfig], CompressionConfig]) -> Compression:
    """`config` with `change` made to all that it consists of."""
    if isinstance(config, MixedConfig):
        return MixedConfig(tuple(map(change, config.configs)))
    return change(config)
