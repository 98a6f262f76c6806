"""Settings of the GPU tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _full_precision():
    """The float64 reference needs none of it, but nothing here shall depend on a setting of the machine."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
