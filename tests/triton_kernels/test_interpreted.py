"""Every kernel against the reference in Triton's interpreter, each file of interpreted/ in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted((HERE / "interpreted").glob("check_*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem.removeprefix("check_") for file in FILES])
def test_against_the_reference(file):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=-ra --strict-markers", "-o", "python_files=check_*.py", str(file.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
