"""bipartite_match against its definition and the float64 reference: equal matches, or destinations proven to tie."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import SIMILARITY_TOLERANCE, assert_match_is_best

from ..shapes import GRIDS, tokens
from .inputs import CASES, IDS, assert_matches_agree, assert_same_bits, destinations_of, layouts, odd_tokens

OP = "bipartite_match"
HALVES_AND_FLOAT = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("grid", "stride"), GRIDS)
def test_matches_are_the_most_similar_destinations(backend, dtype, grid, stride):
    x = tokens(3, grid[0] * grid[1], 7, dtype, strided=True)
    destinations = destinations_of(x, grid, stride)
    similarity, match = backend.bipartite_match(x, destinations)
    if destinations.shape[1]:
        assert_match_is_best(x, destinations, similarity, match)
    else:
        assert (similarity == -torch.inf).all()
        assert match.tolist() == [list(range(x.shape[1]))] * 3


@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES, ids=IDS)
def test_shapes(backend, dtype, batch, grid, stride, channels, strided):
    """Zero, NaN and infinite tokens, and equal ones, are among them."""
    x = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided)
    destinations = destinations_of(x, grid, stride)
    similarity, match = backend.bipartite_match(x, destinations)
    if destinations.shape[1]:
        assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("window", [0, 1, 2, 50])
@pytest.mark.parametrize(("grid", "stride"), [((8, 10), (2, 2)), ((7, 11), (3, 2))])
def test_window_definition(backend, grid, stride, window):
    """Only destinations of near tiles are compared, written out."""
    x = tokens(1, grid[0] * grid[1], 6)
    destinations = destinations_of(x, grid, stride)
    similarity, match = backend.bipartite_match(x, destinations, window=window, grid=grid, stride=stride)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    last = (grid[0] // stride[0] - 1, grid[1] // stride[1] - 1)

    def tile(n):
        return min(n // grid[1] // stride[0], last[0]), min(n % grid[1] // stride[1], last[1])

    chosen = destinations[0].tolist()
    for n in set(range(x.shape[1])) - set(chosen):
        near = [d for d in chosen if max(abs(tile(n)[0] - tile(d)[0]), abs(tile(n)[1] - tile(d)[1])) <= window]
        cosine = [unit[0, n].dot(unit[0, d]).item() for d in near]
        assert match[0, n].item() == near[cosine.index(max(cosine))]
        assert similarity[0, n].item() == pytest.approx(max(cosine), abs=1e-6)


@pytest.mark.parametrize("window", [0, 1, 2, 10**12])
@pytest.mark.parametrize(("batch", "grid", "stride", "channels", "strided"), CASES[:-2], ids=IDS[:-2])
@pytest.mark.dtypes(*HALVES_AND_FLOAT)
def test_window(backend, dtype, batch, grid, stride, channels, strided, window):
    x = odd_tokens(batch, grid[0] * grid[1], channels, dtype, strided)
    destinations = destinations_of(x, grid, stride)
    if destinations.shape[1]:
        result = backend.bipartite_match(x, destinations, window, grid, stride)
        assert_matches_agree(result, x, destinations, window, grid, stride)


@pytest.mark.parametrize("window", [10**9, 2**31 - 1, 2**31, 2**63 - 1])
@pytest.mark.parametrize(("grid", "stride"), [((8, 12), (2, 2)), ((8, 12), (3, 2**31 - 1)), ((8, 12), (2**62, 1))])
def test_a_window_of_any_size_is_no_window_at_last(backend, grid, stride, window):
    x = tokens(1, 96, 8)
    destinations = torch.arange(1, 96, 4, dtype=torch.int32)[None]
    expected = reference.bipartite_match(x, destinations)
    similarity, match = backend.bipartite_match(x, destinations, window, grid, stride)
    torch.testing.assert_close(similarity, expected[0], rtol=0, atol=SIMILARITY_TOLERANCE)
    assert torch.equal(match, expected[1])


@pytest.mark.parametrize("window", [0, 1])
def test_window_with_any_list_of_destinations(backend, window):
    """Several destinations in a tile, tiles without one, destinations in the leftover strips."""
    grid, stride = (7, 9), (2, 2)
    x = odd_tokens(2, 63, 64, torch.float32)
    destinations = torch.tensor([[0, 1, 9, 20, 62], [5, 53, 54, 60, 61]], dtype=torch.int32)
    result = backend.bipartite_match(x, destinations, window, grid, stride)
    assert_matches_agree(result, x, destinations, window, grid, stride)


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.dtypes(*HALVES_AND_FLOAT)
def test_window_with_a_crowd_of_destinations(backend, dtype, window):
    """As many as there are tiles, but most of them in two, and large tiles with many sources each."""
    grid, stride = (9, 14), (4, 4)
    x = odd_tokens(2, 126, 24, dtype)
    crowds = [[0, 1, 2, 14, 15, 16], [20, 21, 22, 23, 34, 125]]
    destinations = torch.tensor(crowds, dtype=torch.int32)
    result = backend.bipartite_match(x, destinations, window, grid, stride)
    assert_matches_agree(result, x, destinations, window, grid, stride)


@pytest.mark.parametrize("window", [0, 1])
def test_equal_tokens_within_a_window_match_the_lowest_destination_of_it(backend, dtype, window):
    grid, stride = (6, 8), (2, 2)
    x = torch.full((1, 48, 16), 0.3, dtype=dtype)
    destinations = torch.tensor([[1, 2, 4, 14, 17, 19, 20, 30, 32, 43, 44, 46]], dtype=torch.int32)
    expected = reference.bipartite_match(x, destinations, window, grid, stride)[1]
    assert torch.equal(backend.bipartite_match(x, destinations, window, grid, stride)[1], expected)


@pytest.mark.parametrize("n", [64, 300])
def test_equal_tokens_match_the_lowest_destination(backend, dtype, n):
    x = torch.full((2, n, 64), 0.3, dtype=dtype)
    destinations = torch.arange(1, n, 2, dtype=torch.int32).repeat(2, 1)
    similarity, match = backend.bipartite_match(x, destinations)
    assert (match[:, ::2] == 1).all()
    assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("channels", [1536, 4096])
@pytest.mark.dtypes(*HALVES_AND_FLOAT)
def test_long_sums_of_similar_tokens(backend, dtype, channels):
    """Similarities near one, whose sums never cancel: where an accumulator that truncates errs the most."""
    x = odd_tokens(1, 40, channels, dtype) * 0.05 + 1
    destinations = torch.arange(3, 40, 4, dtype=torch.int32)[None]
    assert_match_is_best(x, destinations, *backend.bipartite_match(x, destinations))


def test_one_nan_takes_the_direction_of_a_token(backend, dtype):
    x = tokens(1, 24, 20, dtype)
    x[0, 3, 19] = x[0, 8, 0] = torch.nan
    destinations = torch.tensor([[1, 8, 15]], dtype=torch.int32)
    similarity, match = backend.bipartite_match(x, destinations)
    assert similarity[0, 3] == -torch.inf
    assert 8 not in match[0, [n for n in range(24) if n not in (3, 8)]]
    assert_match_is_best(x, destinations, similarity, match)


def test_without_any_direction(backend):
    x = torch.zeros(1, 140, 64)
    destinations = torch.tensor([[7, 9, 30, *range(40, 130)]], dtype=torch.int32)
    expected = reference.bipartite_match(x, destinations)
    for actual, wanted in zip(backend.bipartite_match(x, destinations), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_large_and_small_tokens(backend):
    """Squares overflow, or dot products reach the end of the range: no direction, or the right similarity."""
    x = odd_tokens(1, 40, 64, torch.float32)
    x[0, 10] *= 1e-18
    x[0, 11] *= 1e18
    x[0, 12] *= 1e30
    destinations = torch.tensor([[2, 11, 12, 13]], dtype=torch.int32)
    expected = reference.bipartite_match(x, destinations)
    similarity, match = backend.bipartite_match(x, destinations)
    torch.testing.assert_close(similarity, expected[0], rtol=0, atol=SIMILARITY_TOLERANCE)
    assert torch.equal(match, expected[1])


@pytest.mark.parametrize("window", [None, 1])
def test_same_bits_in_any_layout_batch_and_order(backend, dtype, window):
    grid, stride = (5, 9), (2, 2)
    x = tokens(2, 45, 24, dtype)
    destinations = destinations_of(x, grid, stride)
    expected = backend.bipartite_match(x, destinations, window, grid, stride)
    results = [backend.bipartite_match(x, destinations, window, grid, stride) for _ in backend.orders()]
    results += [backend.bipartite_match(view, destinations, window, grid, stride) for view in layouts(x)]
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            assert_same_bits(actual, wanted)
    if backend.name != "reference":  # torch may multiply a batch of one in another way, to other last bits
        alone = backend.bipartite_match(x[1:], destinations[1:], window, grid, stride)
        for actual, wanted in zip(alone, expected, strict=True):
            assert_same_bits(actual, wanted[1:])


@pytest.mark.parametrize(("shape", "count"), [((0, 8, 4), 0), ((0, 8, 4), 3), ((2, 8, 0), 0), ((2, 8, 0), 3)])
def test_empty(backend, shape, count):
    x, destinations = torch.zeros(shape), torch.arange(count, dtype=torch.int32).repeat(shape[0], 1)
    expected = reference.bipartite_match(x, destinations)
    for actual, wanted in zip(backend.bipartite_match(x, destinations), expected, strict=True):
        assert torch.equal(actual, wanted)
