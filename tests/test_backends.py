"""Choosing a backend, and saying which one was chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import backends, env
from bigain_kernels.backends import Backend
from bigain_kernels.backends.compositions import lgtm_plan, pooled_kv_projection
from tests.shapes import tokens

X = tokens(1, 16, 4)


def zeros(x, height, width, norm, frames=1):
    return torch.zeros(x.shape[:2])


@pytest.fixture
def counted():
    """A second backend for laplacian_score that counts its calls and runs when it is asked for; gone after the test."""
    calls = []

    def score(x, height, width, norm, frames=1):
        calls.append(norm)
        return zeros(x, height, width, norm, frames)

    with backends.registered(Backend("counted", {"laplacian_score": score}.get, devices=("cpu",), priority=-1)):
        yield calls


def test_a_named_backend_runs_and_only_inside_the_block(counted):
    with bk.use_backend("counted"):
        assert (bk.laplacian_score(X, (4, 4)) == 0).all()
        assert backends.choose("laplacian_score", "cpu").reason == "asked for by use_backend"
    assert len(counted) == 1
    assert (bk.laplacian_score(X, (4, 4)) > 0).all()
    assert len(counted) == 1


def test_asking_for_a_backend_again_looks_for_nothing(counted, monkeypatch):
    with bk.use_backend("counted"):
        pass
    monkeypatch.setattr(backends.Backend, "find", lambda *_: pytest.fail("looked for an implementation"))
    with bk.use_backend("counted"):
        pass


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


def test_the_highest_priority_of_the_device_runs():
    toy = Backend("toy", {"laplacian_score": zeros}.get, devices=("cpu",), priority=1000)
    with backends.registered(toy):
        assert backends.order("cpu")[0] == "toy"
        assert (bk.laplacian_score(X, (4, 4)) == 0).all()
        assert backends.choose("laplacian_score", "cpu").backend == "toy"
        assert backends.choose("token_merge", "cpu").backend != "toy"
        assert backends.choose("laplacian_score", "cuda").backend != "toy"
        with backends.registered(toy._replace(devices=None)):
            assert backends.choose("laplacian_score", "cuda").backend == "toy"
    assert "toy" not in backends.known_backends()
    assert (bk.laplacian_score(X, (4, 4)) > 0).all()


def test_a_refused_call_goes_on_unless_the_backend_was_named():
    def refuses(op, arguments):
        return "takes rows in pairs" if arguments[0].shape[0] % 2 else ""

    with backends.registered(Backend("pairs", {"laplacian_score": zeros}.get, priority=1000, refuses=refuses)):
        assert (bk.laplacian_score(tokens(2, 16, 4), (4, 4)) == 0).all()
        assert (bk.laplacian_score(X, (4, 4)) > 0).all()
        with bk.use_backend("pairs"):
            assert (bk.laplacian_score(tokens(2, 16, 4), (4, 4)) == 0).all()
            with pytest.raises(backends.BackendUnavailable, match=r"^pairs: laplacian_score takes rows in pairs$"):
                bk.laplacian_score(X, (4, 4))


def test_when_all_refuse_all_reasons_are_told():
    below = {name: backends.unregister(name) for name in backends.order("cpu")}
    toy = Backend("toy", {"laplacian_score": zeros}.get, refuses=lambda op, arguments: "is only a toy")
    try:
        with (
            backends.registered(toy),
            pytest.raises(backends.BackendUnavailable, match="score: toy is only a toy, and no other backend"),
        ):
            bk.laplacian_score(X, (4, 4))
        with pytest.raises(backends.BackendUnavailable, match="laplacian_score: no backend implements it for cpu"):
            bk.laplacian_score(X, (4, 4))
    finally:
        for backend in below.values():
            backends.register(backend)


def test_ops_are_composed_of_those_that_a_backend_has():
    reference = backends.get("reference")
    parts = ("laplacian_score", "select_destinations", "bipartite_match", "merge_plan")
    own = {op: reference.implement(op) for op in parts}
    toy = Backend("toy", own.get, compositions={"lgtm_plan": lgtm_plan, "pooled_kv_projection": pooled_kv_projection})
    with backends.registered(toy), bk.use_backend("toy"):
        plan = bk.lgtm_plan(X, (4, 4), 0.5)
        # kv_downsample is not among its ops.
        with pytest.raises(backends.BackendUnavailable, match=r"toy.*no implementation of pooled_kv_projection"):
            bk.pooled_kv_projection(X, (4, 4), 2, 0.9, X[0, :2], X[0, :2])
    with bk.use_backend("reference"):
        assert torch.equal(plan.slot, bk.lgtm_plan(X, (4, 4), 0.5).slot)


def test_a_missing_backend_says_why():
    absent = Backend("absent", {"laplacian_score": zeros}.get, priority=1000, missing="its library was not built")
    with backends.registered(absent):
        assert "no absent: its library was not built" in backends.choose("laplacian_score", "cpu").reason
        with (
            pytest.raises(ValueError, match=r"'absent', which cannot run here \(its library was not built\), expected"),
            bk.use_backend("absent"),
        ):
            pass


def test_names_are_registered_once():
    with pytest.raises(ValueError, match="name: got 'reference', expected none of the registered backends"):
        backends.register(Backend("reference", {}.get))
    with pytest.raises(ValueError, match="name: got 'warp', expected one of"):
        backends.unregister("warp")


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


def test_env_says_of_every_backend_where_it_runs_or_why_not():
    absent = Backend("absent", {}.get, missing="its library was not built")
    with backends.registered(absent), backends.registered(Backend("toy", {}.get, devices=("cpu", "cuda"))):
        text = env.report()
    assert "backend absent   not here: its library was not built\n" in text
    assert "backend toy      on cpu, cuda\n" in text
    assert "backend reference on any device\n" in text


def test_importing_the_core_needs_torch_alone():
    code = (
        "import sys, bigain_kernels; bad = {'diffusers', 'triton', 'sklearn', 'matplotlib', 'typer', 'scipy'}"
        " & {m.split('.')[0] for m in sys.modules}; sys.exit(str(bad) if bad else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_methods_are_imported_when_they_are_asked_for():
    code = (
        "import sys, bigain_kernels as bk; assert 'bigain_kernels.methods' not in sys.modules\n"
        "assert 'lgtm_plan' in dir(bk)\n"
        "assert bk.lgtm_plan is bk.methods.lgtm_plan; from bigain_kernels import tome_plan, methods\n"
        "try: bk.warp\nexcept AttributeError as error: assert str(error).endswith(\"no attribute 'warp'\")"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_all_is_what_is_exported():
    assert sorted(bk.__all__) == bk.__all__
    assert all(hasattr(bk, name) for name in bk.__all__)
