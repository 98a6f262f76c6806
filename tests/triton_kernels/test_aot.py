"""The machine code of every kernel for sm_90, in the config for large calls (`python -m bigain_kernels.aot`: all)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import bigain_kernels.triton_kernels as kernels
from bigain_kernels.triton_kernels import aot, configs, machine_code

# make puts the oldest Triton that is supported here: pip install --no-deps --target build/triton-3.6 triton==3.6.0
OLDEST = Path(__file__).parents[2] / "build" / "triton-3.6"
CASES = list(aot.cases("sm_90", (torch.bfloat16,), default_only=True))
CASES += [case for case in aot.cases("sm_90", (torch.float32,), default_only=True) if "match" in case.op]
IDS = [f"{case.op}, {case.dtype}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_machine_code_keeps_the_rules(case):
    assert aot.examine(case, "sm_90").broken == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_every_config_of_every_architecture_keeps_the_rules(architecture):
    """But of the kernels for tensor cores, which take minutes to compile (`python -m bigain_kernels.aot`)."""
    cases = [case for case in aot.cases(architecture) if case.launch.name not in machine_code.MULTIPLIES]
    broken = {f"{case.op} {case.dtype} {case.config}": aot.examine(case, architecture).broken for case in cases}
    assert {name: rules for name, rules in broken.items() if rules} == {}


@pytest.mark.slow
@pytest.mark.skipif(not (OLDEST / "triton").is_dir(), reason="build/triton-3.6 is not there: make test installs it")
def test_machine_code_of_triton_3_6_keeps_the_rules():
    environment = {**os.environ, "PYTHONPATH": str(OLDEST), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigain_kernels.aot", "--architecture", "sm_90", "--default-only"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("triton 3.6.0"), done.stderr[-2000:]
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.endswith("| ok |"))


def test_the_command_in_json_and_in_text(monkeypatch, capsys):
    """Two cases; then one that breaks a rule, which the exit code says."""
    monkeypatch.setattr(aot, "cases", lambda architecture, default_only: iter(CASES[:2]))
    assert aot.main(["--architecture", "sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == 0
    assert [row["kernel"] for row in found["rows"]] == [case.op for case in CASES[:2]]
    examine = aot.examine
    monkeypatch.setattr(aot, "examine", lambda *given: examine(*given)._replace(broken=["too slow"]))
    assert aot.main(["--architecture", "sm_90", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["broken"] == 2
    assert aot.main(["--architecture", "sm_90"]) == 1
    shown = capsys.readouterr().out
    assert f"| {CASES[0].op} | bf16 | " in shown
    assert shown.count("| too slow |") == 2
    assert shown.endswith("\n2 broken\n")


@pytest.mark.parametrize("wrong", [["--json", "--report", "--against", "x"], ["--report", "--library", "x"]])
def test_the_command_refuses(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        aot.main(wrong)
    assert ended.value.code == 2
    assert f"{'--against' if '--json' in wrong else '--emulated'}: " in capsys.readouterr().err


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
    found = machine_code.broken_rules(case, "sm_90", spills, shared, Counter(instructions))
    assert any(expected in rule for rule in found)


def test_narrow_accesses_are_seen():
    case = next(case for case in CASES if case.launch.name == "token_merge")
    found = machine_code.broken_rules(case, "sm_90", 0, 0, Counter({"LDG.E": 4, "STG.E.64": 1}))
    assert found == ["no 16-byte loads", "no 16-byte stores"]


def test_configs_of_attention_sum_rows_in_one_order():
    cases = [case for case in aot.cases("sm_90", (torch.bfloat16,)) if "(d=72, 2x2)" in case.op]
    assert len(cases) > 1
    assert len({aot.examine(case, "sm_90").row_order for case in cases}) == 1


def test_other_orders_are_seen():
    """For wide heads the compiler spreads the rows of a small tile over warps on sm_80."""
    case = next(case for case in aot.cases("sm_80", (torch.bfloat16,)) if "(d=128, 1x1" in case.op)
    small = case._replace(
        launch=case.launch._replace(arguments={**case.launch.arguments, "BLOCK_M": 64, "num_warps": 4})
    )
    orders = [aot.examine(each, "sm_80").row_order for each in (case, small)]
    assert orders[0] != orders[1]
    assert "1 warps a row" in orders[0]
    assert "4 warps a row" in orders[1]


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_tuned_files(architecture):
    table = configs.table(architecture)
    assert table["architecture"] == architecture
    assert table["ops"].keys() == configs.table(configs.FALLBACK)["ops"].keys()
    assert table["routes"].keys() == configs.table(configs.FALLBACK)["routes"].keys()
    assert all(set(route) == {"small", "large"} for route in table["routes"].values())
    assert {choice for route in table["routes"].values() for choice in route.values()} <= {"fused", "pooled"}
    for op, entry in table["ops"].items():
        assert set(entry) == {"candidates", "choice"}, op
        assert set(entry["choice"]) == {"small", "large"}, op
        assert all(0 <= i < len(entry["candidates"]) for i in entry["choice"].values()), op
        assert len({json.dumps(config, sort_keys=True) for config in entry["candidates"]}) == len(entry["candidates"])


@pytest.mark.parametrize("architecture", ["sm_86", "sm_89"])
def test_matching_fits_gpus_without_a_file_of_their_own(architecture):
    """They have less than half of the shared memory of sm_90, whose configs all others without a file take."""
    cases = [case for case in aot.cases(architecture, (torch.bfloat16,), True) if case.op.startswith("bipartite_match")]
    assert cases
    for case in cases:
        assert aot.examine(case, architecture).shared <= machine_code.SHARED_LIMIT[architecture]


def test_unknown_architectures_and_untuned_choices_are_logged(caplog):
    configs.table.cache_clear()
    configs._pick.cache_clear()
    with caplog.at_level("DEBUG", logger=configs.__name__):
        assert configs.candidates("merge_plan", "sm_75") == configs.candidates("merge_plan")
        configs.pick("token_merge", torch.device("cpu"), 1)
    assert "no configs for sm_75" in caplog.text
    assert "untuned" in caplog.text
