"""What planning costs by its machine code for sm_90, compiled here: cycles in which a block is issued instructions."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from .conftest import ROOT, build_cuda, emulated_library

cuda = pytest.importorskip("bigain_kernels.triton_kernels.report.cuda")

BUDGET = 10_500
SOURCE = """
#include "bigain/merge_plan.cuh"
void plan(const bigain::PlanInputs& p, const bigain::PlanTables& tables, void* scratch, cudaStream_t stream) {
  bigain::launch_merge_plan(p, 1, 1, 0, tables, scratch, 1, stream);
}
"""


@pytest.fixture(scope="module")
def plans(cuda_ops, tmp_path_factory):
    """The report's row of the plan kernel at each shape."""
    if not cuda_ops.emulated:
        pytest.skip("launches are taken down by the emulator")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cu").write_text(SOURCE)
    try:
        nvcc = [*build_cuda.find_nvcc(), *build_cuda.host_compiler()]
    except build_cuda.CannotBuild as error:
        pytest.skip(str(error))
    flags = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-arch=sm_90", f"-I{ROOT / 'csrc' / 'include'}"]
    # Not under the sanitizer that tests may run under.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [*nvcc, *flags, "-cubin", "plan.cu", "-o", "plan.cubin"]
    subprocess.run(command, cwd=folder, check=True, env=environment)
    functions = cuda.functions_of((folder / "plan.cubin").read_bytes())
    launches = cuda.record(emulated_library())
    found = [cuda.row(each, *functions[each.symbol]) for each in launches if each.kernel == "merge_plan_kernel"]
    return {row["shape"]: row for row in found}


def test_a_row_of_4096_tokens_is_within_the_budget(plans):
    assert plans["sd2_512"]["issue_cycles"] <= BUDGET


@pytest.mark.parametrize("name", ["sd2_768", "video_32760"])
def test_long_rows_cost_no_more_a_token(plans, name):
    tokens = {shape.name: shape.tokens for shape in cuda.SHAPES}
    a_token = {each: plans[each]["predicted"] / tokens[each] for each in ("sd2_512", name)}
    assert a_token[name] <= a_token["sd2_512"]


def test_several_blocks_share_a_row(plans):
    """As many as there are multiprocessors, at most 64 a row and one for 32 tokens; two of few warps share one."""
    blocks = {name: row["programs"] for name, row in plans.items()}
    assert blocks == {
        "sd2_512": 128,
        "sd2_768": 116,
        "sdxl_1024": 128,
        "dit_512": 64,
        "dit_512_b32": 256,
        "flux_1024": 64,
        "video_32760": 64,
    }


def test_the_predictions_say_so(plans):
    """docs/predictions/cuda.json, made by one nvcc; another may differ a little."""
    rows = json.loads((ROOT / "docs" / "predictions" / "cuda.json").read_text())["rows"]
    told = {row["shape"]: row["predicted"] for row in rows if row["kernel"] == "merge_plan"}
    assert {name: row["predicted"] for name, row in plans.items()} == pytest.approx(told, rel=0.1)


def test_nothing_spills(plans):
    assert {row["spills"] for row in plans.values()} == {0}
