"""Whole models row by row: what a row holds, and that a run which was cut off goes on."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import machine

whole_models = pytest.importorskip("benchmarks.whole_models", reason="needs diffusers")


def test_attention_of_the_cpu_is_counted():
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 6, 8)
    with torch.no_grad(), whole_models.counter() as counted:
        F.scaled_dot_product_attention(q, k, k)
    assert counted.get_total_flops() == 4 * 2 * 3 * 10 * 6 * 8


@pytest.mark.parametrize("model", ["dit_tiny", "unet_tiny"])
def test_every_method_saves_operations(model):
    pytest.importorskip("tomesd")
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        rows = whole_models.in_turns(model, "float32", tuple(whole_models.METHODS), 2)
    finally:
        torch.set_grad_enabled(gradients)
    assert torch.get_num_threads() == threads
    assert all(row["calls"] == 2 and 0 < row["least_s"] <= row["median_s"] for row in rows.values())
    assert rows["none"]["speed"] == 1.0
    gflop = {method: row["gflop"] for method, row in rows.items()}
    # As many tokens are left and as many pairs compared.
    assert gflop["tomesd_0.5"] == gflop["lgtm_0.5"]
    assert gflop["tomesd_0.7"] == gflop["lgtm_0.7"] < gflop["lgtm_0.5"] < gflop["none"]
    assert gflop["iekvd_2"] < gflop["none"]


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs the program on two rows without measuring; returns the status and what would have been measured."""
    row = {"calls": 3, "speed": 1.0, "least_s": 0.5, "median_s": 0.6, "peak_mib": None, "gflop": 2.0}
    monkeypatch.setattr(machine, "spin", lambda threads: machine.Spin(1.0, 1.0, 0.0))

    def run(*options, fails=False):
        asked = []

        def measured(name, dtype, methods, turns, threads):
            asked.extend(methods)
            if fails:
                raise RuntimeError(f"{name}: no memory")
            return {method: dict(row) for method in methods}

        monkeypatch.setattr(whole_models, "measured", measured)
        command = [
            "whole_models",
            "--model",
            "dit_tiny",
            "--dtype",
            "float32",
            "--method",
            "none",
            "--method",
            "lgtm_0.7",
        ]
        monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", "--out", str(tmp_path / "rows.csv"), *options])
        threads = torch.get_num_threads()
        try:
            return whole_models.main(), asked
        finally:
            torch.set_num_threads(threads)

    return run


def test_a_run_goes_on_with_the_rows_that_are_missing(measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("BIGAIN_COMMIT", "abc1234")
    assert measure(fails=True) == (1, ["none", "lgtm_0.7"])
    assert "FAILED dit_tiny: no memory" in capsys.readouterr().out
    assert measure() == (0, ["none", "lgtm_0.7"])
    assert measure() == (0, [])
    # A further method is compared with all others again.
    assert measure("--method", "iekvd_2") == (0, ["none", "lgtm_0.7", "iekvd_2"])
    shown = capsys.readouterr().out
    assert "1.00x  100.0 % of the FLOPs" in shown
    assert "NOISY" not in shown
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["none", "lgtm_0.7", "iekvd_2"]
    monkeypatch.setenv("BIGAIN_COMMIT", "def5678")
    assert measure() == (0, ["none", "lgtm_0.7"])


def test_a_file_with_other_columns_is_left_alone(measure, tmp_path):
    (tmp_path / "rows.csv").write_text("shape,time\nsd2,1\n")
    with pytest.raises(ValueError, match=r"out: .*rows.csv has the columns \['shape', 'time'\]"):
        measure()


def test_the_machine_is_described():
    assert machine.cpu_name()
    assert set(machine.cpu_flags()) <= {*machine.FLAGS, *machine.ARM_FLAGS}
    spin = machine.spin(1, rounds=1000)
    assert 0 < spin.share <= 1
    assert spin.milliseconds > 0
    assert "NOT QUIET" in str(spin._replace(share=0.5))
    assert str(spin._replace(share=1.0, load=0.25)) == "quiet: 100 % of the cores to spare, load 0.25"
