"""Checks come before times, rows say where they come from, and every benchmark runs."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, problems, run
from bigain_kernels import timing
from bigain_kernels.timing import summary, time_cpu

ROOT = Path(__file__).parents[2]
TINY = problems.Problem("tiny", 2, (4, 6), 16, 2)


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setitem(problems.PROBLEMS, "tiny", TINY)
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e9))
    with torch.no_grad():
        yield harness.Session("cpu", "float32", ("tiny",), seconds=0.001)


def test_summary():
    timing = summary([float(i) for i in range(1, 10)])
    assert timing.median == 5.0
    assert timing.p20 < 5.0 < timing.p80


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "_WARM_SECONDS", 0.0)
    order = []
    times = time_cpu({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, at_least=3)
    assert set(times) == {"a", "b"}
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 3


def test_a_wrong_result_gets_no_row(session):
    def check(provider, result):
        assert result == 1, f"got {result}"

    providers = {"right": lambda: 1, "wrong": lambda: 2}
    module = SimpleNamespace(OP="laplacian_score", build=lambda problem, x: harness.Case(providers, check, 1000))
    harness.run(module, session)
    assert [row.provider for row in session.rows] == ["right"]
    assert session.failures == ["laplacian_score tiny wrong: got 2"]
    assert harness.finish(session) == 1
    assert session.rows[0].floor == pytest.approx(1.0)  # 1000 bytes at 1 GB/s


def test_a_missed_target_is_a_failure(session):
    times = {("cpp", "eager"): summary([2.0, 2.0]), ("eager", "eager"): summary([5.0, 5.0])}
    if harness.own_backends("token_merge", "cpu") != ["cpp"]:
        pytest.skip("the native library is not built")
    harness.judge(session, "token_merge", "tiny", times, {"eager": 2.0})
    assert not session.failures
    harness.judge(session, "token_merge", "tiny", times, {"eager": 3.0})
    assert session.failures == ["token_merge tiny: 2.50x faster than eager, target 3x"]


def test_nothing_starts_after_the_deadline(session):
    session.deadline = 0.0
    harness.run(SimpleNamespace(OP="token_merge", build=None), session)
    assert session.failures == ["token_merge tiny: not run, out of time"]


@pytest.mark.parametrize("name", run.MODULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_benchmark_passes_its_checks(session, name, dtype, monkeypatch):
    # Compiling takes its time and is another matter.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    session.dtype = dtype
    harness.run(import_module(f"benchmarks.{name}"), session)
    assert session.failures == []
    providers = {row.provider for row in session.rows}
    assert "reference" in providers
    assert providers & {"eager", "full"}, "nothing to compare with"


def test_models(session, tmp_path, monkeypatch):
    bench_model = pytest.importorskip("benchmarks.bench_model", reason="needs diffusers")
    command = ["bench_model", "--model", "dit_tiny", "--seconds", "0.001", "--csv", str(tmp_path / "rows.csv")]
    monkeypatch.setattr(sys, "argv", command)
    assert bench_model.main() == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["unpatched", "lgtm", "lgtm_shared", "iekvd"]


def test_compressed_models_share_the_weights_and_compress():
    bench_model = pytest.importorskip("benchmarks.bench_model", reason="needs diffusers")
    model = bench_model.MODELS["dit_tiny"]
    modules = bench_model.instances(model, "cpu", torch.float32)
    inputs = model.inputs("cpu", torch.float32)
    with torch.no_grad():
        outputs = {name: module(**inputs, return_dict=False)[0] for name, module in modules.items()}
    for name, module in modules.items():
        assert next(module.parameters()).data_ptr() == next(modules["unpatched"].parameters()).data_ptr()
        assert (name == "unpatched") == torch.equal(outputs[name], outputs["unpatched"])


def test_attention_of_pytorch_is_a_row(session, monkeypatch, capsys):
    from benchmarks import bench_ceilings

    monkeypatch.setattr(sys, "argv", ["bench_ceilings", "--problem", "dit_256", "--seconds", "0.001"])
    assert bench_ceilings.main() == 0
    assert "attention dit_256: floor" in capsys.readouterr().out


def test_rows_say_where_they_come_from(session, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGAIN_COMMIT", "abc1234")
    row = harness.Row("op", "tiny", "float32", "cpp", "eager", summary([1.0, 2.0]), 0.5, 10, 0)
    for _ in range(2):
        harness.write_csv(tmp_path / "new" / "cpu.csv", "cpu", [row])
    with (tmp_path / "new" / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert list(rows[0]) == harness.COLUMNS
    assert rows[0]["commit"] == "abc1234"
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["command"].startswith("python -m ")


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    (tmp_path / "old.csv").write_text("shape,time\nsd2,1\n")
    with pytest.raises(ValueError, match=r"csv: .*old.csv has the columns 'shape,time'"):
        harness.write_csv(tmp_path / "old.csv", "cpu", [])
    assert (tmp_path / "old.csv").read_text() == "shape,time\nsd2,1\n"


def test_plots(session, tmp_path):
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    from benchmarks.plot import plot_file

    for provider in ("cpp", "eager"):
        row = harness.Row("token_merge", "tiny", "float32", provider, "eager", summary([1.0, 2.0]), 0.5, 9, 0)
        harness.write_csv(tmp_path / "cpu.csv", "cpu", [row])
    assert plot_file(tmp_path / "cpu.csv", tmp_path / "plots") == [tmp_path / "plots" / "cpu_token_merge.png"]
    assert (tmp_path / "plots" / "cpu_token_merge.png").stat().st_size > 5000


def test_a_module_is_a_program(tmp_path):
    command = [sys.executable, "-m", "benchmarks.bench_merge_plan", "--problem", "dit_256", "--provider", "reference"]
    command += ["--seconds", "0.001", "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "merge_plan dit_256: floor" in done.stdout
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2


def test_run_writes_rows_and_plots(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--out", str(tmp_path), "--problem", "dit_256"]
    command += ["--module", "bench_merge_plan", "--provider", "reference", "--provider", "eager", "--seconds", "0.001"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 rows in {tmp_path / 'cpu.csv'}" in done.stdout
    assert (find_spec("matplotlib") is not None) == (tmp_path / "plots" / "cpu_merge_plan.png").exists()
