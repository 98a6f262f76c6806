"""The methods by name. The command line, the demo and the evaluation know no other list."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import TypeVar

from .config import CompressionConfig, MergeConfig, PoolConfig
from .options import kind_of

Config = TypeVar("Config", bound=type[CompressionConfig])

_configs: dict[str, type[CompressionConfig]] = {}


def register(config_class: Config) -> Config:
    """Make a method known by the name in its `method`; returns the class, so it can stand as a decorator.

    Args:
        config_class: a frozen dataclass derived from `MergeConfig` or `PoolConfig`; `option` makes all its fields.

    Raises:
        TypeError: it is none, or one of its fields has no kind or no default.
        ValueError: its name is taken, or is no lower-case word.
    """
    if not (isinstance(config_class, type) and issubclass(config_class, (MergeConfig, PoolConfig))):
        raise TypeError(f"config_class: got {config_class!r}, expected a class derived from MergeConfig or PoolConfig")
    # A subclass that is no dataclass itself passes for one, and its own fields go unseen.
    if not is_dataclass(config_class) or "__dataclass_params__" not in vars(config_class):
        raise TypeError(f"config_class: got {config_class.__name__}, expected a dataclass (frozen, kw_only)")
    plain = [declared.name for declared in fields(config_class) if kind_of(declared) is None]
    if plain:
        raise TypeError(f"config_class: got {config_class.__name__} with plain fields {plain}, expected option(...)")
    name = config_class.method
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == "none":
        raise ValueError(f"method: got {name!r} from {config_class.__name__}, expected a lower-case word, not 'none'")
    if _configs.get(name, config_class) is not config_class:
        raise ValueError(f"method: got {name!r} from {config_class.__name__}, {_configs[name].__name__} has that name")
    _configs[name] = config_class
    return config_class


def unregister(name: str) -> None:
    """Forget a method; ValueError if there is none of that name."""
    config_class(name)
    del _configs[name]


def names() -> tuple[str, ...]:
    """The names of all methods, in the order in which they were registered."""
    return tuple(_configs)


def config_class(name: str) -> type[CompressionConfig]:
    """The config class of a method; ValueError if there is none of that name."""
    if name not in _configs:
        raise ValueError(f"method: got {name!r}, expected one of {list(_configs)}")
    return _configs[name]
