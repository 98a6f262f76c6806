"""Rules as an experiment writes them down: by name, with their parameters, checked like everything else of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .rules import Groups, Racing, Rule, SequentialHalving, Stages

Metric = Literal["l2", "l1", "huber"]
Score = Literal["mean", "standardised"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def make(self, classes: Sequence[Sequence[str]], timesteps: int) -> Rule:
        """The rule, for classes that go by these names each and a pass of so many timesteps."""
        raise NotImplementedError


class StagesOptions(_Strict):
    """See `rules.Stages`."""

    kind: Literal["stages"]
    stages: tuple[tuple[int, int], ...]
    score: Score = "mean"
    metric: Metric = "l2"

    def make(self, classes: Sequence[Sequence[str]], timesteps: int) -> Rule:
        return Stages(self.stages, self.score, self.metric)


class HalvingOptions(_Strict):
    """See `rules.SequentialHalving`; a pass is one sample at each timestep unless `unit` says otherwise."""

    kind: Literal["halving"]
    budget: int
    unit: int | None = None
    metric: Metric = "l2"

    def make(self, classes: Sequence[Sequence[str]], timesteps: int) -> Rule:
        return SequentialHalving(self.budget, timesteps if self.unit is None else self.unit, self.metric)


class RacingOptions(_Strict):
    """See `rules.Racing`; a pass is one sample at each timestep unless `unit` says otherwise."""

    kind: Literal["racing"]
    most: int
    error: float = 0.05
    unit: int | None = None
    least: int = 2
    metric: Metric = "l2"

    def make(self, classes: Sequence[Sequence[str]], timesteps: int) -> Rule:
        return Racing(self.most, self.error, timesteps if self.unit is None else self.unit, self.least, self.metric)


class GroupsOptions(_Strict):
    """See `rules.Groups`; groups are lists of classes, by name or as the data set calls them (a wnid)."""

    kind: Literal["groups"]
    groups: tuple[tuple[str, ...], ...] = Field(min_length=1)
    samples: int
    keep: int
    stages: tuple[tuple[int, int], ...]
    representatives: int = 1
    score: Score = "mean"
    metric: Metric = "l2"

    def make(self, classes: Sequence[Sequence[str]], timesteps: int) -> Rule:
        place = {name: i for i, names in enumerate(classes) for name in names}
        found: dict[int, int] = {}
        for number, group in enumerate(self.groups):
            for name in group:
                if name not in place:
                    raise ValueError(f"groups: got class {name!r}, expected one of the data set")
                if place[name] in found:
                    raise ValueError(f"groups: got class {name!r} twice, expected each class once")
                found[place[name]] = number
        left = [names[0] for i, names in enumerate(classes) if i not in found]
        if left:
            raise ValueError(f"groups: got none with {left[0]!r} and {len(left) - 1} others, expected each class once")
        groups = tuple(found[i] for i in range(len(classes)))
        then = Stages(self.stages, self.score, self.metric)
        return Groups(groups, self.representatives, self.samples, self.keep, then)


RuleOptions = Annotated[
    StagesOptions | HalvingOptions | RacingOptions | GroupsOptions,
    Field(discriminator="kind"),
]
