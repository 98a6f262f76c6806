"""The declarations of the ops, and what is held to them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bigain_kernels as bk
from bigain_kernels import MergePlan, native, reference
from bigain_kernels.declaration import OPS, Op, number, optional_tensor, pair, tensor
from bigain_kernels.ops._flops import none
from bigain_kernels.testing import Inputs, samples
from tests.ops.test_registration import PUBLIC_CALLS, X

PACKAGE = Path(bk.__file__).parent


def test_the_ops_of_torch_are_the_declared_ones():
    assert {choice.op for choice in bk.backends.report(("cpu",))} == set(OPS)
    for op in OPS.values():
        assert getattr(torch.ops.bigain, op.name).default._schema == torch._C.parse_schema(f"bigain::{op.schema}")


@pytest.mark.parametrize("op", OPS)
def test_one_name_finds_an_op(op):
    for folder in ("bigain_kernels/ops", "bigain_kernels/reference", "triton_kernels"):
        assert (PACKAGE.parent / folder / f"{op}.py").exists()
    # What has no source there is composed.
    composed = op in bk.backends.get("cpp").compositions
    assert (PACKAGE.parent / "csrc" / "cpu" / f"{op}.cpp").exists() != composed
    assert import_module(f"bigain_kernels.ops.{op}").OP is OPS[op]
    assert callable(getattr(import_module(f"bigain_kernels.reference.{op}"), op))


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True)
    )


@pytest.mark.parametrize("op", OPS)
def test_public_arguments_become_flat_ones_and_back(op):
    declared = OPS[op]
    for arguments in declared.samples(Inputs()).values():
        flat = declared.flatten(*arguments)
        assert len(flat) == len(declared.flat_names)
        tables, back = declared.of_launcher(lambda *args: args)(*flat), declared.of_public(lambda *args: args)(*flat)
        assert len(tables) == len(declared.launcher_names)
        assert len(back) == len(arguments)
        for before, after in zip(arguments, back, strict=True):
            if isinstance(before, MergePlan):
                before, after = (OPS["token_merge"].arguments[1].flatten(each) for each in (before, after))
            assert same(before, after)


def test_an_option_with_a_default_may_be_left_out():
    """As the dispatcher of torch does with what equals its default, and programs that were exported before it."""
    arguments = (tensor("x"), pair("grid", "height", "width"), number("factor", 1.5), optional_tensor("bias", None))
    toy = Op("toy", arguments, "Tensor", none, none, dict)
    assert toy.schema == "toy(Tensor x, SymInt height, SymInt width, float factor=1.5, Tensor? bias=None) -> Tensor"
    assert toy.flat_names == ["x", "height", "width", "factor", "bias"]
    assert toy.of_public(lambda *args: args)(X, 6, 8) == (X, (6, 8), 1.5, None)
    assert toy.of_launcher(lambda *args: args)(X, 6, 8, 2.0) == (X, (6, 8), 2.0, None)


@pytest.mark.parametrize("op", OPS)
def test_launchers_take_the_arguments_of_the_op(op):
    """The same names in the same order, and after them only what belongs to the kernel: its config."""
    pytest.importorskip("triton")
    module = import_module(f"bigain_kernels.triton_kernels.{op}")
    declared = OPS[op].launcher_names
    assert list(inspect.signature(getattr(module, f"launch_{op}")).parameters) in (declared, [*declared, "config"])
    if hasattr(module, f"run_{op}"):
        assert list(inspect.signature(getattr(module, f"run_{op}")).parameters) == declared


@pytest.mark.parametrize("op", OPS)
def test_the_reference_takes_the_public_arguments(op):
    parameters = list(inspect.signature(getattr(reference, op)).parameters)
    expected = ["plan" if len(each.names) > 1 else each.names[0] for each in OPS[op].arguments]
    assert parameters[: len(expected)] == expected


@pytest.mark.skipif(bool(native.REASON), reason=f"no native library: {native.REASON}")
def test_the_library_registers_the_declared_schemas():
    own = {op for op in OPS if hasattr(torch.ops.bigain_cpp, op)}
    for op in own:
        declared = torch._C.parse_schema(f"bigain_cpp::{OPS[op].schema.replace('SymInt', 'int')}")
        assert getattr(torch.ops.bigain_cpp, op).default._schema == declared
    # What it does not register is composed.
    assert set(OPS) - own == set(bk.backends.get("cpp").compositions)


def test_samples_and_public_calls_reach_every_op():
    called = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name())
            return function(*args, **kwargs or {})

    for call in PUBLIC_CALLS.values():
        with Watch():
            call(X)
    expected = {f"bigain::{op}" for op in OPS}
    # bipartite_match and merge_plan by themselves are what methods are made of.
    assert expected <= called
    assert {op for op, _ in samples().values()} == set(OPS)


def imports(path, package):
    """What a file of a package imports, as absolute names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_nothing_but_its_backend_imports_the_reference():
    kernels = PACKAGE.parent / "triton_kernels"
    files = {path: ["bigain_kernels", *path.relative_to(PACKAGE).parts[:-1]] for path in PACKAGE.rglob("*.py")}
    files |= {path: ["bigain_kernels", "triton_kernels"] for path in kernels.rglob("*.py")}
    found = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path, package in files.items()
        if package[1:2] != ["reference"]
        and any(name.startswith("bigain_kernels.reference") for name in imports(path, package))
    }
    # `testing` makes the samples of the ops, for tests.
    assert found == {"bigain_kernels/backends/reference.py", "bigain_kernels/testing.py"}


@pytest.mark.parametrize("first", ["bigain_kernels", "torch.utils.flop_counter"])
def test_flops_are_counted_in_either_order_of_imports(first):
    second = {"bigain_kernels": "torch.utils.flop_counter"}.get(first, "bigain_kernels")
    code = (
        f"import {first}, {second}, sys, torch; from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.bigain.lgtm_plan in flop_registry\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('bigain_kernels')]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_counter_of_flops_is_not_imported_before_somebody_needs_it():
    code = "import bigain_kernels, sys; sys.exit('torch.utils.flop_counter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
