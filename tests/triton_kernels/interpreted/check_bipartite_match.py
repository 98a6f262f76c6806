from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_match_is_best
from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.aot import ARCHITECTURES
from bigain_kernels.triton_kernels.bipartite_match import launch_bipartite_match

from .inputs import DTYPES, INTERPRETED, candidates, odd_tokens, on_device

launch_bipartite_match = on_device(launch_bipartite_match)

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}


def shipped(dtype, window):
    """The configs that must agree: on a GPU those it takes for such a call, in the interpreter all there are."""
    if INTERPRETED:
        ops = ("bipartite_match", "bipartite_match_fp32", "bipartite_match_window")
        every = [c for op in ops for architecture in ARCHITECTURES for c in configs.candidates(op, architecture)]
        return [config for i, config in enumerate([*every, SMALL]) if config not in every[:i]]
    op = "bipartite_match" if window is None else "bipartite_match_window"
    return candidates("bipartite_match_fp32" if dtype == torch.float32 else op)


def destinations_of(x, grid, stride):
    return reference.select_destinations(reference.laplacian_score(x.float(), grid), grid, stride)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_match_the_lowest_destination(dtype, split):
    x = torch.full((2, 64, 64), 0.3, dtype=dtype)
    destinations = torch.arange(1, 64, 3, dtype=torch.int32).repeat(2, 1)
    similarity, match = launch_bipartite_match(x, destinations, config={**SMALL, "SPLIT": split})
    sources = torch.ones(64, dtype=torch.bool)
    sources[destinations[0].long()] = False
    assert (match[:, sources] == 1).all()
    assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("split", [1, 2])
def test_without_any_direction(split):
    x = torch.zeros(1, 40, 64)
    destinations = torch.tensor([[7, 9, 30]], dtype=torch.int32)
    similarity, match = launch_bipartite_match(x, destinations, config={**SMALL, "SPLIT": split})
    expected = reference.bipartite_match(x, destinations)
    assert torch.equal(similarity, expected[0])
    assert torch.equal(match, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1])
def test_every_config_and_split_gives_the_same_bits(dtype, window):
    grid, stride = (9, 11), (2, 2)
    x = odd_tokens(1, 99, 72, dtype)
    destinations = destinations_of(x, grid, stride)
    results = [
        launch_bipartite_match(x, destinations, window, grid, stride, {**config, "SPLIT": split})
        for config in shipped(dtype, window)
        for split in (1, 4)
    ]
    for similarity, match in results:
        assert torch.equal(similarity, results[0][0])
        assert torch.equal(match, results[0][1])


def test_the_split_does_not_decide_between_destinations_that_round_to_one_similarity():
    """Multiples of a few directions: their similarities differ before the source's own scale rounds them, or after."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator)[torch.arange(256) % 4]
    scales = torch.rand(2, 256, 1, generator=generator) * 4 + 0.1
    x = directions * scales
    destinations = torch.arange(0, 256, 3, dtype=torch.int32).repeat(2, 1)
    one, other, third = (
        launch_bipartite_match(x, destinations, config={**SMALL, "SPLIT": split}) for split in (1, 2, 4)
    )
    for similarity, match in (other, third):
        assert torch.equal(similarity, one[0])
        assert torch.equal(match, one[1])
