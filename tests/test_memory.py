"""Matching never holds the (N, D) matrix, and a backward pass no more than that of the same steps in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigain_kernels import native

# The high-water mark of resident memory, reset right before the call; getrusage's is inherited from the parent.
MEASURE = """
import torch, bigain_kernels as bk

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

def peak(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before
"""
PROGRAM = (
    MEASURE
    + """
torch.set_grad_enabled(False)
bk.lgtm_plan(torch.randn(1, 64, 320), (8, 8), 0.5)
x = torch.randn(1, 16384, 320)
destinations = torch.arange(0, 16384, 4, dtype=torch.int32)[None]
with bk.use_backend("BACKEND"):
    print(peak(lambda: bk.bipartite_match(x, destinations)))
"""
)
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


TRAINING = (
    MEASURE
    + """
from bigain_kernels import reference

grid = (64, 64)
x = torch.randn(1, 4096, 640, requires_grad=True)  # 10 MiB
weights = torch.randn_like(x)
plan = bk.lgtm_plan(x.detach(), grid, 0.5)
calls = {
    "merge": lambda ops: ops.token_unmerge(ops.token_merge(x, plan), plan, residual=x),
    "mlerp": lambda ops: ops.token_unmerge(ops.token_merge(x, plan, "mlerp"), plan, residual=x),
    "norm": lambda ops: ops.token_unmerge(ops.token_merge(x, plan, norm_eps=1e-5), plan, residual=x),
    "pool": lambda ops: x + ops.kv_downsample(x, grid, (2, 2), 0.9).repeat(1, 4, 1),
}
for name, call in calls.items():
    for ops in (bk, reference):
        step = lambda: torch.autograd.grad(call(ops), x, weights)
        small = step()
        del small
        print(name, peak(step))
"""
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the memory counters of Linux")
def test_a_backward_pass_takes_no_more_memory_than_that_of_pytorch():
    # Memory that is freed goes back at once, not into a heap where the next call finds it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True, env=environment)
    rows = [line.split() for line in run.stdout.splitlines()]
    for (name, ours), (_, eager) in zip(rows[::2], rows[1::2], strict=True):
        assert 10 < float(ours) <= float(eager) + 1, (name, ours, eager)
