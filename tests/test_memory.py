"""Matching never holds the (N, D) matrix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
with bk.use_backend("reference"):
    bk.bipartite_match(x, destinations)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory counters of Linux")
def test_peak_extra_memory_of_matching_at_16384_tokens():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    megabytes = float(run.stdout)
    whole_matrix = 16384 * 4096 * 4 / 2**20
    assert 20 < megabytes < 300, megabytes  # the unit tokens alone are 20 MiB: less would mean nothing was measured
    assert megabytes < whole_matrix / 2
