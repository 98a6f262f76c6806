"""The options of a method: which values each takes, and how it is read from the text of a command line.

A config declares an option as a dataclass field, `window: int | None = option(None, Count())`, and says what it means
in its docstring. Everything else follows from that: the check, the text that the command line reads, and its help.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from numbers import Integral
from typing import Any, NoReturn, TypeVar

from ..checks import check_choice, check_count, check_number, check_pair, check_window
from .schedule import check_schedule

T = TypeVar("T")
_KIND = "bigain_kernels.kind"
# Downsampling of the resolution levels of a U-Net, from that of its latents on.
LEVELS = (1, 2, 4, 8)


class Kind:
    """Which values an option takes.

    Attributes:
        values: the text of a value, as a usage line shows it.
        separator: between the parts of a value that has several.
    """

    values = ""
    separator = ","

    def check(self, name: str, value: Any) -> Any:
        """The value as the config keeps it; TypeError or ValueError, which name the option, if it is not one."""
        raise NotImplementedError

    def read(self, name: str, text: str) -> Any:
        """The value that a command line gives as `text`, for `check`; ValueError if it cannot be read."""
        raise NotImplementedError

    def show(self, value: Any) -> str:
        """The text that `read` reads as `value`; empty for None."""
        if isinstance(value, (tuple, list)):
            return self.separator.join(map(self.show, value))
        return "" if value is None else str(value).removesuffix(".0")


def option(default: T, kind: Kind) -> T:
    """A field of a config with what it takes. A default of None is allowed besides what `kind` takes."""
    return field(default=default, metadata={_KIND: kind})


def kind_of(declared: Any) -> Kind | None:
    """The kind of a dataclass field that `option` made, None for any other."""
    return declared.metadata.get(_KIND)


def check_range(name: str, value: float, low: float, high: float, why: str = "") -> None:
    """`low` <= `value` <= `high`."""
    if not low <= value <= high:
        expected = f"{low:g} <= {name} <= {high:g}" if high != float("inf") else f"at least {low:g}"
        raise ValueError(f"{name}: got {value}, expected {expected}{why}")


def _integers(name: str, text: str, expected: str, separator: str = ",") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in re.split(separator, text))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected {expected}") from error


def _floats(name: str, text: str, most: int, expected: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected {expected}") from error
    if len(values) > most:
        raise ValueError(f"{name}: got {text!r}, expected {expected}")
    return values


class Flag(Kind):
    """True or False."""

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, expected True or False")
        return value

    def read(self, name: str, text: str) -> bool:
        if text not in ("True", "False"):
            raise ValueError(f"{name}: got {text!r}, expected True or False")
        return text == "True"


class Count(Kind):
    """An integer of at least `minimum`."""

    values = "N"

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = minimum

    def check(self, name: str, value: Any) -> int:
        check_count(name, value, self.minimum)
        return int(value)

    def read(self, name: str, text: str) -> int:
        values = _integers(name, text, "a whole number")
        if len(values) > 1:
            raise ValueError(f"{name}: got {text!r}, expected a whole number")
        return values[0]


class Number(Kind):
    """A finite number from `low` to `high`."""

    values = "X"

    def __init__(self, low: float = float("-inf"), high: float = float("inf")) -> None:
        self.low, self.high = low, high

    def check(self, name: str, value: Any) -> float:
        check_number(name, value)
        check_range(name, value, self.low, self.high)
        return float(value)

    def read(self, name: str, text: str) -> float:
        return _floats(name, text, 1, "a number")[0]


class Scheduled(Kind):
    """A finite number, or a pair (first, last) that moves over the timesteps."""

    values = "X or FIRST,LAST"

    def check(self, name: str, value: Any) -> float | tuple[float, float]:
        check_schedule(name, value)
        return (float(value[0]), float(value[1])) if isinstance(value, (tuple, list)) else float(value)

    def read(self, name: str, text: str) -> float | tuple[float, ...]:
        values = _floats(name, text, 2, "a number or FIRST,LAST")
        return values[0] if len(values) == 1 else values


class Pair(Kind):
    """(rows, columns) of at least 1; one integer stands for both."""

    values = "N or ROWSxCOLUMNS"
    separator = "x"

    def check(self, name: str, value: Any) -> tuple[int, int]:
        rows, columns = check_pair(name, (value, value) if isinstance(value, Integral) else value)
        return int(rows), int(columns)

    def read(self, name: str, text: str) -> int | tuple[int, ...]:
        expected = "a whole number or ROWSxCOLUMNS"
        values = _integers(name, text, expected, "[x,]")
        if len(values) > 2:
            raise ValueError(f"{name}: got {text!r}, expected {expected}")
        return values[0] if len(values) == 1 else values


class Window(Kind):
    """A number of tiles, or (tiles, frames), in which None stands for all tiles."""

    values = "TILES or TILES,FRAMES"

    def check(self, name: str, value: Any) -> int | tuple[int | None, int]:
        tiles, frames = check_window(value)
        if not isinstance(value, (tuple, list)):
            return int(tiles or 0)
        return None if tiles is None else int(tiles), int(frames)

    def read(self, name: str, text: str) -> int | tuple[int | None, int]:
        tiles, comma, frames = text.partition(",")
        count = Count()
        if not comma:
            return count.read(name, text)
        return count.read(name, tiles) if tiles else None, count.read(name, frames)


class Choice(Kind):
    """One of the named choices."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices, self.values = choices, "|".join(choices)

    def check(self, name: str, value: Any) -> str:
        check_choice(name, value, self.choices)
        return str(value)

    def read(self, name: str, text: str) -> str:
        return text


class Level(Kind):
    """One of a few integers."""

    def __init__(self, choices: tuple[int, ...]) -> None:
        self.choices, self.values = choices, "|".join(map(str, choices))

    def check(self, name: str, value: Any) -> int:
        check_count(name, value)
        if value not in self.choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {list(self.choices)}")
        return int(value)

    def read(self, name: str, text: str) -> int:
        return Count().read(name, text)


class ByLevel(dict[int, Any]):
    """A value for each resolution level that is compressed, by its downsampling; it cannot be changed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("by level: got a change, expected none: make a new config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[ByLevel], tuple[dict[int, Any]]]:
        return ByLevel, (dict(self),)


class PerLevel(Kind):
    """What `kind` takes, or a mapping of it by resolution level, which then are those that are compressed."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.values = kind, f"{kind.values} or LEVEL:VALUE,LEVEL:VALUE,..."
        self.separator = kind.separator

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return self.kind.check(name, value)
        if not value:
            raise ValueError(f"{name}: got {{}}, expected a value for at least one of the levels {list(LEVELS)}")
        for level in value:
            Level(LEVELS).check(f"{name}, level", level)
        return ByLevel((int(level), self.kind.check(f"{name}[{level}]", value[level])) for level in sorted(value))

    def read(self, name: str, text: str) -> Any:
        if ":" not in text:
            return self.kind.read(name, text)
        # A comma is also between the two values of a schedule, which have no level of their own.
        found: list[tuple[int, list[str]]] = []
        for part in text.split(","):
            level, colon, rest = part.rpartition(":")
            if colon:
                found.append((Count().read(f"{name}, level", level), [rest]))
            elif found:
                found[-1][1].append(rest)
            else:
                raise ValueError(f"{name}: got {text!r}, expected {self.values}")
        _check_each_once(f"{name}, levels", [level for level, _ in found], "")
        return {level: self.kind.read(f"{name}[{level}]", ",".join(parts)) for level, parts in found}

    def show(self, value: Any) -> str:
        if not isinstance(value, Mapping):
            return self.kind.show(value)
        return ",".join(f"{level}:{self.kind.show(each)}" for level, each in value.items())


def _check_each_once(name: str, values: Sequence[Any], what: str) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: got {tuple(values)}, expected {what}each once")


def _is_array(value: Any) -> bool:
    """Whether it is an array of one dimension; a tensor is none, as reading its numbers may wait for a device."""
    return hasattr(value, "__array_interface__") and getattr(value, "ndim", 0) == 1


class Indices(Kind):
    """Different integers of at least 0."""

    values = "N,N,..."

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        # Arrays of NumPy have an order and integers as well, but are no Sequence.
        if not isinstance(value, (tuple, list, range)) and not _is_array(value):
            raise TypeError(f"{name}: got {value!r}, expected a sequence of indices")
        for index in value:
            check_count(name, index)
        _check_each_once(name, value, "")
        return tuple(int(index) for index in value)

    def read(self, name: str, text: str) -> tuple[int, ...]:
        return _integers(name, text, "whole numbers with commas between")


class Names(Kind):
    """At least one of the named choices."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices, self.values = choices, ",".join(choices)

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: got {value!r}, expected a tuple of names out of {list(self.choices)}")
        for one in value:
            check_choice(name, one, self.choices)
        if not value:
            raise ValueError(f"{name}: got (), expected at least one of {list(self.choices)}")
        _check_each_once(name, value, "")
        return tuple(value)

    def read(self, name: str, text: str) -> tuple[str, ...]:
        return tuple(text.split(","))
