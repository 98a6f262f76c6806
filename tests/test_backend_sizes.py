"""Which backend of a GPU goes first by size, with made-up tables and tensors that claim to be on a GPU."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch

from bigain_kernels import backends, env
from bigain_kernels.backends import Backend, registry, sizes
from bigain_kernels.declaration import OPS

OP = "laplacian_score"
TABLE = sizes.Table("a machine, a commit, a command", {OP: [(0, "slow"), (1000, "low"), (5000, "gone")]})


class Device(NamedTuple):
    index: int


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = Device(0)


def on_gpu(*shape):
    return torch.zeros(shape).as_subclass(OnGpu)


@pytest.fixture
def gpu(monkeypatch):
    """Backends "high", "slow" and "low" of GPUs, by priority, that answer with their names; sm_90 is GPU 0."""
    monkeypatch.setattr(sizes, "architecture", lambda index: "sm_90")

    def backend(name, priority, **others):
        return Backend(
            name, {OP: lambda *args: name, "merge_plan": lambda *args: name}.get, ("cuda",), priority, **others
        )

    def refuses(op, arguments):
        return "takes no pairs" if len(arguments[0]) == 2 else ""

    with (
        backends.registered(backend("high", 1000)),
        backends.registered(backend("slow", -1)),
        backends.registered(backend("low", 999, refuses=refuses)),
    ):
        yield
    sizes._first.cache_clear()


def chosen(op, *shape):
    arguments = (on_gpu(*shape), "l1")
    return registry.implementation(op, "cuda", arguments)(*arguments)


def test_the_order_changes_only_where_the_table_says(gpu):
    assert {chosen(OP, 1, n, 10) for n in (1, 99, 100, 499, 500, 9999)} == {"high"}
    with sizes.use_tables({"sm_90": TABLE}):
        # "slow" runs only when it is asked for; "gone" is not in this installation.
        assert [chosen(OP, 1, n, 10) for n in (1, 99, 100, 499, 500, 9999)] == ["high"] * 2 + ["low"] * 2 + ["high"] * 2
        assert chosen("merge_plan", 1, 2000) == "high"
        with backends.use_backend("high"):
            assert chosen(OP, 1, 100, 10) == "high"
    with sizes.use_tables({"sm_80": TABLE}):
        assert chosen(OP, 1, 100, 10) == "high"
    assert chosen(OP, 1, 100, 10) == "high"


def test_the_batch_does_not_decide(gpu):
    with sizes.use_tables({"sm_90": TABLE}):
        assert {chosen(OP, batch, 100, 10) for batch in (0, 1, 3, 500)} == {"low"}
        assert chosen(OP, 500, 1, 10) == "high"


def test_a_call_that_the_first_refuses_goes_on(gpu):
    with sizes.use_tables({"sm_90": TABLE}):
        assert chosen(OP, 2, 100, 10) == "high"


def test_the_size_of_a_list_is_that_of_its_first_tensor(gpu):
    with sizes.use_tables({"sm_90": TABLE}):
        arguments = ([on_gpu(1, 100, 10), *[on_gpu(1, 1, 1)] * 2], "l1")
        assert registry.implementation(OP, "cuda", arguments)(*arguments) == "low"


def test_what_decides_is_told(gpu, monkeypatch):
    assert env.backend_sizes() == "priorities: nothing measured by size"
    assert "measured" not in backends.choose(OP, "cuda").reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with sizes.use_tables({"sm_90": TABLE}):
        told = "by elements of a row, measured on sm_90: slow from 0, low from 1000, gone from 5000 (a machine, a com"
        assert backends.choose(OP, "cuda").reason.startswith(told)
        assert "measured" not in backends.choose("merge_plan", "cuda").reason
        assert env.backend_sizes() == "measured on sm_90: a machine, a commit, a command"


@pytest.mark.parametrize("bounds", [[], [[1, "cuda"]], [[0, "cuda"], [0, "triton"]], [[0, "cuda"], [9, "a"], [3, "b"]]])
def test_tables_ascend_from_zero(tmp_path, bounds):
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps({"measured": "", "ops": {OP: bounds}}))
    with pytest.raises(ValueError, match=r"laplacian_score: got bounds \[.*\], expected them to ascend from 0"):
        sizes.read(path)


def test_files_name_ops_and_backends():
    for path in sizes.FOLDER.glob("*.json"):
        for op, bounds in sizes.read(path).ops.items():
            assert op in OPS
            assert {name for _, name in bounds} <= {"triton", "cuda"}
