"""Scores against numbers worked out by hand, and against what was wrong with simpler ones."""

from __future__ import annotations

import numpy as np
import pytest

from bigain_kernels.evaluation.harness.errors import ImageErrors, scores

NAN = float("nan")


def table(rows: list[list[float]], timesteps: list[int]) -> ImageErrors:
    values = np.array([rows] * 3, dtype=np.float32)
    return ImageErrors(np.arange(values.shape[2]), np.array(timesteps), values)


def test_mean_is_that_of_what_was_asked() -> None:
    found = scores(table([[1, 2, 3], [3, NAN, 5]], [100, 300]))
    np.testing.assert_allclose(found, [2, 2, 4])
    assert np.isnan(scores(table([[1, NAN]], [100]))[1])


def test_each_metric_has_its_own_score() -> None:
    values = np.array([[[1.0, 2.0]], [[4.0, 3.0]], [[5.0, 7.0]]], dtype=np.float32)
    errors = ImageErrors(np.arange(2), np.array([7]), values)
    for metric, expected in zip(("l2", "l1", "huber"), values[:, 0], strict=True):
        np.testing.assert_array_equal(scores(errors, "mean", metric), expected)


def test_standardised_gives_every_timestep_the_same_say() -> None:
    low, high = [10.0, 20.0, 60.0], [0.6, 0.2, 0.1]
    found = scores(table([low, high], [100, 900]), "standardised")
    z = [(np.array(row) - np.mean(row)) / np.std(row, ddof=1) for row in (low, high)]
    np.testing.assert_allclose(found, np.mean(z, axis=0), rtol=1e-5)
    # Two samples of one timestep have one say together.
    again = scores(table([low, low, high], [100, 100, 900]), "standardised")
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_two_survivors_weigh_by_how_much_they_differ() -> None:
    """Standardised among themselves they would stand 0.7 deviations apart each time, whatever they differ by."""
    first = [1.0, 1.2, 2.0, 3.0]

    def lead(difference: float) -> float:
        found = scores(table([first, [1 + difference, 1, NAN, NAN]], [100, 300]), "standardised")
        return float(found[1] - found[0])

    early = lead(0.0)
    assert early > 0
    assert lead(0.02) == pytest.approx(early, abs=0.05)
    assert lead(0.5) < 0


def test_samples_of_a_timestep_seen_before_keep_its_spread() -> None:
    wide = [1.0, 2.0, 5.0]
    spread = np.std(wide, ddof=1)
    found = scores(table([wide, [1.5, 1.0, NAN]], [100, 100]), "standardised")
    z = (np.array(wide) - np.mean(wide)) / spread
    np.testing.assert_allclose(found[0], (z[0] + 0.25 / spread) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[2], z[2], rtol=1e-5)


def test_common_leaves_what_all_were_asked() -> None:
    errors = table([[1, 2], [3, NAN], [5, 6]], [1, 2, 3])
    assert errors.common().timesteps.tolist() == [1, 3]
    assert errors.head(2).samples == 2


@pytest.mark.parametrize("arguments", [("median",), ("mean", "l3")])
def test_unknown_names_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        scores(table([[1, 2]], [1]), *arguments)
