"""The shipped model, loaded once."""

from __future__ import annotations

import pytest

from bigain_kernels.evaluation.checkpoints import Checkpoint, load_checkpoint
from bigain_kernels.evaluation.data import Digits, load_digits


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return load_checkpoint()


@pytest.fixture(scope="session")
def digits() -> Digits:
    return load_digits("test")
