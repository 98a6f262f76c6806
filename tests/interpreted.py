"""Runs tests where Triton interprets its kernels: in a second process, one beside every pytest process.

Triton reads TRITON_INTERPRET when it is imported and can compile nothing afterwards. A test with the marker
`interpreted` therefore runs in a child that has it set, which collects the same tests; the parent sends it the id of a
test and gets the outcome and the text of a failure. In a process that has the variable itself, or on a GPU, such tests
run like all others.

    TRITON_INTERPRET=1 python -m pytest tests/contract --backend triton      # no child, for a debugger
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests/contract", "tests/triton_kernels/interpreted")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Child:
    """A pytest process that runs the tests whose ids come through one pipe and answers through another."""

    def __init__(self) -> None:
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the child lives
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["BIGAIN_INTERPRETER_PIPES"] = f"{commands} {answers}"
        options = ["-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        options += ["--backend", "triton"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *FOLDERS],
            cwd=ROOT,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            pass_fds=(commands, answers),
        )
        os.close(commands)
        os.close(answers)
        self.reader = os.fdopen(self.answers)

    def run(self, nodeid: str) -> tuple[str, str]:
        """Outcome of a test, and what is to be told of it."""
        os.write(self.commands, f"{nodeid}\n".encode())
        answer = self.reader.readline()
        if not answer:
            self.log.seek(0)
            return "failed", f"the process that interprets has ended:\n{self.log.read()[-8000:]}"
        outcome, text = json.loads(answer)
        return outcome, text

    def close(self) -> None:
        os.close(self.commands)
        self.process.wait()
        self.reader.close()
        self.log.close()


_child = pytest.StashKey[Child]()


def needs_child(item: pytest.Item) -> bool:
    return not INTERPRETED and item.get_closest_marker("interpreted") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not needs_child(pyfuncitem):
        return None
    stash = pyfuncitem.config.stash
    if _child not in stash:
        stash[_child] = Child()
    outcome, text = stash[_child].run(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _child in config.stash:
        config.stash[_child].close()


class _Answers:
    """The child's side: what is reported of the test at hand."""

    def __init__(self) -> None:
        self.outcome, self.text = "passed", ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" or self.outcome == "failed":
            return
        self.outcome = report.outcome
        if report.outcome == "skipped":
            self.text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            return
        sections = [f"--- {title} ---\n{content}" for title, content in report.sections]
        self.text = "\n".join([report.longreprtext, *sections])


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    pipes = os.environ.pop("BIGAIN_INTERPRETER_PIPES", None)
    if pipes is None:
        return None
    commands, answers = (int(number) for number in pipes.split())
    items = {item.nodeid: item for item in session.items}
    with os.fdopen(commands) as reader, os.fdopen(answers, "w") as writer:
        for line in reader:
            seen = _Answers()
            session.config.pluginmanager.register(seen)
            item = items[line.rstrip("\n")]
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            session.config.pluginmanager.unregister(seen)
            writer.write(json.dumps([seen.outcome, seen.text]) + "\n")
            writer.flush()
    return True
