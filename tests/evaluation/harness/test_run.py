"""Runs over a data set: rows on disk, processes that share the work, and what is refused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from bigain_kernels.evaluation.harness.deciding import digest
from bigain_kernels.evaluation.harness.engine import Asking, Engine
from bigain_kernels.evaluation.harness.queries import Outcomes, outcomes
from bigain_kernels.evaluation.harness.rows import read_all, read_rows, shards_of, write_rows
from bigain_kernels.evaluation.harness.rules import Stages
from bigain_kernels.evaluation.harness.run import RunFolder, key_of, run_shards, shard_slices

from ..toys import PrototypeDenoiser
from .toy_images import ToyImages

RULE = Stages(((2, 3), (4, 1)))
SIZE = 4


def settings(**changed: Any) -> dict[str, Any]:
    return {"classes": list(range(5)), "seed": 0, "weights": "abc", **changed}


def run(folder: Path, images: Any = None, stop_after: int | None = None, **changed: Any) -> None:
    denoiser = PrototypeDenoiser(5)
    images = images or ToyImages(denoiser, 11)
    done: list[int] = []

    def record(count: int, rows: int) -> None:
        done.append(count)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    opened = RunFolder(folder, settings(**changed), len(shard_slices(len(images.paths), SIZE)))
    with Engine(denoiser, Asking(RULE, (100, 400, 700))) as engine:
        run_shards(opened, images, engine, lambda pixels: pixels, SIZE, record=record)


def found(*folders: Path) -> Outcomes:
    return outcomes(read_all(folders), RULE)


def contents(folder: Path) -> list[Any]:
    """All rows of a run but their time."""
    import pyarrow.parquet as pq

    return [pq.read_table(path).drop_columns("seconds").to_pydict() for path in shards_of([folder])]


def test_rows_hold_what_the_engine_found(tmp_path) -> None:
    denoiser = PrototypeDenoiser(5)
    images = ToyImages(denoiser, 11)
    run(tmp_path)
    with Engine(denoiser, Asking(RULE, (100, 400, 700))) as engine:
        expected = engine.ask(torch.stack([images.read(i) for i in range(4)]), [key_of(p) for p in images.paths[:4]])
    read = list(read_rows(tmp_path / "rows" / "000000.parquet"))
    assert [name for name, *_ in read] == images.paths[:4]
    for (_, labels, errors, seconds), truth, label in zip(read, expected, images.labels, strict=False):
        assert labels == label
        assert seconds > 0
        assert errors.timesteps.tolist() == truth.timesteps.tolist()
        np.testing.assert_array_equal(errors.values, truth.values)


def test_rows_have_the_columns_that_are_promised(tmp_path) -> None:
    import pyarrow.parquet as pq

    run(tmp_path)
    table = pq.read_table(tmp_path / "rows" / "000001.parquet")
    assert table.num_rows == 4 * (2 * 5 + 2 * 3)
    row = table.slice(0, 1).to_pylist()[0]
    assert row["path"] == "folder/004.png"
    assert row["labels"] == [4]
    assert {name: str(table.schema.field(name).type) for name in ("l2", "sample", "timestep")} == {
        "l2": "float",
        "sample": "int32",
        "timestep": "int32",
    }
    assert row["decided_by"] == digest(settings())


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(tmp_path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=2)
    assert len(shards_of([tmp_path / "cut"])) == 2
    before = {path: path.stat().st_mtime_ns for path in shards_of([tmp_path / "cut"])}
    # What a kill in the middle of writing leaves.
    (tmp_path / "cut" / "rows" / ".123-000002.parquet").write_bytes(b"PAR1")
    run(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_two_at_work_share_the_shards(tmp_path) -> None:
    run(tmp_path / "whole")
    folder = tmp_path / "shared"
    opened = [RunFolder(folder, settings(), 3) for _ in range(2)]
    denoiser = PrototypeDenoiser(5)
    images = ToyImages(denoiser, 11)
    done: list[tuple[int, int]] = []

    def work(rank: int) -> None:
        with Engine(denoiser, Asking(RULE, (100, 400, 700))) as engine:
            record = lambda count, rows: done.append((rank, count))  # noqa: E731
            run_shards(opened[rank], images, engine, lambda pixels: pixels, SIZE, rank=rank, record=record)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert sum(count for _, count in done) == 11
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_shard_whose_process_died_is_done_by_who_waits(tmp_path) -> None:
    folder = RunFolder(tmp_path, settings(), 2)
    (tmp_path / "claims").mkdir()
    held = FileLock(tmp_path / "claims" / "000001")
    held.acquire()
    claimed: list[int] = []

    def work() -> None:
        for shard in folder.claims():
            claimed.append(shard)
            write_rows(folder.rows_of(shard), folder.settings, np.arange(5), [], [])

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work)
        time.sleep(0.5)
        assert claimed == [0]
        held.release()
        waiting.result(timeout=20)
    assert claimed == [0, 1]


def test_changed_settings_are_refused_with_what_changed(tmp_path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"^resume: got .* with other settings \(seed 0 there and 1 now\)"):
        run(tmp_path, seed=1)


def test_runs_over_parts_of_the_images_merge_by_path(tmp_path) -> None:
    denoiser = PrototypeDenoiser(5)
    run(tmp_path / "whole")
    run(tmp_path / "a", ToyImages(denoiser, 5))
    run(tmp_path / "b", ToyImages(denoiser, 8, first=3))
    whole, merged = found(tmp_path / "whole"), found(tmp_path / "a", tmp_path / "b")
    assert merged.paths == whole.paths
    assert np.array_equal(merged.ranking[:5], whole.ranking[:5])
    run(tmp_path / "c", ToyImages(denoiser, 8, first=3), weights="def")
    with pytest.raises(ValueError, match=r"^rows: got .*weights 'abc' there and 'def' now"):
        found(tmp_path / "a", tmp_path / "c")


def test_damaged_images_are_left_out_and_named(tmp_path) -> None:
    run(tmp_path, ToyImages(PrototypeDenoiser(5), 9, damaged=(1, 8)))
    outcome = found(tmp_path)
    assert len(outcome.paths) == 7
    assert RunFolder(tmp_path, settings(), 3).damaged() == [("folder/001.png", "broken"), ("folder/008.png", "broken")]


def test_what_is_no_shard_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^rows: got .* without any"):
        found(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "000000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"^rows: got .*000000.parquet, expected a shard"):
        found(tmp_path)
