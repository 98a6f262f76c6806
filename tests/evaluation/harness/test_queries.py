"""Queries against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bigain_kernels.evaluation.harness.errors import ImageErrors
from bigain_kernels.evaluation.harness.queries import Outcomes, outcomes
from bigain_kernels.evaluation.harness.rules import Stages


def _outcomes(scores: list[list[float]], labels: list[tuple[int, ...]]) -> Outcomes:
    table = np.array(scores)
    n, classes = table.shape
    return Outcomes(
        tuple(map(str, range(n))),
        tuple(labels),
        table.argsort(axis=1),
        table,
        np.arange(classes),
        np.ones(n),
        np.ones(n),
    )


def test_accuracy_by_rank_and_by_class() -> None:
    found = _outcomes([[0, 1, 2], [0, 1, 2], [2, 1, 0], [1, 0, 2]], [(0,), (1,), (2,), (2,)])
    assert [found.top(k).value for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
    assert {c: f.value for c, f in found.per_class().items()} == {0: 1.0, 1: 0.0, 2: 0.5}
    assert found.top(3).low == pytest.approx(0.510, abs=1e-3)


def test_several_labels_count_when_one_is_hit() -> None:
    found = _outcomes([[0, 1, 2], [0, 1, 2]], [(0, 2), (1, 2)])
    assert found.correct.tolist() == [True, False]


def test_average_precision_is_the_one_worked_out_by_hand() -> None:
    # Class 0 ranks images 0, 1, 2, 3 and has 0 and 2: (1 + 2/3) / 2. Class 1 ranks 3, 2, 1, 0 and has 3: 1.
    found = _outcomes([[0.0, 3], [0.1, 2], [0.2, 1], [0.3, 0]], [(0,), (), (0,), (1,)])
    assert found.mean_average_precision() == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_calibration_finds_the_temperature_that_made_the_labels() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(4000, 5))
    p = np.exp(-scores / 0.5)
    p /= p.sum(axis=1, keepdims=True)
    labels = [(int(random.choice(5, p=row)),) for row in p]
    error, temperature = _outcomes(scores.tolist(), labels).calibration()
    assert temperature == pytest.approx(0.5, rel=0.1)
    assert error < 0.03
    wrong = [((label + 1) % 5,) for (label,) in labels]
    assert _outcomes(scores.tolist(), wrong).calibration()[1] > 2


def test_what_the_rows_cannot_answer_is_refused() -> None:
    errors = ImageErrors(np.arange(2), np.array([5]), np.ones((3, 1, 2), dtype=np.float32))
    with pytest.raises(ValueError, match=r"^rule: got one that asks"):
        outcomes([("a", (0,), errors, 1.0)], Stages(((2, 1),)))
    with pytest.raises(ValueError, match=r"^rows: got no images"):
        outcomes([], Stages(((2, 1),)))


def test_a_class_that_was_never_asked_about_is_never_likely() -> None:
    nan = float("nan")
    found = _outcomes([[0, 1, nan], [1, 0, nan], [nan, 1, 0], [nan, 1, 0]], [(0,), (1,), (2,), (0,)])
    # As rows have them, in float32; and the last image's class was dropped unasked.
    found = replace(found, scores=found.scores.astype(np.float32))
    assert found.probabilities(1.0)[0, 2] == 0
    assert found.probabilities(1.0).sum(axis=1) == pytest.approx(1)
    with np.errstate(divide="raise", invalid="raise"):
        error, temperature = found.calibration()
    assert 0 <= error <= 1
    assert temperature > 0
