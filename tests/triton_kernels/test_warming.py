"""After warm_up a layer of the same resolution compiles nothing, whatever the batch: all of Triton but the GPU."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import backends, methods
from bigain_kernels.triton_kernels import configs

pytest.importorskip("triton")

from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .test_binder import Driver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what it compiles would be taken for the GPU at hand")
GRID = (16, 16)


def layer(x):
    plan = methods.lgtm_plan(x, GRID, 0.5)
    return bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x)


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that the test compiles, in their order. Launches come as far as the driver."""
    do_compile, names = JITFunction._do_compile, []

    def noted(self, *args, **kwargs):
        names.append(self.__name__)
        return do_compile(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(CompiledKernel, "run", property(lambda self: lambda *arguments: None))
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 132)
    with backends.registered(backends.get("triton")._replace(devices=("cpu",), priority=100)):
        yield names


def test_other_batches_compile_nothing_more(compiled):
    sample = {batch: (torch.zeros(batch, 256, 64, dtype=torch.bfloat16),) for batch in range(1, 17)}
    report = bk.warm_up(layer, [sample[1], sample[16]])
    assert report.calls == 2
    names = {"laplacian_score", "bipartite_match", "merge_plan", "token_merge", "token_unmerge"}
    assert report.kernels == dict.fromkeys(names, 2)
    assert names <= {name.removesuffix("_kernel") for name in compiled}
    compiled.clear()
    for batch in sample:
        layer(*sample[batch])
    assert compiled == []
