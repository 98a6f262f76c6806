"""The methods by name, and their options. The command line, the demo and the evaluation know no other list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .config import CompressionConfig, MergeConfig, PoolConfig
from .options import Kind, kind_of

Config = TypeVar("Config", bound=type[CompressionConfig])

# Where an installed package names the config classes of its methods: `name = "package.module:Config"`.
ENTRY_POINTS = "bigain_kernels.methods"
# What stands for no method at all.
NONE = "none"

_configs: dict[str, type[CompressionConfig]] = {}


def register(config_class: Config) -> Config:
    """Make a method known by the name in its `method`; returns the class, so it can stand as a decorator.

    Args:
        config_class: a frozen dataclass derived from `MergeConfig` or `PoolConfig`; `option` makes all its fields.

    Raises:
        TypeError: it is none, or one of its fields is no option.
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
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == NONE:
        raise ValueError(f"method: got {name!r} from {config_class.__name__}, expected a lower-case word, not {NONE!r}")
    if _configs.get(name, config_class) is not config_class:
        raise ValueError(f"method: got {name!r} from {config_class.__name__}, {_configs[name].__name__} has that name")
    _configs[name] = config_class
    return config_class


def unregister(name: str) -> None:
    """Forget a method; ValueError if there is none of that name."""
    config_class(name)
    del _configs[name]


def load_entry_points() -> None:
    """Register the methods that installed packages name in the group `ENTRY_POINTS` of their entry points.

    Raises:
        ImportError: one of them cannot be imported.
        TypeError, ValueError: one of them is no config of a method.
    """
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"method: got the entry point {point.name} = {point.value!r}, expected the config class of a method "
                f"({error})"
            ) from error
        register(found)


def names() -> tuple[str, ...]:
    """The names of all methods, in the order in which they were registered."""
    return tuple(_configs)


def config_class(name: str) -> type[CompressionConfig]:
    """The config class of a method; ValueError if there is none of that name."""
    if name not in _configs:
        raise ValueError(f"method: got {name!r}, expected one of {list(_configs)}")
    return _configs[name]


def options_of(method: str) -> dict[str, Kind]:
    """The options of a method by name, none for "none"; ValueError if there is no such method."""
    if method == NONE:
        return {}
    if method not in _configs:
        raise ValueError(f"method: got {method!r}, expected one of {[NONE, *_configs]}")
    return {declared.name: kind for declared in fields(_configs[method]) if (kind := kind_of(declared))}


def check_option(method: str, name: str, value: Any) -> None:
    """A method has an option; ValueError that names both, `value` and the methods that do, if not."""
    if name in options_of(method):
        return
    owners = [other for other in _configs if name in options_of(other)]
    expected = f"one of the methods with this option, {owners}" if owners else "an option of a method"
    raise ValueError(f"{name}: got {value!r} with method {method}, expected {expected}")


def read_options(method: str, texts: Mapping[str, str | bool]) -> dict[str, Any]:
    """The options of a method from the text of a command line; flags come as True or False.

    Raises:
        ValueError: the method has no such option, or the text is of another kind.
    """
    for name, text in texts.items():
        check_option(method, name, text)
    kinds = options_of(method)
    return {name: text if isinstance(text, bool) else kinds[name].read(name, text) for name, text in texts.items()}


def make_config(method: str, options: Mapping[str, Any] | None = None) -> CompressionConfig | None:
    """The config of a method by name with the given options, or None for "none".

    Raises:
        ValueError: there is no such method, or it has no such option.
        TypeError, ValueError: an option is of the wrong type or out of its range.
    """
    options = options or {}
    for name, value in options.items():
        check_option(method, name, value)
    options_of(method)
    return None if method == NONE else _configs[method](**options)
