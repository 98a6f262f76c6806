"""The contract suite catches what is wrong: every detail of tests/wrong_backends.py, for every op."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigain_kernels.declaration import OPS

from .wrong_backends import WRONG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def test_every_wrong_detail_is_caught(tmp_path):
    assert set(WRONG) == set(OPS)
    caught = tmp_path / "caught.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"BIGAIN_CAUGHT": str(caught), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-p", "tests.wrong_backends", "tests/contract", "--backend", "wrong"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert caught.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    wanted = [f"{op}: {detail}" for op, details in WRONG.items() for detail in details]
    assert json.loads(caught.read_text()) == dict.fromkeys(wanted, "AssertionError")
