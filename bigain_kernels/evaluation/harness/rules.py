"""Rules: which classes are asked about which noise samples next, decided from the errors of one image alone.

A rule keeps nothing: what it asks and whom it drops follows from the errors, so a decision can be taken again from
rows on disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from .errors import METRICS, ImageErrors, scores

# More noise samples of one image than anybody waits for.
MOST_SAMPLES = 10**5


class Question(NamedTuple):
    """Samples `first` to `last` (excluded), of the classes at `places` (k,) among those of the errors, ascending."""

    first: int
    last: int
    places: np.ndarray


class Standing(NamedTuple):
    """Where an image stands: what to ask next, None when decided, and the places of all classes, likeliest first.

    A class that was dropped stands behind all that were dropped later, whatever its score.
    """

    question: Question | None
    ranking: np.ndarray


class Rule(Protocol):
    """How an image is decided."""

    def standing(self, errors: ImageErrors) -> Standing:
        """From the errors so far to the next question."""
        ...

    def check(self, classes: int) -> None:
        """ValueError if it cannot decide between so many classes."""
        ...


def _order(errors: ImageErrors, places: np.ndarray, score: str, metric: str) -> np.ndarray:
    """`places` by score, ties in their order."""
    return places[np.argsort(scores(errors, score, metric)[places], kind="stable")]


def check_stages(stages: tuple[tuple[int, int], ...]) -> None:
    """ValueError unless samples grow and keeps fall to one."""
    samples, keeps = [s for s, _ in stages], [k for _, k in stages]
    if samples and max(samples) > MOST_SAMPLES:
        raise ValueError(f"stages: got {max(samples)} samples, expected at most {MOST_SAMPLES}")
    growing = all(a < b for a, b in pairwise([0, *samples]))
    shrinking = all(a > b for a, b in pairwise(keeps))
    if not (stages and growing and shrinking and keeps[-1] == 1):
        raise ValueError(
            f"stages: got {stages}, expected (samples, keep) pairs with growing samples and falling keep, "
            "the last keep being 1"
        )


@dataclass(frozen=True)
class Stages:
    """The classes left are brought to `samples` samples in all and the best `keep` stay, for each pair in turn."""

    stages: tuple[tuple[int, int], ...]
    score: str = "mean"
    metric: str = "l2"

    def __post_init__(self) -> None:
        check_stages(self.stages)

    def check(self, classes: int) -> None:
        if self.stages[0][1] > classes:
            raise ValueError(f"stages: got keep {self.stages[0][1]}, expected at most {classes} classes")

    def standing(self, errors: ImageErrors) -> Standing:
        alive, behind, done = np.arange(len(errors.classes)), np.zeros(0, dtype=np.int64), 0
        for samples, keep in self.stages:
            if errors.samples < samples:
                return Standing(Question(max(done, errors.samples), samples, alive), np.concatenate([alive, behind]))
            order = _order(errors.head(samples), alive, self.score, self.metric)
            alive, behind, done = np.sort(order[:keep]), np.concatenate([order[keep:], behind]), samples
        return Standing(None, np.concatenate([alive, behind]))


@dataclass(frozen=True)
class Groups:
    """Hierarchical pruning: some classes of each group stand for it, the best groups are asked about in full.

    Args:
        groups: of each class its group, numbered from 0.
        representatives: classes of a group that are asked about first, those with the lowest places.
        samples: of each of them.
        keep: groups that stay, by the best score among their representatives.
        then: decides among the classes of those; the samples of the first step count for it, and it asks the others
            about them.
    """

    groups: tuple[int, ...]
    representatives: int
    samples: int
    keep: int
    then: Stages

    def check(self, classes: int) -> None:
        count = len(set(self.groups))
        if len(self.groups) != classes or set(self.groups) != set(range(count)):
            raise ValueError(
                f"groups: got {len(self.groups)} groups from {min(self.groups, default=0)} to "
                f"{max(self.groups, default=0)}, expected one from 0 on for each of {classes} classes"
            )
        if not 1 <= self.keep <= count:
            raise ValueError(f"keep: got {self.keep}, expected 1 to {count} groups")
        for name in ("representatives", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.samples > self.then.stages[0][0]:
            raise ValueError(
                f"samples: got {self.samples}, expected at most those of the first stage, {self.then.stages[0][0]}"
            )
        # Whatever groups stay, the stages must find as many classes as they keep first.
        smallest = sorted(np.bincount(self.groups))[: self.keep]
        self.then.check(int(sum(smallest)))

    def standing(self, errors: ImageErrors) -> Standing:
        groups = np.asarray(self.groups)
        members = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
        asked = np.sort(np.concatenate([m[: self.representatives] for m in members]))
        everything = np.arange(len(groups))
        if errors.samples < self.samples:
            return Standing(Question(0, self.samples, asked), everything)
        head = errors.head(self.samples)
        # Only the representatives: what was asked later of the others must not change this step.
        only = np.full_like(head.values, np.nan)
        only[..., asked] = head.values[..., asked]
        first = scores(ImageErrors(head.classes, head.timesteps, only), self.then.score, self.then.metric)
        order = np.argsort([first[m[: self.representatives]].min() for m in members], kind="stable")
        chosen = np.sort(np.concatenate([members[g] for g in order[: self.keep]]))
        behind = np.concatenate([members[g] for g in order[self.keep :]] or [np.zeros(0, dtype=np.int64)])
        new = np.setdiff1d(chosen, asked)
        if len(new) and np.isnan(errors.values[0, 0, new[0]]):
            return Standing(Question(0, self.samples, new), np.concatenate([chosen, behind]))
        among = ImageErrors(errors.classes[chosen], errors.timesteps, errors.values[..., chosen])
        question, ranking = self.then.standing(among)
        if question is not None:
            question = question._replace(places=chosen[question.places])
        return Standing(question, np.concatenate([chosen[ranking], behind]))


@cache
def _student(level: float, freedom: int) -> float:
    """What Student's t exceeds with a probability of `level`."""
    from scipy.stats import t

    return float(t.isf(level, freedom))


def _unit_means(errors: ImageErrors, unit: int, metric: str) -> np.ndarray:
    """(U, K): the mean of each whole pass of `unit` samples."""
    values = errors.values[METRICS.index(metric)].astype(np.float64)
    units = errors.samples // unit
    return values[: units * unit].reshape(units, unit, values.shape[1]).mean(axis=1)


@dataclass(frozen=True)
class SequentialHalving:
    """Half of the classes left stay in each round, and each round has the same part of the budget.

    Karnin, Koren and Somekh, "Almost Optimal Exploration in Multi-Armed Bandits", 2013. A round asks about whole passes
    of `unit` samples, one at each timestep, so that the passes of an image are draws of one distribution. With
    differences of a pass that are sub-Gaussian with deviation 1 and gaps d_2 <= d_3 <= ... to the best class, it is
    missed with a probability of at most `error_bound`.

    Args:
        budget: class evaluations of an image in all, about.
        unit: samples of a pass.
    """

    budget: int
    unit: int = 1
    metric: str = "l2"

    def check(self, classes: int) -> None:
        if self.unit < 1:
            raise ValueError(f"unit: got {self.unit}, expected at least 1")
        least = classes * self.unit * max(1, math.ceil(math.log2(max(classes, 1))))
        if not least <= self.budget <= classes * MOST_SAMPLES:
            raise ValueError(f"budget: got {self.budget}, expected {least} to {classes * MOST_SAMPLES}")

    def standing(self, errors: ImageErrors) -> Standing:
        alive, behind, done = np.arange(len(errors.classes)), np.zeros(0, dtype=np.int64), 0
        rounds = math.ceil(math.log2(len(alive))) if len(alive) > 1 else 0
        for _ in range(rounds):
            last = done + self.unit * max(1, self.budget // (len(alive) * rounds * self.unit))
            if errors.samples < last:
                return Standing(Question(done, last, alive), np.concatenate([alive, behind]))
            order = _order(errors.head(last), alive, "mean", self.metric)
            keep = math.ceil(len(alive) / 2)
            alive, behind, done = np.sort(order[:keep]), np.concatenate([order[keep:], behind]), last
        return Standing(None, np.concatenate([alive, behind]))

    def error_bound(self, gaps: np.ndarray) -> float:
        """3 log2 K exp(-B / (8 H log2 K)), H the largest i / d_i^2 over i = 2..K, B passes in all."""
        gaps = np.sort(np.asarray(gaps, dtype=np.float64))
        classes = len(gaps) + 1
        hardness = float((np.arange(2, classes + 1) / gaps**2).max())
        rounds = math.log2(classes)
        return min(1.0, 3 * rounds * math.exp(-self.budget / self.unit / (8 * hardness * rounds)))


@dataclass(frozen=True)
class Racing:
    """A class is dropped once another is better beyond doubt, and the image is decided when one class is left.

    After each pass of `unit` samples, one at each timestep, the differences of two classes over the passes, which share
    their noise, are tested by Student's t. The class with the smallest expected error is dropped by mistake with a
    probability of at most `error`, whatever the number of classes: each of (classes - 1) x passes tests in which it
    could go has an equal part of that. This holds where the differences of passes are normal.

    Args:
        most: passes at most; then the smallest mean wins, a decision without a bound.
        error: of dropping the best class of an image.
        unit: samples of a pass.
        least: passes before the first test.
    """

    most: int
    error: float = 0.05
    unit: int = 1
    least: int = 2
    metric: str = "l2"

    def check(self, classes: int) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error: got {self.error}, expected more than 0 and less than 1")
        if self.unit < 1:
            raise ValueError(f"unit: got {self.unit}, expected at least 1")
        if not 2 <= self.least <= self.most <= MOST_SAMPLES // self.unit:
            raise ValueError(f"least: got {self.least} of {self.most} passes, expected 2 <= least <= most")

    def standing(self, errors: ImageErrors) -> Standing:
        places = np.arange(len(errors.classes))
        alive, behind = places, np.zeros(0, dtype=np.int64)
        means = _unit_means(errors, self.unit, self.metric)
        tests = max(1, len(places) - 1) * (self.most - self.least + 1)
        for units in range(self.least, self.most + 1):
            last = units * self.unit
            if len(alive) == 1:
                break
            if errors.samples < last:
                first = 0 if units == self.least else last - self.unit
                return Standing(Question(first, last, alive), np.concatenate([alive, behind]))
            seen = means[:units, alive]
            order = np.argsort(seen.mean(axis=0), kind="stable")
            margin = seen - seen[:, order[:1]]
            deviation = margin.std(axis=0, ddof=1) / math.sqrt(units)
            bound = _student(self.error / tests, units - 1) * deviation
            out = margin.mean(axis=0) > bound
            out[order[0]] = False
            dropped = alive[order[out[order]]]
            alive, behind = alive[~out], np.concatenate([dropped, behind])
        final = _order(errors, alive, "mean", self.metric)
        return Standing(None, np.concatenate([final, behind]))
