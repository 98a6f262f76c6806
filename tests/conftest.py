"""Settings of the whole test suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomized: the same examples on every run and machine, so that a red test is a changed program.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads each only make them wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_grad():
    """The ops are for inference; the tests of gradients switch them on again."""
    with torch.no_grad():
        yield
