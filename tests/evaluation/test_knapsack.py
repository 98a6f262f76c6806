"""The knapsack against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bigain_kernels.evaluation.search.knapsack import least_error, most_saved


def total(table, choice):
    return sum(row[place] for row, place in zip(table, choice, strict=True) if place is not None)


def every_choice(table):
    return itertools.product(*([None, *range(len(row))] for row in table))


def tables(seed):
    """Errors and savings of up to four options of up to five groups; a few are below zero, and a few equal."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 5, random.integers(1, 6))
    scale = 10.0 ** random.integers(-6, 4)
    errors, savings = ([(random.integers(-2, 9, n) / 8).tolist() for n in sizes] for _ in range(2))
    return [[scale * value for value in row] for row in errors], savings


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_better(seed):
    errors, savings = tables(seed)
    choices = list(every_choice(errors))
    for saving in sorted({total(savings, choice) for choice in choices} | {0.01}):
        allowed = [choice for choice in choices if total(savings, choice) >= saving - 1e-9]
        if not allowed:
            continue
        found = least_error(errors, savings, saving)
        assert total(savings, found) >= saving - 1e-6
        assert total(errors, found) == pytest.approx(min(total(errors, choice) for choice in allowed), rel=1e-6)
    size = max((abs(value) for row in errors for value in row), default=1.0)
    for budget in (0.0, 0.3 * size, size, 10 * size):
        allowed = [choice for choice in choices if total(errors, choice) <= budget + 1e-9 * size]
        found = most_saved(errors, savings, budget)
        assert total(errors, found) <= budget + 1e-6 * size
        assert total(savings, found) == pytest.approx(max(total(savings, choice) for choice in allowed), rel=1e-6)


def test_what_cannot_be_reached_is_refused_with_what_can():
    errors, savings = [[1.0, 2.0], [3.0]], [[0.1, 0.25], [0.125]]
    assert least_error(errors, savings, 0.375) == [1, 0]
    with pytest.raises(ValueError, match=r"saving: got 0.4, expected at most 0.375"):
        least_error(errors, savings, 0.4)
    with pytest.raises(ValueError, match=r"budget: got -1, expected at least -0.5"):
        most_saved([[-0.5], [2.0]], [[0.1], [0.1]], -1)
    with pytest.raises(ValueError, match=r"savings: got rows of \[1, 1\] options, expected \[2, 1\]"):
        least_error(errors, [[1.0], [1.0]], 0.5)


def test_nothing_is_chosen_where_nothing_is_worth_it():
    assert most_saved([[0.0], [0.1]], [[-0.1], [-0.2]], 5.0) == [None, None]
    assert least_error([[], []], [[], []], 0.0) == [None, None]
