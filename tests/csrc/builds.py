"""Running builds in the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of a checkout that is copied to be built.
IGNORED = shutil.ignore_patterns(".?*", "build", "dist", "demo", "*.egg-info", "__pycache__", "_native*", "assets")
# The whole library in a third of the time.
FAST_COMPILER = 'exec c++ "$@" -O0'


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints, which must succeed."""
    merged = {**os.environ, "MAX_JOBS": "2", **environment}
    if "PYTHONPATH" not in environment:
        merged.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=merged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def script(path: Path, text: str) -> Path:
    """A program of a few lines of shell."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
