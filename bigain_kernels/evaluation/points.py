"""The points of the demo's frontier: methods with their options, in the order of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..methods import MergeConfig
from ..methods.mixed import Compression
from ..methods.registry import make_config

RATIOS = (0.3, 0.5, 0.7)
# Where only blocks are compressed that bear it.
_RATIOS_IN_BLOCKS = (0.5, 0.6, 0.7)
SEARCHED = "found by search"
# The ratio of the paper's tables, where merging is to hurt.
STRESS = 0.7


@dataclass(frozen=True)
class Point:
    """A method as it is applied.

    Attributes:
        title: what it is called in tables.
        method, options: of `make_config`; "none" is no compression.
        shared: one plan for the rows that belong together: all classes of an image, or a pair of guidance.
        ours: proposed by BiGain or added by this project, as opposed to what was there before.
        config: what `bigain search` found, in place of `method` and `options`.
    """

    title: str
    method: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    ours: bool = False
    config: Compression | None = None

    @property
    def key(self) -> str:
        """A name for files and for the eye: "lgtm_0.5_proportional_shared"."""
        parts = [self.method]
        for name, value in self.options.items():
            if name == "blocks":
                parts.append("blocks" + "".join(map(str, value)))
            else:
                parts.append(name if value is True else f"{value:g}")
        return "_".join([*parts, *(["shared"] if self.shared else [])])

    def compression(self, rows: int = 0) -> Compression | None:
        """The config of it; `rows`: how many rows belong together, where there are any."""
        if self.config is not None:
            return self.config
        if self.method == "none":
            return None
        config = make_config(self.method, self.options)
        if self.shared and rows > 1:
            assert isinstance(config, MergeConfig)
            return replace(config, share_plan=rows)
        return config

    @property
    def stress(self) -> bool:
        return self.options.get("ratio") == STRESS

    @property
    def merges(self) -> bool:
        return isinstance(self.compression(), MergeConfig)


NONE = Point("none")


def points_of(blocks: tuple[int, ...] = (), searched: Compression | None = None) -> tuple[Point, ...]:
    """All points, first none; with `blocks`, also those that compress these blocks alone; last, what a search found."""
    found = [NONE]
    for title, method, ours in (("ToMe", "tome", False), ("L-GTM", "lgtm", True)):
        found += [Point(f"{title} {ratio:g}", method, {"ratio": ratio}, ours=ours) for ratio in RATIOS]
        found += _weighed(title, method, ours, RATIOS)
    found += [Point(f"ABM {ratio:g}", "abm", {"ratio": ratio}, ours=True) for ratio in (0.5, STRESS)]
    found += [
        Point("ToDo 2", "todo", {"factor": 2}),
        Point("average pooling 2", "avgpool", {"factor": 2}),
        *(Point(f"IE-KVD {factor}", "iekvd", {"factor": factor, "alpha": 0.9}, ours=True) for factor in (2, 4)),
    ]
    if blocks:
        where = f", blocks {' and '.join(map(str, blocks))}"
        some = _weighed("ToMe", "tome", False, _RATIOS_IN_BLOCKS) + _weighed("L-GTM", "lgtm", True, _RATIOS_IN_BLOCKS)
        some += [p for p in found if p.options.get("factor") == 2]
        found += [replace(p, title=p.title + where, options={**p.options, "blocks": blocks}) for p in some]
    if searched is not None:
        found.append(Point(SEARCHED, "searched", ours=True, config=searched))
    return tuple(found)


def _weighed(title: str, method: str, ours: bool, ratios: Sequence[float]) -> list[Point]:
    """Proportional at each ratio; of ours also with shared plans."""
    found = [
        Point(f"{title} {ratio:g}, proportional", method, {"ratio": ratio, "proportional": True}, ours=ours)
        for ratio in ratios
    ]
    if ours:
        found += [replace(point, title=f"{point.title}, shared", shared=True) for point in found]
    return found


BY_KEY = {point.key: point for point in points_of()}
