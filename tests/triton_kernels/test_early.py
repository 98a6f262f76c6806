"""Programmatic dependent launches: which are, and what the machine code of others is like."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.triton_kernels import configs, early
from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.machine_code import compile_case
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS

from .test_launches import CALLS

EARLY = {"sm_80": False, "sm_86": False, "sm_89": False, "sm_90": True, "sm_100": True, "sm_120": True, "gfx942": False}


def test_launches_that_can_be_early_are(monkeypatch):
    early.early.cache_clear()
    for architecture, expected in EARLY.items():
        monkeypatch.setattr(configs, "architecture", lambda device, name=architecture: name)
        options = early.early.__wrapped__(torch.device("meta"))
        assert options == ({"EARLY": True, "launch_pdl": True} if expected else {"EARLY": False})


def test_the_interpreter_knows_none():
    assert early.early(torch.device("cpu")) == {"EARLY": False}


@pytest.mark.parametrize("call", CALLS)
def test_who_begins_early_waits(call):
    """A kernel without the constant has no wait in it, and must not be launched so."""
    op, arguments = CALLS[call]
    with record_launches() as launches:
        IMPLEMENTATIONS[op](*arguments)
    for launch in launches:
        assert launch.arguments.get("EARLY", False) == launch.arguments.get("launch_pdl", False)


@pytest.mark.parametrize(("architecture", "waits"), [("sm_80", False), ("sm_90", True), ("gfx942", False)])
def test_instructions_are_those_of_the_architecture(architecture, waits):
    score = torch.empty(2, 64, device="meta")
    with record_launches() as (launches):
        IMPLEMENTATIONS["select_destinations"](score, 8, 8, 2, 2)
    compiled = compile_case(launches[0], architecture)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    assert ("griddepcontrol.wait" in text, "griddepcontrol.launch_dependents" in text) == (waits, waits)
    assert getattr(compiled.metadata, "launch_pdl", False) == waits
