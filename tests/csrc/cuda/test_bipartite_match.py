"""The CUDA matching kernel against the reference: every dtype, tile, number of blocks, layout and window."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_match_is_best
from tests.contract.inputs import assert_matches_agree, destinations_of, odd_tokens

from .inputs import DTYPES, ORDERS, on_device

SMALL, LARGE = 0, 1


@pytest.fixture
def match(cuda_ops):
    """bipartite_match of tensors on the CPU, results there; one call, on the device that the library takes."""

    def call(x, destinations, window=None, grid=(1, 1), stride=(1, 1), blocks=0, large=-1):
        where = (-1 if window is None else window, *grid, *stride)
        inputs = on_device(x, cuda_ops.device), on_device(destinations, cuda_ops.device)
        return tuple(out.cpu() for out in cuda_ops.ops.bipartite_match(*inputs, *where, blocks, large))

    return call


@pytest.mark.parametrize("channels", [136, 320, 321])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_number_of_blocks_and_order_gives_the_same_bits(match, cuda_ops, dtype, channels):
    """300 destinations are 3 large tiles of 128. Sources of 136 channels stay in shared memory, those of 320 do not;
    321 channels cannot be copied in whole vectors."""
    x = odd_tokens(1, 460, channels, dtype)
    destinations = torch.arange(40, 340, dtype=torch.int32)[None]
    configs = [(ORDERS[0], 1, SMALL), (ORDERS[0], 1, LARGE), (ORDERS[1], 2, LARGE), (ORDERS[2], 7, SMALL)]
    results = []
    for order, blocks, large in configs:
        cuda_ops.set_order(order)
        results.append(match(x, destinations, blocks=blocks, large=large))
    cuda_ops.set_order(0)
    assert_match_is_best(x, destinations, *results[0])
    for config, result in zip(configs, results, strict=True):
        assert torch.equal(result[0], results[0][0]), config
        assert torch.equal(result[1], results[0][1]), config


@pytest.mark.parametrize(("grid", "window"), [((9, 15), 1), ((30, 20), 3)])
def test_windows_give_the_same_bits_for_every_number_of_blocks_and_order(match, cuda_ops, grid, window):
    x = odd_tokens(1, grid[0] * grid[1], 24, torch.bfloat16)
    destinations = destinations_of(x, grid, (2, 2))
    results = []
    for order, blocks in zip(ORDERS, (1, 2, 7), strict=True):
        cuda_ops.set_order(order)
        results.append(match(x, destinations, window, grid, (2, 2), blocks))
    cuda_ops.set_order(0)
    assert_matches_agree(results[0], x, destinations, window, grid, (2, 2))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("large", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_match_the_lowest_destination(match, dtype, large, blocks):
    x = torch.full((2, 300, 64), 0.3, dtype=dtype)
    destinations = torch.arange(1, 300, 2, dtype=torch.int32).repeat(2, 1)
    similarity, best = match(x, destinations, blocks=blocks, large=large)
    assert (best[:, ::2] == 1).all()
    assert_match_is_best(x, destinations, similarity, best)


@pytest.mark.parametrize("blocks", [1, 2])
def test_without_any_direction(match, blocks):
    x = torch.zeros(1, 140, 64)
    destinations = torch.tensor([[7, 9, 30, *range(40, 130)]], dtype=torch.int32)
    expected = reference.bipartite_match(x, destinations)
    for actual, wanted in zip(match(x, destinations, blocks=blocks), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_four_launches(match, cuda_ops):
    x, destinations = torch.zeros(2, 40, 8), torch.arange(9, dtype=torch.int32).repeat(2, 1)
    before = cuda_ops.launches()
    match(x, destinations)
    assert cuda_ops.launches() == before + 4


@pytest.mark.parametrize(
    "values", [[-5, 3], [3, 10**9], [100, 200], [9, 2], [4, 4]], ids=["negative", "large", "far", "unsorted", "twice"]
)
@pytest.mark.parametrize("window", [None, 1])
def test_bad_destinations_read_nothing_outside(match, values, window):
    """Their values are on the device and not checked: the result means nothing, but memory stays intact."""
    x = odd_tokens(2, 16, 8, torch.float16)
    destinations = torch.tensor([values] * 2, dtype=torch.int32)
    assert match(x, destinations, window, (4, 4), (2, 2))[0].shape == (2, 16)


def test_bad_arguments(match):
    x, destinations = torch.zeros(1, 4, 4), torch.zeros(1, 1, dtype=torch.int32)
    for message, arguments in [
        ("float64", (x.double(), destinations)),
        ("int32", (x, destinations.long())),
        ("dimensions", (x[0], destinations)),
        ("destinations: got shape", (x, destinations.repeat(2, 1))),
        ("distinct", (x, destinations.repeat(1, 5))),
        ("window", (x, destinations, -2)),
        ("grid", (x, destinations, 0, (3, 3))),
        ("stride", (x, destinations, 0, (2, 2), (0, 1))),
        ("blocks", (x, destinations, None, (1, 1), (1, 1), -1)),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            match(*arguments)


def test_ties_where_destinations_do_not_ascend(cuda_ops):
    """In the chain of lgtm_plan destinations stand in the order of their tiles; ties still go to the lowest token.

    Tokens of 16 signs: scores, norms and similarities are exact, and most of them tie.
    """
    generator = torch.Generator().manual_seed(5)
    few = torch.randint(0, 2, (5, 16), generator=generator) * 2.0 - 1
    x = few[torch.randint(0, 5, (2, 14 * 18), generator=generator)]
    ascending = destinations_of(x, (14, 18), (2, 2)).view(2, 7, 9)
    tiles = torch.stack((ascending // 18 // 2, ascending % 18 // 2), -1).flatten(1, 2)
    assert not torch.equal(tiles, torch.cartesian_prod(torch.arange(7), torch.arange(9)).expand_as(tiles))
    for r in (50, 150):
        tables = cuda_ops.ops.lgtm_plan(x.to(cuda_ops.device), 14, 18, 2, 2, r, -1, 1)
        plan = reference.lgtm_plan(x.double(), (14, 18), (2, 2), r)
        for name, table in zip(("slot", "offsets", "members", "anchor"), tables, strict=True):
            assert torch.equal(table.cpu(), getattr(plan, name)), name
