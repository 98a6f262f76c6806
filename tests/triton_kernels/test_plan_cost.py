"""What planning costs by its machine code for sm_90: cycles in which one of its warps is issued an instruction."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.triton_kernels import configs, machine_code
from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.merge_plan import launch_merge_plan_packed

BUDGET = 10_500


def issue_cycles(launch, trips):
    """Instructions of a warp, those of the i-th loop taken trips[i] times, times warps over four schedulers."""
    sass = machine_code._cuobjdump(machine_code.compile_case(launch, "sm_90").asm["cubin"], "-sass")
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    jumps = [(address, re.search(r"\bBRA (?:\S+, )?0x([0-9a-f]+)", text)) for address, text in code]
    loops = sorted((int(to[1], 16), address) for address, to in jumps if to and int(to[1], 16) < address)
    assert len(loops) == len(trips), loops
    count = len(code)
    for (first, last), times in zip(loops, trips, strict=True):
        count += (times - 1) * sum(first <= address <= last for address, _ in code)
    return count * launch.arguments["num_warps"] / 4


# Digits of similarities and parts of the tokens; those of tokens where similarities tie are without a loop. Without
# counters in shared memory, as in older Tritons, bits instead of digits.
@pytest.mark.parametrize(("histogram", "trips"), [(True, (4, 1)), (False, (32, 1))])
def test_a_row_of_4096_tokens(monkeypatch, histogram, trips):
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    config = {**configs.candidates("merge_plan")[0], "HISTOGRAM": histogram}
    with record_launches() as launches:
        launch_merge_plan_packed(torch.empty((2, 4096), dtype=torch.int64, device="meta"), 2867, config)
    assert launches[0].grid == (64, 2)
    assert issue_cycles(launches[0], trips) <= BUDGET


def test_parts_fill_the_chip(monkeypatch):
    """Of 132 multiprocessors 33 for each of four rows, at most 64 for one, 32 for a long one, none without tokens."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    for n, grid in ((1024, (16, 4)), (4096, (64, 1)), (9216, (29, 4)), (9216, (48, 2)), (32_760, (32, 4))):
        with record_launches() as launches:
            launch_merge_plan_packed(torch.empty((grid[1], n), dtype=torch.int64, device="meta"), n // 2)
        assert launches[0].grid == grid
        assert launches[0].arguments["SINGLE"] == (n <= 4096)
