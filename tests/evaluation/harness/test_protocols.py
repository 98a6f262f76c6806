"""Protocols by name, against the formula that the published classifier was run by."""

from __future__ import annotations

import pytest

from bigain_kernels.evaluation.harness.protocols import protocol, published_timesteps
from bigain_kernels.evaluation.harness.rules import Stages


def _published(samples: tuple[int, ...], steps: int = 1000) -> list[int]:
    """The formula, written out: start in the middle of the first of `most` parts, and thin out from the middle."""
    most = max(samples)
    to_evaluate = list(range(steps // most // 2, steps, steps // most))[:most]
    order: list[int] = []
    for n in samples:
        chosen = to_evaluate[len(to_evaluate) // n // 2 :: len(to_evaluate) // n][:n]
        order += [t for t in chosen if t not in order]
    return order


@pytest.mark.parametrize("samples", [(5, 20), (20,), (1, 2, 4), (50, 500), (4, 20, 100)])
def test_timesteps_are_those_of_the_published_formula(samples: tuple[int, ...]) -> None:
    found = list(published_timesteps(samples))
    assert len(found) == len(set(found)) == samples[-1]
    assert found == _published(samples)


def test_the_schedule_of_the_paper() -> None:
    assert published_timesteps((5, 20)) == (
        *(125, 325, 525, 725, 925),
        *(25, 75, 175, 225, 275, 375, 425, 475, 575, 625, 675, 775, 825, 875, 975),
    )
    found = protocol("paper", 37)
    assert found.rule == Stages(((5, 5), (20, 1)), "mean", "l2")
    assert found.plans == "own"
    assert found.transform == "paper"


def test_ours_takes_plans_of_the_null_prompt_where_there_are_any() -> None:
    assert protocol("ours", 100, merges=True).plans == "null"
    assert protocol("ours", 100).plans == "own"


def test_rules_fit_any_number_of_classes() -> None:
    for name in ("paper", "ours"):
        for classes in (1, 2, 4, 5, 10, 1000):
            protocol(name, classes).rule.check(classes)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^protocol: got"):
        protocol("theirs", 5)
    with pytest.raises(ValueError, match=r"^samples: got"):
        published_timesteps((3, 20))
