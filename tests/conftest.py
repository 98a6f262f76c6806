"""Settings of the whole test suite."""

import os

import pytest
import torch

from bigain_kernels import native, use_backend

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads each only make them wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_grad():
    """The ops are for inference; the tests of gradients switch them on again."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["reference", "cpp"])
def backend(request):
    """Runs the tests of a module once on the reference and once on what the CPU uses when it has the native library."""
    if request.param == "reference":
        with use_backend("reference"):
            yield
    elif native.REASON:
        pytest.skip(f"no native library: {native.REASON}")
    else:
        yield
