"""Plans that one forward pass makes and others use, so that all classes of an image are merged alike.

The errors of two classes are compared by a difference that is small beside what merging does to each. Where all of
them merge the same tokens, that cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...compat.published import published_lgtm_plan, published_tome_plan
from ...methods import MergeConfig
from ...methods.mixed import Compression
from ...plan import MergePlan
from ..compression import each_merging

# own: every row plans for itself. mean: the classes of a batch plan from their mean. null: what the null prompt plans
# is used by all classes, in as many batches as they need.
# published: by the rules of the published code, ToMe's random pattern once for a batch from a generator that moves on.
PLANS = ("own", "mean", "null", "published")


class PlanBook:
    """The plans of the layers of one forward pass, in the order in which the layers ask for them.

    Attributes:
        rows: P, rows of images and noise samples in a batch of k * P rows, class by class.
        generator: of random plans that are drawn call by call, see `restart`.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.generator = torch.Generator()
        self._plans: list[MergePlan] = []
        self._next: int | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Plans made inside are kept, in the place of earlier ones."""
        self._plans, self._next = [], None
        yield
        self._next = 0

    def restart(self, key: tuple[int, ...]) -> None:
        """Random plans begin anew, with those of `key`: what is asked next depends on nothing that was asked before."""
        self.generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))

    def rewind(self) -> None:
        """The next forward pass uses the plans from the first on."""
        self._next = 0

    def next(self, grid: tuple[int, int]) -> MergePlan:
        """The plan of the next layer.

        Raises:
            RuntimeError: the layers are not those of the pass that was recorded.
        """
        assert self._next is not None
        if self._next >= len(self._plans) or self._plans[self._next].grid != grid:
            raise RuntimeError(
                f"plan: layer {self._next} on a grid of {grid} asks for one, and the null prompt made "
                f"{len(self._plans)}: a forward pass took another way through the model"
            )
        self._next += 1
        return self._plans[self._next - 1]

    @property
    def is_recording(self) -> bool:
        return self._next is None

    def keep(self, plan: MergePlan) -> MergePlan:
        self._plans.append(plan)
        return plan


def with_kept_plans(compression: Compression | None, plans: str, book: PlanBook) -> Compression | None:
    """`compression` with plans that come from `book`.

    Args:
        compression: a config; None is no compression.
        plans: one of `PLANS`.
        book: whose `rows` say how a batch is made up, or which holds the plans to use.

    Raises:
        ValueError: there is no such way, or the method builds no plans and `plans` is not "own".
    """
    if plans not in PLANS:
        raise ValueError(f"plans: got {plans!r}, expected one of {list(PLANS)}")
    if plans == "own":
        return compression
    if plans == "published":
        return each_merging(compression, lambda part: _published(part, book), "plans")
    return each_merging(compression, lambda part: _kept(part, plans, book), "plans")


def _published(config: MergeConfig, book: PlanBook) -> MergeConfig:
    """`config` with the plans of the published code, which knows no window and no shared plans."""
    if (
        config.method not in ("tome", "lgtm")
        or config.share_plan is not None
        or getattr(config, "window", None) is not None
    ):
        raise ValueError(
            f"plans: got 'published' with {config}, expected tome or lgtm with no window and no share_plan"
        )

    def plan(self: Any, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        if config.method == "lgtm":
            return published_lgtm_plan(x, grid, ratio, self.stride)
        return published_tome_plan(x, grid, ratio, self.stride, book.generator)

    return _with_plan(config, plan)


def _with_plan(config: MergeConfig, plan: Any) -> MergeConfig:
    """A copy of `config` with another `plan`."""
    # A class of its own, not a function in its place: configs are frozen, and are copied by their class.
    base: type[MergeConfig] = type(config)
    kept: Any = type(base.__name__, (base,), {"plan": plan})
    options = {name: getattr(config, name) for name in (field.name for field in fields(config))}
    made: MergeConfig = kept(**{**options, "share_plan": None})
    return made


def _kept(config: MergeConfig, plans: str, book: PlanBook) -> MergeConfig:
    """`config` with plans that come from `book`."""
    base: type[MergeConfig] = type(config)

    def plan(self: Any, x: Tensor, grid: tuple[int, int], ratio: float, timestep: Tensor | None = None) -> MergePlan:
        if plans == "null":
            if not book.is_recording:
                return book.next(grid)
            return book.keep(base.plan(self, x, grid, ratio, timestep))
        assert book.rows is not None
        return base.plan(replace(self, share_plan=x.shape[0] // book.rows), x, grid, ratio, timestep)

    return _with_plan(config, plan)
