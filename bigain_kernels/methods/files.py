"""Configs as files: JSON with every option of every config, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CompressionConfig
from .mixed import Compression, MixedConfig, parts_of
from .registry import NONE, load_entry_points, make_config

_CONFIGS, _ABOUT = "configs", "about"


def config_text(config: Compression, about: Mapping[str, Any] | None = None) -> str:
    """What `load_config` reads as `config`; `about` is for people, any JSON values, and is not read back."""
    lines = [json.dumps(part.settings()) for part in parts_of(config)]
    configs = ",\n  ".join(lines)
    note = "" if about is None else f',\n "{_ABOUT}": {json.dumps(about, indent=2)}'
    return f'{{"{_CONFIGS}": [\n  {configs}\n ]{note}}}\n'


def save_config(path: Path | str, config: Compression) -> None:
    """Write a config, or several in a `MixedConfig`, as a file for `load_config` and `bigain classify --config`.

    Raises:
        OSError: it cannot be written, such as into a folder that is not there.
    """
    text = config_text(config)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise type(error)(f"path: got {path}, expected a file in a folder that is there ({error.strerror})") from error


def load_config(path: Path | str) -> Compression:
    """Read the file of `save_config` or `bigain search`.

    Args:
        path: JSON, {"configs": [{"method": "lgtm", "ratio": 0.5, "blocks": [0, 3]}, ...]}. Options that are left out
            have their defaults; with several configs each names its `blocks`. Methods of other packages are found by
            their entry points.

    Returns:
        The config, or a `MixedConfig` of several, for `apply_token_compression`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or one of its configs has an option or a value that its method has not.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise type(error)(
            f"config: got {path}, expected a file of save_config or bigain search ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: got {path}, expected JSON ({error})") from error
    if not isinstance(content, dict) or not {_CONFIGS} <= set(content) <= {_CONFIGS, _ABOUT}:
        named = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"config: got {path} with {named}, expected {_CONFIGS!r}, a list, and perhaps {_ABOUT!r}")
    rows = content[_CONFIGS]
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"config: got {path} with configs={rows!r:.80}, expected a list of at least one")
    load_entry_points()
    try:
        configs = [_config(row) for row in rows]
        return configs[0] if len(configs) == 1 else MixedConfig(tuple(configs))
    except (ValueError, TypeError) as error:
        raise ValueError(f"config: got {path} with a config that cannot be made ({error})") from error


def _config(row: Any) -> CompressionConfig:
    if not isinstance(row, dict) or not isinstance(row.get("method"), str):
        raise ValueError(f"got {row!r:.80}, expected an object with 'method'")
    options = {name: _by_level(name, value) for name, value in row.items() if name != "method"}
    config = make_config(row["method"], options)
    if config is None:
        raise ValueError(f"method: got {NONE!r}, expected a method")
    return config


def _by_level(name: str, value: Any) -> Any:
    """JSON has no numbers as names."""
    if not isinstance(value, dict):
        return value
    if not all(key.isascii() and key.isdigit() for key in value):
        raise ValueError(f"{name}: got {value!r:.80}, expected the numbers of levels")
    return {int(key): each for key, each in value.items()}
