"""What a launch asks of the CUDA runtime, on a stand-in for it that counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import ROOT, build_cuda

HERE = Path(__file__).parent


def test_a_kernel_is_asked_about_once_on_each_device(tmp_path):
    """Two kernels on two devices, 8 threads: only the first kernel takes more than 48 KiB, device 1 is of sm_80."""
    try:
        compiler = build_cuda.find_compiler()
    except build_cuda.CannotBuild as error:
        pytest.skip(str(error))
    includes = [f"-I{HERE / 'stand_in'}", f"-I{ROOT / 'csrc' / 'include'}"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
    program = tmp_path / "launch_calls"
    subprocess.run([*compiler, *flags, *includes, str(HERE / "launch_calls.cpp"), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    launches, early, set_of_all, largest, read = (int(word) for word in printed.split())
    assert (launches, early) == (8 * 500 * 2, 4 * 500 * 2)
    # All that the device has for a block, less what the kernel has by itself.
    assert (set_of_all, largest) == (2, 100_001 - 1000)
    assert read == 2 * 2 + 2
