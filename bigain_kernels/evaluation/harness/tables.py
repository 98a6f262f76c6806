"""Tables of a report, and how their cells are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..metrics import Fraction, Measured


@dataclass(frozen=True)
class Line:
    """One method of a table: its cells, and its place in the plots."""

    title: str
    cells: list[str]
    points: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    heading: str
    columns: list[str]
    lines: list[Line]
    caption: str


def percent(value: Fraction) -> str:
    return f"{100 * value.value:.2f} ({100 * value.low:.2f} to {100 * value.high:.2f})"


def signed(value: float, low: float, high: float, scale: float = 100) -> str:
    return f"{scale * value:+.2f} ({scale * low:+.2f} to {scale * high:+.2f})"


def p_value(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def interval(value: Measured, digits: int = 3) -> str:
    """A number with its 95 % interval."""
    return "-" if math.isnan(value.value) else f"{value.value:.{digits}f} +- {1.96 * value.error:.{digits}f}"


def number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
