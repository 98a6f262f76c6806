"""The static report of the CUDA library: the launches that the emulator takes down, and what is said of loops."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import ROOT, emulated_library

cuda = pytest.importorskip("bigain_kernels.triton_kernels.report.cuda")
SMALL = ("sd2_512", "dit_512", "flux_1024")


@pytest.fixture(scope="module")
def launches(cuda_ops):
    if not cuda_ops.emulated:
        pytest.skip("launches are taken down by the emulator")
    return list(cuda.record(emulated_library(), tuple(each for each in cuda.SHAPES if each.name in SMALL)))


def test_the_launches_of_a_layer_are_those_of_the_ops(launches):
    chain = ["laplacian_score_kernel", "bipartite_match_kernel", "merge_plan_kernel"]
    merges = ["token_merge_kernel", "token_unmerge_kernel", "row_moments_kernel", "token_merge_kernel"]
    for name in SMALL:
        found = [each.kernel for each in launches if each.shape.name == name]
        assert found == [*chain, *merges, "kv_downsample_kernel"]


def test_matching_shares_the_work_among_all_multiprocessors(launches):
    """One block each with the large tile, whatever the shape; at DiT's two rows there are 96 small tiles in all."""
    blocks = {each.shape.name: each.blocks for each in launches if each.kernel == "bipartite_match_kernel"}
    assert blocks == {"sd2_512": 132, "dit_512": 96, "flux_1024": 132}


def test_streaming_kernels_have_blocks_for_all_multiprocessors(launches):
    """Those of a plan are counted in test_plan_cost.py."""
    streams = [each for each in launches if each.kernel not in ("bipartite_match_kernel", "merge_plan_kernel")]
    assert len(streams) == 6 * len(SMALL)
    assert [each for each in streams if each.blocks < cuda.MULTIPROCESSORS] == []


def test_the_predictions_are_of_the_launches_that_there_are(launches):
    """docs/predictions/cuda.json is made again where a launch changes; docs/performance.md has the command."""
    rows = json.loads((ROOT / "docs" / "predictions" / "cuda.json").read_text())["rows"]
    told = [
        (
            row["shape"],
            row["op"],
            f"{row['kernel']}_kernel",
            row["programs"],
            32 * row["warps"],
            row["config"]["variant"],
        )
        for row in rows
    ]
    found = [
        (each.shape.name, each.op, each.kernel, each.blocks, each.threads, each.variant)
        for each in cuda.record(emulated_library())
    ]
    assert told == found


def test_ops_run_again_after_launches_were_taken_down(launches, cuda_ops):
    before = cuda_ops.launches()
    test = cuda.torch.ones(1, 4, 8)
    assert cuda_ops.ops.laplacian_score(test, 2, 2, "l1").tolist() == [[16.0] * 4]
    assert cuda_ops.launches() == before + 1


@pytest.mark.parametrize("beginning", cuda.LOOPS)
def test_every_loop_that_the_report_knows_is_in_the_headers(beginning):
    headers = Path(ROOT / "csrc" / "include" / "bigain").glob("*.cuh")
    assert any(re.match(beginning, line.strip()) for each in headers for line in each.read_text().splitlines())


@pytest.mark.parametrize(("name", "first", "last"), [*cuda.SHARES, *cuda.ALONE])
def test_every_branch_that_the_report_knows_is_in_the_headers(name, first, last):
    lines = [line.strip() for line in (ROOT / "csrc" / "include" / "bigain" / name).read_text().splitlines()]
    begin = next(i for i, line in enumerate(lines) if re.match(first, line))
    assert any(re.match(last, line) for line in lines[begin:])
