"""Methods and options as plain data, for what shows them: the help of a command line, a page of documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .config import CompressionConfig
from .options import Flag
from .registry import config_class, names, options_of


def _entry(config: type[CompressionConfig], name: str) -> str:
    """What the docstrings of a config and its bases say about an option: the first sentence."""
    for base in config.__mro__:
        text = inspect.cleandoc(base.__doc__ or "")
        found = re.search(rf"^    {name}: (.+(?:\n {{8}}.+)*)", text, re.MULTILINE)
        if found:
            whole = " ".join(found[1].split())
            return re.split(r'(?<=\.) (?=[A-Z"])', whole)[0]
    return ""


def _summary(config: type[CompressionConfig]) -> str:
    """What a method is, in the first words of its config's docstring."""
    return re.split(r" \(|[.:;]", inspect.cleandoc(config.__doc__ or ""))[0]


def method_table(without: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """All methods that are registered and all their options, without those named in `without`.

    Returns:
        "methods": what each method is, by its name. "options", by name: "help", what the option means; "values", the
        form of its text; "flag", whether it takes no text; "defaults", as text, by the methods that have it.

    Raises:
        ValueError: an option is a flag in one method and takes a value in another.
    """
    options: dict[str, dict[str, Any]] = {}
    for method in names():
        config, kinds = config_class(method), options_of(method)
        for declared in fields(config):
            name = declared.name
            if name in without:
                continue
            kind = kinds[name]
            new = {"help": _entry(config, name), "values": kind.values, "flag": isinstance(kind, Flag), "defaults": {}}
            row: dict[str, Any] = options.setdefault(name, new)
            if row["flag"] != isinstance(kind, Flag):
                raise ValueError(
                    f"{name}: a flag in method {method} or in {list(row['defaults'])}, expected both or none"
                )
            row["defaults"][method] = kind.show(declared.default)
    return {"methods": {method: _summary(config_class(method)) for method in names()}, "options": options}
