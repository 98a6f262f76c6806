"""torch.ops.bigain_cuda.* called directly and wrongly, where the kernels are emulated: calls raise, nothing crashes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.csrc.cuda.conftest import OPS, emulated_library


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_those_of_the_public_ops(cuda_ops, op):
    """Arguments that only the tests give follow those of the public op and have defaults."""
    ours = getattr(cuda_ops.ops, op).default._schema
    public = getattr(torch.ops.bigain, op).default._schema
    shared = len(public.arguments)
    assert [(a.name, str(a.type)) for a in ours.arguments[:shared]] == [(a.name, str(a.type)) for a in public.arguments]
    assert all(argument.has_default_value() for argument in ours.arguments[shared:])
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in public.returns]


@pytest.mark.parametrize("op", OPS)
def test_other_kinds_of_tensors_raise(cuda_ops, op):
    schema = getattr(cuda_ops.ops, op).default._schema
    tensor = torch.zeros(4, 48, 10)
    for wrong in (tensor.to("meta"), tensor.to_sparse(), tensor.to(torch.complex64)):
        fill = {"Tensor": wrong, "List[Tensor]": [wrong], "int": 1, "float": 1.0, "str": "mean"}
        values = [fill.get(str(argument.type)) for argument in schema.arguments]
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            getattr(cuda_ops.ops, op)(*values)


def test_random_calls_do_not_crash(cuda_ops, request):
    if not cuda_ops.emulated:
        pytest.skip("the calls are on CPU tensors")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.csrc.fuzz", "--count", "1000"),
            *("--emulated", str(emulated_library())),
        ],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"returned (\d+) raised (\d+)", run.stdout)
    assert found, run.stdout
    assert int(found[1]) > 100
    assert int(found[2]) > 400
