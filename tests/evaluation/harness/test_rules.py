"""Rules on errors that are known: what they ask, whom they drop, and how often they are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from bigain_kernels.evaluation.harness.errors import ImageErrors
from bigain_kernels.evaluation.harness.rules import Groups, Racing, Rule, SequentialHalving, Stages


def play(rule: Rule, truth: np.ndarray, timesteps: list[int] | None = None) -> tuple[ImageErrors, np.ndarray, int]:
    """Answers a rule from (S, K) errors: what it knows at the end, its ranking, and how much it asked."""
    times = np.arange(len(truth)) if timesteps is None else np.array(timesteps)
    errors, asked = ImageErrors.empty(np.arange(truth.shape[1])), 0
    while (standing := rule.standing(errors)).question is not None:
        first, last, places = standing.question
        values = np.stack([truth[first:last, places]] * 3)
        asked += values[0].size
        errors = errors.with_samples(first, times[first:last], places, values.astype(np.float32))
        assert sorted(standing.ranking.tolist()) == list(range(truth.shape[1]))
    return errors, standing.ranking, asked


def test_stages_keep_the_best_and_ask_no_others() -> None:
    truth = np.array([[5, 1, 2, 9, 3]] * 2 + [[0, 4, 1, 0, 9]] * 8, dtype=float)
    errors, ranking, asked = play(Stages(((2, 3), (4, 1))), truth)
    assert asked == 2 * 5 + 2 * 3
    assert errors.asked[2:].tolist() == [[False, True, True, False, True]] * 2
    # 2 has mean 1.5, 1 has 2.5 and 4 has 6; those dropped first stand behind, 0 before 3.
    assert ranking.tolist() == [2, 1, 4, 0, 3]


def test_groups_ask_about_representatives_first() -> None:
    #                 group 0     group 1     group 2
    truth = np.array([[3, 9, 9, 1, 2, 9, 2, 9, 0.5]] * 4)
    rule = Groups((0, 0, 0, 1, 1, 1, 2, 2, 2), 1, 1, 2, Stages(((2, 2), (4, 1))))
    rule.check(9)
    errors, ranking, asked = play(rule, truth)
    assert errors.asked[0].tolist() == [True, False, False] + [True] * 6
    assert ranking[0] == 8
    # Class 1 and 2 of group 0 are never asked about; the best 2 of 6 are 8 and 3.
    assert asked == 3 + 4 + 6 + 2 * 2
    assert errors.asked[3].nonzero()[0].tolist() == [3, 8]


def test_sequential_halving_spends_its_budget_evenly() -> None:
    truth = np.tile(np.arange(8.0), (200, 1))
    rule = SequentialHalving(budget=240, unit=2)
    rule.check(8)
    errors, ranking, asked = play(rule, truth)
    assert ranking.tolist() == list(range(8))
    # 80 a round: 10 samples of 8, 20 of 4, 40 of 2.
    assert errors.samples == 70
    assert asked == 240


def _race(seed: int, gap: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(60, 1)) * 5
    truth = 10 + shared + random.normal(size=(60, 6))
    truth[:, 1:] += gap
    return truth


def test_racing_keeps_its_bound_where_classes_are_equal_in_truth() -> None:
    """Class 0 is the best by nothing: it is dropped in no more images than the bound says."""
    rule = Racing(most=12, error=0.2)
    lost = 0
    for seed in range(150):
        errors, _, _ = play(rule, _race(seed, 0.0))
        lost += not errors.asked[-1, 0]
    assert lost / 150 <= 0.2 + 2 * (0.2 * 0.8 / 150) ** 0.5


def test_racing_decides_early_where_noise_is_shared() -> None:
    rule = Racing(most=60, error=0.05)
    found = [play(rule, _race(seed, 3.0)) for seed in range(20)]
    assert all(ranking[0] == 0 for _, ranking, _ in found)
    # Without pairing, the shared noise of five deviations would hide a gap of three for the whole race.
    assert max(asked for _, _, asked in found) < 6 * 60 / 2


def test_racing_looks_at_whole_passes_over_the_timesteps() -> None:
    truth = np.tile(np.array([[1.0, 1.5], [9.0, 9.4]]), (8, 1)) + np.random.default_rng(0).normal(size=(16, 2)) * 0.01
    rule = Racing(most=8, error=0.1, unit=2)
    errors, ranking, _ = play(rule, truth)
    assert errors.samples % 2 == 0
    assert ranking[0] == 0


def test_a_bound_is_stated_for_halving() -> None:
    assert SequentialHalving(100).error_bound(np.array([0.1, 0.1])) == 1.0
    assert SequentialHalving(10000).error_bound(np.array([1.0, 1.0, 1.0])) < 1e-6


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("stages", Stages(((1, 7), (2, 1)))),
        ("groups", Groups((0, 1), 1, 1, 1, Stages(((2, 1),)))),
        ("keep", Groups((0, 0, 0, 1, 1, 1), 1, 1, 3, Stages(((2, 1),)))),
        ("samples", Groups((0, 0, 0, 1, 1, 1), 1, 3, 1, Stages(((2, 1),)))),
        ("budget", SequentialHalving(5)),
        ("error", Racing(5, error=0.0)),
        ("least", Racing(1)),
    ],
)
def test_what_does_not_fit_is_named(name: str, rule: Rule) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        rule.check(6)


def test_a_decision_can_be_taken_again_from_the_errors() -> None:
    truth = np.random.default_rng(1).random((60, 30))
    for rule in (Stages(((5, 5), (20, 1))), SequentialHalving(300), Racing(20, 0.1)):
        errors, ranking, _ = play(rule, truth)
        assert rule.standing(errors).ranking.tolist() == ranking.tolist()
        assert errors.asked[-1, ranking[0]]
