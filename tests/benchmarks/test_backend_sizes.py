"""The table of which backend goes first, from measured rows, made up here."""

from __future__ import annotations

import csv
import sys

import pytest

from benchmarks import backend_sizes
from bigain_kernels.backends import sizes


def row(op, problem, provider, time, **others):
    made = {"op": op, "problem": problem, "provider": provider, "median_us": str(time), "dtype": "bfloat16"}
    return {**made, "mode": "graph", "device": "a GPU", "commit": "c0ffee", "command": "a command", **others}


def both(op, problem, triton, cuda, **others):
    return [row(op, problem, "triton", triton, **others), row(op, problem, "cuda", cuda, **others)]


# Rows of 294,912 elements (dit_256), 1,179,648 (dit_512, with 2 rows and 32), 1,310,720 and 12,582,912.
ROWS = [
    *both("token_merge", "dit_256", 4, 2),
    *both("token_merge", "dit_512", 10, 8),
    *both("token_merge", "dit_512_b32", 100, 90),
    *both("token_merge", "sd2_512", 10, 12),
    *both("token_merge", "flux_1024", 20, 21),
    *both("merge_plan", "dit_512", 10, 9.9),  # within the margin
    *both("token_unmerge", "flux_1024", 10, 5),
    *both("token_merge", "sd2_512", 9, 1, dtype="float32"),
    *both("token_merge", "sd2_512", 9, 1, mode="eager"),
    *both("token_merge", "alike_4096", 9, 1),
    row("kv_downsample", "dit_512", "triton", 3),
    row("token_merge", "sd2_512", "reference", 3),
]


def test_the_faster_backend_of_each_size_goes_first():
    found = backend_sizes.document(ROWS)["ops"]
    assert found == {
        "merge_plan": [[0, "triton"]],
        "token_merge": [[0, "cuda"], [round((1_179_648 * 1_310_720) ** 0.5), "triton"]],
        "token_unmerge": [[0, "cuda"]],
    }


def test_what_is_written_is_what_the_registry_reads(tmp_path, monkeypatch, capsys):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    out = tmp_path / "sm_90.json"
    monkeypatch.setattr(sys, "argv", ["sizes", "--rows", str(tmp_path / "rows.csv"), "--out", str(out)])
    assert backend_sizes.main() == 0
    assert "token_unmerge        cuda from 0" in capsys.readouterr().out
    table = sizes.read(out)
    assert table.measured == "a GPU, commit c0ffee, a command"
    assert table.ops["token_merge"][0] == (0, "cuda")


def test_rows_of_one_backend_make_no_table():
    with pytest.raises(ValueError, match="rows: got none of one op on triton and cuda"):
        backend_sizes.document([row("token_merge", "dit_512", "triton", 3)])
