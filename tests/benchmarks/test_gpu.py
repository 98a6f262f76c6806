"""The command for a GPU machine, as far as it can be run without one."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def test_parts_in_order(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path, tune=True, models=True, minutes=9)]
    assert names[:2] == ["install", "environment"]
    assert names.index("tune") < names.index("ceilings") < names.index("benchmarks") < names.index("models")
    assert names.index("benchmarks") < names.index("backend sizes")
    fewer = [part.name for part in gpu.parts(tmp_path, tune=False, models=False, minutes=9)]
    assert not {"tune", "backend sizes", "models"} & set(fewer)


def test_what_the_parts_run_exists(tmp_path):
    for part in gpu.parts(tmp_path, tune=True, models=True, minutes=9):
        for word in part.command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), f"{part.name}: {word}"


def test_outcomes(tmp_path):
    def outcome(code, seconds=30.0):
        return gpu.run(gpu.Part("a part", "log.txt", [sys.executable, "-c", code], seconds), tmp_path, 60.0)

    assert outcome("print('seen')") == "passed"
    assert outcome("raise SystemExit(3)") == "failed with status 3"
    assert outcome("import time; time.sleep(60)", 1.0) == "out of time after 1 s"
    assert gpu.run(gpu.Part("a part", "log.txt", ["no-such-program"], 5.0), tmp_path, 5.0).startswith("left out: ")
    assert "\nseen\n" in (tmp_path / "log.txt").read_text()


def test_the_summary_names_what_failed(tmp_path, monkeypatch, capsys):
    good = gpu.Part("good", "log.txt", [sys.executable, "-c", ""], 30.0)
    bad = gpu.Part("bad", "log.txt", [sys.executable, "-c", "raise SystemExit(1)"], 30.0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "parts", lambda *args: [good, bad])
    assert gpu.main() == 1
    assert "bad                    failed with status 1" in (tmp_path / "summary.txt").read_text()
    monkeypatch.setattr(gpu, "parts", lambda *args: [good])
    assert gpu.main() == 0
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", "0.1"])
    assert gpu.main() == 1
    assert "left out: no time" in capsys.readouterr().out
