"""The launches through Triton's own just-in-time path: binder, specialization, options, compiler; all but the GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bigain_kernels.triton_kernels import aot
from bigain_kernels.triton_kernels.launching import Launch
from bigain_kernels.triton_kernels.registration import IMPLEMENTATIONS

from .test_launches import CALLS, LAUNCHES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what it compiles would be taken for the GPU at hand")


# One sample of each op: the last, which asks for the most.
LAST = list({op: call for call, (op, _) in CALLS.items()}.values())


class Driver:
    """As much of a driver as compiling takes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """What the launches of the test were compiled to, each with its launch."""
    run, found = JITFunction.run, []

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launch = Launch(self, tuple(grid), dict(zip(self.arg_names, args, strict=False)) | kwargs)
        found.append((launch, kernel))

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(driver, "_active", Driver())
    return found


@pytest.mark.parametrize("call", LAST)
def test_every_launch_is_bound_and_specialized_as_aot_says(call, compiled):
    op, arguments = CALLS[call]
    IMPLEMENTATIONS[op](*arguments)
    assert len(compiled) == LAUNCHES.get(call, 1)
    for launch, kernel in compiled:
        signature, _, attributes = aot.specialize(launch)
        assert kernel.src.signature == signature
        assert {place for place, known in kernel.src.attrs.items() if known} == set(attributes)
        assert kernel.asm["cubin"]
