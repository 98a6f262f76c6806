"""One option or none for each group: the knapsack with several choices, solved exactly as an integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Table = Sequence[Sequence[float]]


def least_error(errors: Table, savings: Table, saving: float) -> list[int | None]:
    """The choice of least error that saves enough.

    Args:
        errors, savings: of each option of each group; errors may be negative, and so may savings.
        saving: what the sum of the savings must reach.

    Returns:
        For each group the index of its option, or None for none, which costs and saves nothing.

    Raises:
        ValueError: no choice saves so much; the message says how much one does.
    """
    most = sum(max([0.0, *row]) for row in savings)
    if most < saving:
        raise ValueError(f"saving: got {saving:.6g}, expected at most {most:.6g}, what the options save together")
    return _solve(errors, savings, saving, float("inf"))


def most_saved(errors: Table, savings: Table, budget: float) -> list[int | None]:
    """The choice that saves most with errors whose sum is at most `budget`; see `least_error`.

    Raises:
        ValueError: even the least sum of errors is above `budget`.
    """
    least = sum(min([0.0, *row]) for row in errors)
    if least > budget:
        raise ValueError(f"budget: got {budget:.6g}, expected at least {least:.6g}, the least sum of errors")
    return _solve([[-value for value in row] for row in savings], errors, float("-inf"), budget)


def _solve(costs: Table, weights: Table, low: float, high: float) -> list[int | None]:
    """Least cost with `low` <= sum of weights <= `high`; such a choice must exist."""
    if [len(row) for row in costs] != [len(row) for row in weights]:
        raise ValueError(
            f"savings: got rows of {[len(row) for row in weights]} options, expected {[len(row) for row in costs]}"
        )
    chosen: list[int | None] = [None] * len(costs)
    if not any(costs):
        return chosen
    cost, weight = (np.concatenate([np.asarray(row, dtype=float) for row in table]) for table in (costs, weights))
    # The solver's tolerances are absolute: both are brought to about 1.
    cost /= np.abs(cost).max(initial=0.0) or 1.0
    scale = np.abs(weight).max(initial=0.0) or 1.0
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    once = np.equal.outer(np.arange(len(costs)), owner).astype(float)
    found = milp(
        cost,
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(once, -np.inf, 1),
            LinearConstraint(weight[None] / scale, low / scale, high / scale),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"knapsack: {found.message}")
    first = np.concatenate([[0], np.cumsum([len(row) for row in costs])])
    for place in np.flatnonzero(found.x > 0.5):
        chosen[owner[place]] = int(place - first[owner[place]])
    return chosen
