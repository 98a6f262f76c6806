"""Choosing a backend, and saying which one was chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import backends, env
from tests.shapes import tokens

X = tokens(1, 16, 4)


@pytest.fixture
def counted(monkeypatch):
    """A second backend for laplacian_score that counts its calls; gone after the test."""
    calls = []
    monkeypatch.setattr(backends, "_implementations", {k: dict(v) for k, v in backends._implementations.items()})

    @backends.register("laplacian_score", "counted", "cpu")
    def score(x, height, width, norm):
        calls.append(norm)
        return torch.zeros(x.shape[:2])

    return calls


def test_a_named_backend_runs_and_only_inside_the_block(counted):
    with bk.use_backend("counted"):
        assert (bk.laplacian_score(X, (4, 4)) == 0).all()
        assert backends.choose("laplacian_score", "cpu").reason == "asked for by use_backend"
    assert len(counted) == 1
    assert (bk.laplacian_score(X, (4, 4)) > 0).all()
    assert len(counted) == 1


def test_use_backend_reaches_compiled_code(counted):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: bk.laplacian_score(x, (4, 4)), fullgraph=True, backend="aot_eager")
    assert (compiled(X) > 0).all()
    with bk.use_backend("counted"):
        assert (compiled(X) == 0).all()


def test_the_environment_variable_is_honoured_and_checked(counted, monkeypatch):
    monkeypatch.setenv("BIGAIN_BACKEND", "counted")
    bk.laplacian_score(X, (4, 4))
    assert len(counted) == 1
    with bk.use_backend("reference"):
        bk.laplacian_score(X, (4, 4))
    assert len(counted) == 1
    monkeypatch.setenv("BIGAIN_BACKEND", "warp")
    with pytest.raises(ValueError, match="BIGAIN_BACKEND: got 'warp', expected one of"):
        bk.laplacian_score(X, (4, 4))


def test_a_named_backend_that_cannot_run_a_call_raises(counted):
    with bk.use_backend("counted"), pytest.raises(backends.BackendUnavailable, match=r"counted.*token_merge.*cpu"):
        bk.token_merge(X, bk.MergePlan.identity(1, (4, 4)))


def test_unknown_backend():
    with pytest.raises(ValueError, match="name: got 'warp', expected one of"), bk.use_backend("warp"):
        pass


def test_report_names_every_op_and_a_reason():
    rows = backends.report(("cpu",))
    assert {row.op for row in rows} >= {"laplacian_score", "bipartite_match", "merge_plan", "token_merge"}
    assert all(row.reason for row in rows)


@pytest.mark.parametrize("name", ["counted", "warp"])
def test_report_explains_a_bad_environment_variable(name, monkeypatch, counted):
    monkeypatch.setenv("BIGAIN_BACKEND", name)
    row = next(row for row in backends.report(("cpu",)) if row.op == "kv_downsample_attention")
    assert row.backend == "none"
    assert f"{name!r}" in row.reason


def test_env_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "bigain_kernels.env"], capture_output=True, text=True, check=True)
    assert "bipartite_match" in run.stdout
    assert env.versions()["torch"] in run.stdout


def test_importing_the_core_needs_torch_alone():
    code = (
        "import sys, bigain_kernels; bad = {'diffusers', 'triton', 'sklearn', 'matplotlib', 'typer', 'scipy'}"
        " & {m.split('.')[0] for m in sys.modules}; sys.exit(str(bad) if bad else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_all_is_what_is_exported():
    assert sorted(bk.__all__) == bk.__all__
    assert all(hasattr(bk, name) for name in bk.__all__)
