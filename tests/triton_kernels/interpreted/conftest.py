"""Runs the kernels where they are: in Triton's interpreter on CPU tensors, or on a GPU.

`test_interpreted.py` starts a process for each file here with TRITON_INTERPRET set, which must be before Triton is
imported; such a process can compile nothing. Without it, on a machine with a GPU, the same checks run there, through
`python -m tests.gpu.run` or with

    python -m pytest -o python_files='check_*.py' tests/triton_kernels/interpreted

The files are named check_*.py, which an ordinary run does not collect.
"""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.testing import poisoned

from .inputs import INTERPRETED

if INTERPRETED:
    from .interpreter import as_exact_as_a_gpu


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if INTERPRETED:
        as_exact_as_a_gpu(monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    """What launchers allocate is full of NaN, so that an element that no program writes is seen."""

    def empty(shape, *, dtype, device):
        return poisoned(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(*x.shape, dtype=x.dtype, device=x.device))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
