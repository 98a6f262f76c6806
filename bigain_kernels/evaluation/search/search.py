"""The search: each block under each candidate alone, then the knapsack, then one look at what came of it.

Rises of the denoising error and fractions of the time are taken to add up over blocks. They do not quite: what is found
is measured as a whole, on the images it was found with and on others, beside the same method everywhere at equal time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...methods import CompressionConfig, MergeConfig
from ...methods.mixed import Compression
from ..denoisers import Denoiser
from ..harness.deciding import digest
from ..metrics import Measured
from .knapsack import least_error, most_saved
from .measuring import Measurements, Meter, Samples
from .space import Group, everywhere, put_together
from .turns import TurnFile

FOUND = "found"
# What is as fast as this fraction of another is called as fast.
SAME_SPEED = 0.98


@dataclass(frozen=True)
class Goal:
    """What is looked for: the least error at `speed` times the speed, or the most speed at which the error rises by at
    most the fraction `error` of that of the model as it is.

    Raises:
        ValueError: not exactly one of the two is given, or it is out of range.
    """

    speed: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.speed is None) == (self.error is None):
            raise ValueError(f"speed: got {self.speed} with error {self.error}, expected one of the two")
        if self.speed is not None and not 1 < self.speed < float("inf"):
            raise ValueError(f"speed: got {self.speed}, expected more than 1, such as 1.3")
        if self.error is not None and not 0 < self.error < float("inf"):
            raise ValueError(f"error: got {self.error}, expected more than 0, such as 0.02 for 2 %")

    def __str__(self) -> str:
        if self.speed is not None:
            return f"the least error at {self.speed:g}x the speed"
        return f"the most speed at which the error rises by at most {self.percent:g} %"

    @property
    def percent(self) -> float:
        """`error` in percent, infinity where there is none."""
        return float("inf") if self.error is None else 100 * self.error


@dataclass(frozen=True)
class Choice:
    """A candidate in a group, by itself: its rise of the error in percent and the fraction of the time it saves."""

    group: Group
    candidate: CompressionConfig
    rise: Measured
    saved: float


@dataclass(frozen=True)
class Row:
    """A config in the whole model, on held-out images: its rise in percent, its speed, and how much more it rises than
    what was found; `found` of the images that it was found with."""

    name: str
    config: Compression
    rise: Measured
    speed: float
    more: Measured


@dataclass(frozen=True)
class Result:
    """What a search came to.

    Attributes:
        goal: of the search.
        config: what was found.
        groups: all there are.
        chosen: what of them is compressed, and what that does alone.
        measured: everything that groups may be given.
        left_out: candidates that the model refuses, by group, with its words.
        predicted, verified: rise and speed by the sum, and of the whole on the images it was found with.
        found, others: of the whole on held-out images, and of the same everywhere; `others` take the time of `found`
            where some ratio does.
        seconds: of a pass of the model as it is.
    """

    goal: Goal
    config: Compression
    groups: tuple[Group, ...]
    chosen: tuple[Choice, ...]
    measured: tuple[Choice, ...]
    left_out: tuple[tuple[str, str, str], ...]
    predicted: tuple[float, float]
    verified: tuple[Measured, float]
    found: Row
    others: tuple[Row, ...]
    seconds: float

    @property
    def rivals(self) -> list[Row]:
        """Those of `others` that are as fast as what was found, the least error first."""
        fast = [row for row in self.others if row.speed >= self.found.speed * SAME_SPEED]
        return sorted(fast, key=lambda row: row.rise.value)


class Search:
    """A search in one model.

    Args:
        denoiser: the model.
        calibration: a few images to search with.
        held_out: others, to confirm it on.
        goal: what is looked for.
        groups, candidates: what is chosen from.
        timesteps: at which errors are taken.
        batch_size: rows of a forward pass, two of each image.
        seed: of the noise.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        calibration: Samples,
        held_out: Samples,
        goal: Goal,
        groups: Sequence[Group],
        candidates: Sequence[CompressionConfig],
        timesteps: Sequence[int],
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.goal, self.groups, self.candidates = goal, tuple(groups), tuple(candidates)
        self._few, self._more = (
            Meter(denoiser, samples, timesteps, batch_size, seed) for samples in (calibration, held_out)
        )

    @property
    def total(self) -> int:
        """Forward passes in all, at most."""
        alone, whole = len(self.groups) * (1 + len(self.candidates)), 2 + len(self.candidates)
        return len(self._few.turns) * (alone + whole) + len(self._more.turns) * whole

    def run(self, file: TurnFile, progress: Callable[[str, int], None] = lambda stage, passes: None) -> Result:
        """Do all the work.

        Args:
            file: has what was measured before, and is told what is measured now.
            progress: called with what is being done and how many more forward passes are done.

        Raises:
            ValueError: nothing that is offered meets the goal, by the sum; or an error is not finite.
        """
        offered, left_out = self._offers()
        alone = self._few.measure(
            "each alone",
            [{_key(group, each): group.config(each) for each in offered[group]} for group in self.groups],
            file,
            progress,
        )
        measured = self._choices(offered, alone)
        chosen = self._choose(measured)
        config = put_together([(choice.group, choice.candidate) for choice in chosen])
        same = [each for each in self.candidates if all(each in offered[group] for group in self.groups)]
        uniform = {each.brief(): everywhere(self.groups, each) for each in same}
        # What was measured of one config says nothing about another that was found with another goal.
        mark = digest(config.settings())
        whole = self._few.measure(f"together #{mark}", [{FOUND: config, **uniform}], file, progress)
        equal = self._equal_time(whole, same)
        held_out = self._more.measure(f"held out #{mark}", [{FOUND: config, **equal}], file, progress)

        def row(name: str, config: Compression) -> Row:
            return Row(name, config, held_out.rise(name), held_out.speed(name), held_out.rise(name, FOUND))

        saved = sum(choice.saved for choice in chosen)
        return Result(
            self.goal,
            config,
            self.groups,
            tuple(chosen),
            tuple(measured),
            tuple(left_out),
            (sum(choice.rise.value for choice in chosen), 1 / (1 - saved)),
            (whole.rise(FOUND), whole.speed(FOUND)),
            row(FOUND, config),
            tuple(row(name, each) for name, each in equal.items()),
            float(np.median(alone.seconds)),
        )

    def _offers(self) -> tuple[dict[Group, list[CompressionConfig]], list[tuple[str, str, str]]]:
        """The candidates that each group takes, and those that it refuses: a grid may be too small for a factor."""
        offered: dict[Group, list[CompressionConfig]] = {}
        refusals: dict[tuple[Any, CompressionConfig], str | None] = {}
        left_out = []
        # What fails without compression too is no refusal of a candidate.
        self._few.ask(0, None)
        for group in self.groups:
            for candidate in self.candidates:
                alike = (group.shape, candidate)
                if alike not in refusals:
                    refusals[alike] = self._refusal(group.config(candidate))
                reason = refusals[alike]
                if reason is None:
                    offered.setdefault(group, []).append(candidate)
                else:
                    offered.setdefault(group, [])
                    left_out.append((group.name, candidate.brief(), reason))
        if not any(offered.values()):
            raise ValueError(f"methods: got {left_out[0][1]} and others, expected one that fits ({left_out[0][2]})")
        return offered, left_out

    def _refusal(self, config: CompressionConfig) -> str | None:
        try:
            self._few.ask(0, config)
        except ValueError as error:
            return str(error)
        return None

    def _choices(self, offered: dict[Group, list[CompressionConfig]], alone: Measurements) -> list[Choice]:
        found = []
        for group in self.groups:
            # Blocks of one shape take one time, and more turns know it better.
            alike = [other for other in self.groups if other.shape == group.shape]
            for each in offered[group]:
                keys = [_key(other, each) for other in alike if each in offered[other]]
                found.append(Choice(group, each, alone.rise(_key(group, each)), alone.saved(*keys)))
        return found

    def _choose(self, measured: list[Choice]) -> list[Choice]:
        table = [[choice for choice in measured if choice.group == group] for group in self.groups]
        errors = [[choice.rise.value for choice in row] for row in table]
        savings = [[choice.saved for choice in row] for row in table]
        if self.goal.speed is not None:
            most = sum(max([0.0, *row]) for row in savings)
            if most < 1 - 1 / self.goal.speed:
                raise ValueError(
                    f"speed: got {self.goal.speed:g}, expected at most {1 / (1 - most):.3f}, the fastest that there is "
                    "by the sum of what blocks save"
                )
            picked = least_error(errors, savings, 1 - 1 / self.goal.speed)
        else:
            picked = most_saved(errors, savings, self.goal.percent)
        chosen = [row[place] for row, place in zip(table, picked, strict=True) if place is not None]
        if not chosen:
            saving = [choice for choice in measured if choice.saved > 0]
            if not saving:
                best = max(measured, key=lambda choice: choice.saved)
                raise ValueError(
                    f"methods: got none that saves time (the best, {best.candidate.brief()} in {best.group.name}, "
                    f"makes a pass {abs(100 * best.saved):.2g} % slower), expected candidates that do, or more tokens"
                )
            least = min(saving, key=lambda choice: choice.rise.value)
            raise ValueError(
                f"error: got {self.goal.error}, expected at least {least.rise.value / 100:.3g}, the least rise "
                "that there is among candidates that save time"
            )
        return chosen

    def _equal_time(self, whole: Measurements, same: Sequence[CompressionConfig]) -> dict[str, CompressionConfig]:
        """What to compare with: candidates everywhere; of methods that merge, with the ratio that takes equal time."""
        wanted, found = whole.saved(FOUND), {}
        by_method: dict[str, list[MergeConfig]] = {}
        for candidate in same:
            if isinstance(candidate, MergeConfig):
                by_method.setdefault(candidate.method, []).append(candidate)
            else:
                found[candidate.brief()] = everywhere(self.groups, candidate)
        for ladder in by_method.values():
            ratio = ratio_at([(_ratio(each), whole.saved(each.brief())) for each in ladder], wanted)
            config: Any = replace(ladder[0], ratio=min(ratio, largest_ratio(ladder[0])))
            found[config.brief()] = everywhere(self.groups, config)
        return found


def _key(group: Group, candidate: CompressionConfig) -> str:
    return f"{group.name}: {candidate.brief()}"


def _ratio(config: MergeConfig) -> float:
    assert isinstance(config.ratio, float)
    return config.ratio


def largest_ratio(config: MergeConfig) -> float:
    """The most that a merge method takes away, with three decimals."""
    sy, sx = config.stride
    return int(1000 * (1 - 1 / (sy * sx))) / 1000


def ratio_at(points: Sequence[tuple[float, float]], saved: float) -> float:
    """The ratio at which a fraction of the time is saved, on lines through (ratio, saved) points and (0, 0).

    What merging costs before it saves makes small ratios save nothing: only rising parts count. Beyond the last point
    the last line goes on. Three decimals.
    """
    ratios, savings = [0.0], [0.0]
    for ratio, value in sorted(points):
        if value > savings[-1]:
            ratios.append(ratio)
            savings.append(value)
    if len(ratios) == 1:
        return max(ratio for ratio, _ in points)
    if saved > savings[-1]:
        slope = (ratios[-1] - ratios[-2]) / (savings[-1] - savings[-2])
        return round(ratios[-1] + (saved - savings[-1]) * slope, 3)
    return round(float(np.interp(saved, savings, ratios)), 3)
