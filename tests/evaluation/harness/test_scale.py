"""A thousand classes and fifty thousand images: what that costs beside the model, planned and not run."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np

from bigain_kernels.evaluation.harness.engine import Answer
from bigain_kernels.evaluation.harness.errors import ImageErrors
from bigain_kernels.evaluation.harness.protocols import protocol
from bigain_kernels.evaluation.harness.queries import outcomes
from bigain_kernels.evaluation.harness.rows import read_rows, write_rows
from bigain_kernels.evaluation.harness.run import RunFolder, shard_slices

CLASSES, IMAGES, SHARD = 1000, 50_000, 16


def _answers(image: int, chosen: Any) -> list[Answer]:
    """What a model would say about one image, without a model."""
    random, errors, found = np.random.default_rng(image), ImageErrors.empty(np.arange(CLASSES)), []
    while (question := chosen.rule.standing(errors).question) is not None:
        times = np.asarray(chosen.timesteps[question.first : question.last])
        values = random.random((3, len(times), len(question.places)), dtype=np.float32)
        found.append(Answer(image, question.first, times, question.places, values, np.full(len(times), 1e-3)))
        errors = errors.with_samples(question.first, times, question.places, values)
    return found


def test_overhead_of_a_row_and_memory(tmp_path) -> None:
    chosen = protocol("paper", CLASSES)
    settings = {"classes": list(range(CLASSES))}
    tracemalloc.start()
    started = time.process_time()
    answers = [answer for image in range(SHARD) for answer in _answers(image, chosen)]
    images = [(f"val/{i:08d}.JPEG", (i,)) for i in range(SHARD)]
    write_rows(tmp_path / "a.parquet", settings, np.arange(CLASSES), images, answers)
    found = outcomes(read_rows(tmp_path / "a.parquet"), chosen.rule)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = SHARD * (5 * CLASSES + 15 * 5)
    assert found.evaluations.sum() == rows
    # Traced as they are here, allocations cost several times what they do in a run.
    assert seconds / rows < 1e-3
    # What is kept of an image, for all of them, and what a shard takes on the way.
    kept = (found.ranking.nbytes + found.scores.nbytes) / SHARD * IMAGES
    assert 2 * kept + peak < 2e9


def test_fifty_thousand_images_are_planned_at_once(tmp_path) -> None:
    slices = shard_slices(IMAGES, SHARD)
    assert slices[-1].stop == IMAGES
    folder = RunFolder(tmp_path, {"classes": list(range(CLASSES))}, len(slices))
    started = time.process_time()
    claims = folder.claims(rank=3000)
    assert [next(claims) for _ in range(3)] == [3000, 3001, 3002]
    assert folder.done() == 0
    claims.close()
    # Of the whole listing once; a shard that is done costs no look at the others.
    assert time.process_time() - started < 2
