"""The workflow of the forge does what CI does here."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

from tests.csrc.builds import ROOT, run

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_it_runs_every_command_of_ci():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    (targets,) = [
        job["strategy"]["matrix"]["target"] for job in jobs.values() if "make ${{ matrix.target }}" in str(job)
    ]
    ran = {*targets, *re.findall(r"make ([\w-]+)", "\n".join(commands))}
    expected = set(re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    assert len(expected) >= 5
    assert expected <= ran
    known = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert ran <= known | {"test-slow", "sanitize"}


def test_it_is_a_workflow(tmp_path):
    """By the schema of GitHub's workflows."""
    pytest.importorskip("check_jsonschema")
    schema = ["--builtin-schema", "vendor.github-workflows"]
    run(sys.executable, "-m", "check_jsonschema", *schema, WORKFLOW, cwd=tmp_path)
