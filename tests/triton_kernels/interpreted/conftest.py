"""Runs the kernels where they are: on a GPU, or without one in Triton's interpreter, in the process of
tests/interpreted.py, on CPU tensors.
"""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.testing import poisoned

from .inputs import INTERPRETED, ON_GPU

if INTERPRETED:
    from .interpreter import as_exact_as_a_gpu


def pytest_itemcollected(item):
    if not ON_GPU:
        item.add_marker(pytest.mark.interpreted)


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
