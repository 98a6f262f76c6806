"""Settings of the whole test suite."""

import gc
import os

import pytest
import torch

from bigain_kernels import native, use_backend

from .contract_table import pytest_terminal_summary  # noqa: F401 - a hook
from .interpreted import pytest_pyfunc_call, pytest_runtestloop, pytest_unconfigure  # noqa: F401 - hooks

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads each only make them wait for one another.
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--backend", action="append", help="run the contract suite on this backend alone; may be repeated")
    parser.addoption(
        "--slow", choices=("yes", "no", "only"), default="yes", help="run the slow tests too, not, or alone"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: compiles or installs for seconds (docs/testing.md); see --slow")
    config.addinivalue_line("markers", "interpreted: runs where Triton interprets its kernels (tests/interpreted.py)")
    config.addinivalue_line("markers", "dtypes(*dtypes): of the dtypes of a backend, those that a contract case takes")


def pytest_collection_finish():
    """The tests and what they import live to the end; a tenth of tracing a model was the search for garbage in them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--slow")
    if wanted == "yes":
        return
    # All that reads what nvcc builds waits for that build.
    chosen, left_out = [], []
    for item in items:
        slow = item.get_closest_marker("slow") is not None or "cuda_library" in item.fixturenames
        (chosen if slow == (wanted == "only") else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


@pytest.fixture(autouse=True)
def _no_grad():
    """Nothing is recorded; the tests of gradients switch that on again."""
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
