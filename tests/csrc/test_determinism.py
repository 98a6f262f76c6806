"""Same bits whatever the number of threads, the address of the tensors and the batch; all instruction sets."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import native
from tests.shapes import DTYPES, tokens

pytestmark = pytest.mark.usefixtures("cpp")
GRID = (48, 40)
CASES = (
    *("tests/csrc/test_conversions.py", "tests/csrc/test_determinism.py::test_thread_count", "tests/contract"),
    *("--backend", "cpp", "-k", "72 or thread_count"),
)
NORM = tokens(2, 1, 100, seed=5)[:, 0]


def results(x):
    """Everything that the kernels compute from x, as a list of tensors."""
    score, c = bk.laplacian_score(x, GRID), x.shape[2]
    plan = bk.lgtm_plan(x, GRID, 0.6)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    merged = bk.token_merge(x, plan)
    return [
        score,
        bk.laplacian_score(x, GRID, "l2"),
        *bk.bipartite_match(x, destinations),
        *bk.bipartite_match(x, destinations, window=2, grid=GRID, stride=(2, 2)),
        plan.slot,
        plan.members,
        bk.block_merge_plan(score, GRID, (2, 2), 600, "std").slot,
        merged,
        bk.token_merge(x, plan, mode="mlerp"),
        bk.token_merge(x, plan, norm_eps=1e-5),
        bk.token_merge(
            x, plan, norm_eps=1e-5, norm_weight=NORM[0, :c], norm_bias=NORM[1, :c], scale=x[:, 3].float(), shift=x[:, 4]
        ),
        bk.token_unmerge(merged, plan, residual=x, gate=x[:, 0].contiguous()),
        *bk.kv_downsample((x, x), GRID, 3, 0.9),
    ]


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count(dtype):
    x, before = tokens(3, GRID[0] * GRID[1], 100, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(x)
        for count in (2, 8):
            torch.set_num_threads(count)
            assert_same_bits(results(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_address_and_batch(dtype):
    x = tokens(2, GRID[0] * GRID[1], 77, dtype)
    expected = results(x)
    for offset in (1, 3, 7):
        shifted = torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x)
        assert_same_bits(results(shifted), expected)
    assert_same_bits(results(x[1:]), [value[1:] for value in expected])


@functools.cache
def instruction_sets() -> list[str]:
    """What this machine and this build have, as told to those who ask for another."""
    code = "import torch, bigain_kernels as bk; bk.laplacian_score(torch.ones(1, 4, 2), (2, 2))"
    environment = {**os.environ, "BIGAIN_CPU_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    # The first op that runs says so, also one that begins in a parallel loop.
    pooled = code.replace("laplacian_score", "kv_downsample").replace("(2, 2))", "(2, 2), 2, 0.9)")
    other = subprocess.run([sys.executable, "-c", pooled], env=environment, capture_output=True, text=True, check=False)
    assert other.stderr.splitlines()[-1] == run.stderr.splitlines()[-1]
    refusal = "BIGAIN_CPU_ISA: got 'mmx', expected one of what this machine and this build have: (.+)"
    return re.search(refusal, run.stderr)[1].split(", ")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_other_instruction_sets_agree_with_the_reference(isa, request):
    """One machine tests what others will run: cases of theirs, and their bits with 1, 2 and 8 threads."""
    if isa not in instruction_sets():
        pytest.skip(f"this machine or this build has no {isa}")
    if isa == re.match(r"\w+", native.report())[0]:
        pytest.skip(f"{isa} is what all tests run on here")
    run = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), *CASES],
        env={**os.environ, "BIGAIN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_instruction_set_that_is_not_there_is_refused():
    assert instruction_sets()[0] == "baseline"
