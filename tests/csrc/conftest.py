"""The tests of this folder need the native library, except those of the build."""

import pytest

from bigain_kernels import native


@pytest.fixture
def cpp():
    """Skips where the installation has no native library, and says why."""
    if native.REASON:
        pytest.skip(f"no native library: {native.REASON}")
