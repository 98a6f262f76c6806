"""Blocks of every family under torch.compile, at three sizes of pictures: no more graphs than without compression."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.diffusers import apply_token_compression
from bigain_kernels.diffusers.families import family_of

from .test_matrix import CLOSE, MODES, NAMES, NO_GRAPH, inputs_of, model_of, results

pytestmark = pytest.mark.slow

# The second makes sizes dynamic; the third must not be new to the graphs.
SIZES = ((4, 4), (6, 10), (8, 6))


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


def graphs_by_size(name: str, mode: str | None) -> list[int]:
    """How many graphs there are after each size."""
    torch._dynamo.reset()
    model, counts = model_of(name), [0]

    def count(module, example_inputs):
        counts[-1] += 1
        return module.forward

    if mode is not None:
        apply_token_compression(model, MODES[mode])
    calls = [inputs_of(name, size) for size in SIZES]
    eager = [results(model, call) for call in calls]
    for block in {layer.block for layer in family_of(model).layers(model)}:
        block.compile(fullgraph=True, backend=count)
    for call, wanted in zip(calls, eager, strict=True):
        torch.testing.assert_close(results(model, call), wanted, **CLOSE)
        counts.append(counts[-1])
    return counts[:-1]


# DiT takes squares alone, and is in test_compile.py; merging in blocks is there and in test_families.py.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*NO_GRAPH, "dit")])
def test_blocks_that_pool_at_three_sizes(name):
    counts = graphs_by_size(name, "pool")
    assert counts[1] == counts[2]
    assert counts == graphs_by_size(name, None)
