"""The points of the demo's frontier: methods with their options, in the order of its tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..methods import CompressionConfig, MergeConfig
from ..methods.registry import make_config

RATIOS = (0.3, 0.5, 0.7)
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
    """

    title: str
    method: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    ours: bool = False

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

    def compression(self, rows: int = 0) -> CompressionConfig | None:
        """The config of it; `rows`: how many rows belong together, where there are any."""
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


def points_of(blocks: tuple[int, ...] = ()) -> tuple[Point, ...]:
    """All points, first none; with `blocks`, also those that compress these blocks alone."""
    found = [NONE]
    for title, method, ours in (("ToMe", "tome", False), ("L-GTM", "lgtm", True)):
        found += [Point(f"{title} {ratio:g}", method, {"ratio": ratio}, ours=ours) for ratio in RATIOS]
        weighed = [
            Point(f"{title} {ratio:g}, proportional", method, {"ratio": ratio, "proportional": True}, ours=ours)
            for ratio in RATIOS
        ]
        found += weighed
        if ours:
            found += [replace(point, title=f"{point.title}, shared", shared=True) for point in weighed]
    found += [Point(f"ABM {ratio:g}", "abm", {"ratio": ratio}, ours=True) for ratio in (0.5, STRESS)]
    found += [
        Point("ToDo 2", "todo", {"factor": 2}),
        Point("average pooling 2", "avgpool", {"factor": 2}),
        *(Point(f"IE-KVD {factor}", "iekvd", {"factor": factor, "alpha": 0.9}, ours=True) for factor in (2, 4)),
    ]
    if blocks:
        where = f", blocks {' and '.join(map(str, blocks))}"
        some = [p for p in found if p.options.get("proportional", p.options.get("factor") == 2)]
        found += [replace(p, title=p.title + where, options={**p.options, "blocks": blocks}) for p in some]
    return tuple(found)


BY_KEY = {point.key: point for point in points_of()}
