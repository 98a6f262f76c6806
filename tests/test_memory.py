"""Matching never holds the (N, D) matrix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bigain_kernels import native

# The high-water mark of resident memory, reset right before the call; getrusage's is inherited from the parent.
PROGRAM = """
import torch, bigain_kernels as bk

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

torch.set_grad_enabled(False)
bk.lgtm_plan(torch.randn(1, 64, 320), (8, 8), 0.5)
x = torch.randn(1, 16384, 320)
destinations = torch.arange(0, 16384, 4, dtype=torch.int32)[None]
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
with bk.use_backend("BACKEND"):
    bk.bipartite_match(x, destinations)
print(resident("VmHWM") - before)
"""
# Backend: MiB that it needs for sure (less would mean that nothing was measured), and MiB that it may take. The
# reference scales all 20 MiB of tokens, the kernels the 5 MiB of destinations; the matrix alone would take 256.
BOUNDS = {"reference": (20, 100), "cpp": (3, 20)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory counters of Linux")
@pytest.mark.parametrize("backend", BOUNDS)
def test_peak_extra_memory_of_matching_at_16384_tokens(backend):
    if backend == "cpp" and native.REASON:
        pytest.skip(f"no native library: {native.REASON}")
    program = PROGRAM.replace("BACKEND", backend)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    low, high = BOUNDS[backend]
    assert low <= float(run.stdout) < high
