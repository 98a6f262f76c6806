"""A pytest plugin that runs every k-th test, from the i-th on: `-p tests.gpu.shard` with BIGAIN_SHARD=i/k."""

from __future__ import annotations

import os


def pytest_collection_modifyitems(items):
    first, step = (int(part) for part in os.environ["BIGAIN_SHARD"].split("/"))
    items[:] = items[first::step]
