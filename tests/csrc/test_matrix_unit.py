"""What matching by products of bfloat16 (AMX, vdpbf16ps) must get right beyond parity; the same holds of other code."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels.testing import assert_match_is_best
from tests.shapes import DTYPES, tokens

pytestmark = pytest.mark.usefixtures("cpp")
DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.float64)


def every_third(batch, n):
    return torch.arange(0, n, 3, dtype=torch.int32).repeat(batch, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [31, 32, 33, 95, 3072])
def test_wide_and_similar_tokens(dtype, channels):
    """Sums of many products of one sign show how sums are kept: cosines of 0.95 and more."""
    common = torch.randn(1, 1, channels, generator=torch.Generator().manual_seed(3))
    x = (common + 0.2 * tokens(2, 130, channels, seed=4)).to(dtype)
    destinations = every_third(2, 130)
    assert_match_is_best(x, destinations, *bk.bipartite_match(x, destinations))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-120, -60, -41, -12, 0, 12, 39, 42, 60])
def test_magnitudes(dtype, exponent):
    """Tokens far from order one: what the matrix unit takes for zero, or sums to infinity, is matched all the same."""
    if dtype == torch.float16 and not -12 <= exponent <= 12:
        pytest.skip("beyond float16")
    x = (tokens(2, 100, 40, seed=5) * 2.0**exponent).to(dtype)
    destinations = every_third(2, 100)
    similarity, match = bk.bipartite_match(x, destinations)
    if exponent <= -120:
        # Squares of such values vanish in float32: a token without a norm has no direction.
        assert (similarity == -torch.inf).all()
    else:
        assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_does_not_decide_for_another(dtype):
    """A row with a token that the unit cannot take leaves the bits of the other rows as they are."""
    x = tokens(4, 100, 40, dtype, seed=6)
    destinations = every_third(4, 100)
    expected = bk.bipartite_match(x, destinations)
    largest = torch.finfo(dtype).max
    for value in (largest, torch.inf, torch.nan, torch.finfo(dtype).tiny):
        spoiled = x.clone()
        spoiled[1, 7] = value
        similarity, match = bk.bipartite_match(spoiled, destinations)
        for row in (0, 2, 3):
            assert torch.equal(similarity[row], expected[0][row])
            assert torch.equal(match[row], expected[1][row])
        # Elsewhere the square of the largest and of the smallest value is none in float32: no norm, no direction.
        if dtype == torch.float16 or value in (torch.inf, torch.nan):
            assert_match_is_best(spoiled, destinations, similarity, match)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_count_to_the_last_bit(dtype):
    """Destinations that differ in the lowest bits alone, which a product of rounded values would not tell apart."""
    x = torch.zeros(1, 6, 40, dtype=dtype)
    x[0, :, 0] = 1
    step = 8 * torch.finfo(dtype).eps
    x[0, 3, 1], x[0, 4, 1], x[0, 5, 1] = 1.0, 1.0 + step, 1.0 + 2 * step
    x[0, 0, 1] = 1.0 + 2 * step
    destinations = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    similarity, match = bk.bipartite_match(x, destinations)
    assert_match_is_best(x, destinations, similarity, match)
    if dtype != torch.float32:
        assert match[0, 0] == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [2, 33, 70])
def test_equal_destinations_tie_to_the_first(dtype, copies):
    x = tokens(1, 2 * copies, 50, dtype, seed=7)
    x[0, 1::2] = x[0, 1]
    x[0, 3::4] *= 2  # the same direction, exactly
    destinations = torch.arange(1, 2 * copies, 2, dtype=torch.int32)[None]
    _, match = bk.bipartite_match(x, destinations)
    assert (match[0, ::2] == 1).all()


def test_few_products_do_not_decide_what_they_cannot():
    """The three products of float32's parts that come first miss 2^-16 of these similarities, which matters here."""
    x = torch.ones(1, 3, 1024)
    x[:, 0] = x[:, 1] = 1 + 0.98 * 2.0**-8  # in bfloat16 one, and a rest of the same sign everywhere
    x[:, 2, 0] = 1.125  # the second best by 8e-6; without that rest, the best
    destinations = torch.tensor([[1, 2]], dtype=torch.int32)
    similarity, match = bk.bipartite_match(x, destinations)
    assert match[0, 0] == 1
    assert_match_is_best(x, destinations, similarity, match)
