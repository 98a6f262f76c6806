"""The CPU library compiles for the other machines that it supports; needs the compiler of `pip install ziglang`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from .builds import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import build_native
from build_tools import torch_flags

pytestmark = pytest.mark.skipif(find_spec("ziglang") is None, reason="needs ziglang, a compiler for other machines")


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos", "x86_64-macos"])
@pytest.mark.parametrize("stem", [*build_native.ONCE, *build_native.KERNELS])
def test_compiles_without_a_warning(stem, target, tmp_path):
    flags = [*build_native.COMMON.split(), *build_native.FAST.split(), *torch_flags().split(), "-DBIGAIN_ISA=baseline"]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *flags, "-c"]
    source = ROOT / "csrc" / "cpu" / f"{stem}.cpp"
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "object.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning" not in done.stderr, done.stderr[:3000]
