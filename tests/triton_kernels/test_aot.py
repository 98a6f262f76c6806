"""The machine code of every kernel for sm_90, in the config for large calls (`python -m bigain_kernels.aot`: all)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bigain_kernels.triton_kernels as kernels
from bigain_kernels import aot
from bigain_kernels.triton_kernels import configs

CASES = list(aot.cases("sm_90", (torch.bfloat16,), default_only=True))
CASES += [case for case in aot.cases("sm_90", (torch.float32,), default_only=True) if "match" in case.op]
IDS = [f"{case.op}, {case.dtype}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_machine_code_keeps_the_rules(case):
    assert aot.examine(case, "sm_90").broken == []


def test_every_kernel_is_covered():
    sources = Path(kernels.__file__).parent.glob("*.py")
    defined = {
        line.split()[1].split("(")[0].removesuffix("_kernel")
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    # Small kernels over scores and packed words, where nothing is to be gained or lost.
    assert defined - {case.launch.name for case in CASES} == {"select_destinations", "match_unpack"}


@pytest.mark.parametrize(
    ("instructions", "spills", "shared", "expected"),
    [
        ({"LDL": 1}, 0, 0, "local memory"),
        ({}, 8, 0, "local memory"),
        ({}, 0, 300_000, "shared memory"),
        ({"DFMA": 1}, 0, 0, "double precision"),
        ({"HMMA.16816.F32": 1}, 0, 0, "no HGMMA"),
    ],
)
def test_rules_are_seen_to_be_broken(instructions, spills, shared, expected):
    case = next(case for case in CASES if case.launch.name == "bipartite_match")
    found = aot.broken_rules(case, "sm_90", spills, shared, Counter(instructions))
    assert any(expected in rule for rule in found)


def test_narrow_accesses_are_seen():
    case = next(case for case in CASES if case.launch.name == "token_merge")
    found = aot.broken_rules(case, "sm_90", 0, 0, Counter({"LDG.E": 4, "STG.E.64": 1}))
    assert found == ["no 16-byte loads", "no 16-byte stores"]


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_tuned_files(architecture):
    table = configs.table(architecture)
    assert table["architecture"] == architecture
    assert table["ops"].keys() == configs.table(configs.FALLBACK)["ops"].keys()
    for op, entry in table["ops"].items():
        assert set(entry) == {"candidates", "choice"}, op
        assert set(entry["choice"]) == {"small", "large"}, op
        assert all(0 <= i < len(entry["candidates"]) for i in entry["choice"].values()), op
        assert len({json.dumps(config, sort_keys=True) for config in entry["candidates"]}) == len(entry["candidates"])


def test_unknown_architectures_and_untuned_choices_are_logged(caplog):
    configs.table.cache_clear()
    configs._pick.cache_clear()
    with caplog.at_level("DEBUG", logger=configs.__name__):
        assert configs.candidates("merge_plan", "sm_75") == configs.candidates("merge_plan")
        configs.pick("token_merge", torch.device("cpu"), 1)
    assert "no configs for sm_75" in caplog.text
    assert "untuned" in caplog.text
