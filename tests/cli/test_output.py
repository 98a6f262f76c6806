"""What commands print: JSON alone where it is asked for, text without colours and bars into a pipe, and exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigain_kernels import env as environment
from bigain_kernels.cli import main as entry
from bigain_kernels.cli.main import BAD_INPUT, INTERRUPTED, main
from bigain_kernels.cli.options import progress_bar
from bigain_kernels.evaluation.output import json_text
from bigain_kernels.evaluation.records import ResultsFile

ESCAPE = "\x1b["
PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_classify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "classify", "--limit", "2", "--out", tmp_path)
    assert found == {**json.loads((tmp_path / "summary.json").read_text()), "out": str(tmp_path)}
    assert main(["classify", "--limit", "1", "--out", str(tmp_path / "one")]) == 0
    assert " on 1 image; " in capsys.readouterr().out
    assert main(["classify", "--limit", "3", "--out", str(tmp_path), "--resume", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"] == 3
    assert shown.err == "2 images classified before\n"


def test_an_interrupted_run_has_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ResultsFile.add

    def stop(self: ResultsFile, image: Any) -> None:
        add(self, image)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultsFile, "add", stop)
    assert printed(capsys, "classify", "--limit", "2", "--out", tmp_path, code=INTERRUPTED)["images"] == 1


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "generate", "--images", "3", "--steps", "1", "--label", "7", "--out", tmp_path)
    assert [Path(name) for name in found["files"]] == sorted((tmp_path / "samples").iterdir())
    assert found["labels"] == ["7"] * 3
    assert found["steps"] == 1


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "digits", "--frontier-images", "2", "--images", "2", "--samples", "3", "--steps", "1"]
    found = printed(capsys, "demo", *small, "--no-real-size", "--no-pictures", "--threads", "1", "--out", tmp_path)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert {row["table"] for row in found["rows"]} == {"frontier", "jobs"}


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "env")
    assert found["versions"]["torch"] == torch.__version__
    assert {"op": "token_merge", "device": "cpu"}.items() <= next(
        row for row in found["ops"] if row["op"] == "token_merge"
    ).items()
    environment.main(["--json"])
    assert json.loads(capsys.readouterr().out) == found
    environment.main([])
    text = capsys.readouterr().out
    assert all(f"{each['op']:24} {each['device']:5} {each['backend']}" in text for each in found["ops"])


def test_numbers_that_json_has_no_words_for() -> None:
    assert json.loads(json_text({"a": [float("nan"), (float("inf"), 1.5)], "b": True})) == {
        "a": [None, [None, 1.5]],
        "b": True,
    }


def run(*arguments: str | Path, **variables: str) -> tuple[str, int]:
    """What `bigain` prints on a terminal, and its exit code."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    kept.pop("GITHUB_ACTIONS", None)  # typer takes it for a terminal
    command = [sys.executable, "-m", "bigain_kernels.cli.main", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**kept, "TERM": "xterm-256color", **variables}
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    return b"".join(parts).decode(), process.wait(60)


def colours(text: str) -> list[str]:
    """The codes that set a colour: 30 to 37, 90 to 97 and 38 in front, 40 to 49 behind."""
    codes = [code for each in re.findall(r"\x1b\[([\d;]*)m", text) for code in each.split(";")]
    return [code for code in codes if code and (30 <= int(code) <= 49 or 90 <= int(code) <= 107)]


def test_a_terminal_gets_colours_unless_it_asks_for_none() -> None:
    coloured, code = run("classify", "--help")
    assert code == 0
    assert colours(coloured)
    plain, code = run("classify", "--help", NO_COLOR="1")
    assert code == 0
    assert "Usage:" in plain
    assert not colours(plain)


def test_a_pipe_gets_neither_colours_nor_bars(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    code = (
        "from bigain_kernels.cli.main import main; import sys; "
        "small = ['--model', 'digits', '--frontier-images', '2', '--images', '2', '--samples', '3', '--steps', '1', "
        "'--no-real-size', '--no-pictures', '--threads', '1', '--out', sys.argv[1]]; "
        "sys.exit(main(['demo', *small]) or main(['--help']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Both jobs" in done.stdout
    assert "Usage:" in done.stdout
    assert ESCAPE not in done.stdout


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    assert progress_bar().disable  # here stderr is none
    shown, code = run("classify", "--limit", "1", "--out", tmp_path)
    assert code == 0
    assert "accuracy" in shown
    assert "1/1" in shown


class Gone:
    """A stdout that nobody reads any more."""

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None: ...

    def fileno(self) -> int:
        return self.descriptor

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each code of the page, and no other."""
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.M)}
    found = {main(["--version"]), main(["classify", "--limit", "0"]), main(["bogus"])}
    assert found == {0, BAD_INPUT}

    def fail(error: BaseException) -> Any:
        def facts() -> None:
            raise error

        return facts

    monkeypatch.setattr(environment, "facts", fail(KeyboardInterrupt()))
    found.add(main(["env", "--json"]))
    # Memory that is not there is bad input; what nobody foresaw keeps its traceback, and Python ends with 1.
    monkeypatch.setattr(environment, "facts", fail(MemoryError()))
    assert main(["env", "--json"]) == BAD_INPUT
    monkeypatch.setattr(environment, "facts", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["env", "--json"])
    with open(tmp_path / "nowhere", "w") as file:
        monkeypatch.setattr(sys, "stdout", Gone(file.fileno()))
        assert main(["--version"]) == 0
    assert found | {1} == listed == {0, 1, BAD_INPUT, INTERRUPTED}
    assert entry.BAD_INPUT == 2
