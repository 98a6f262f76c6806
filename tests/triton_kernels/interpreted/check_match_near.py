from __future__ import annotations

import pytest
import torch

from bigain_kernels.testing import SIMILARITY_TOLERANCE
from bigain_kernels.triton_kernels import bipartite_match, match_near
from bigain_kernels.triton_kernels.bipartite_match import launch_bipartite_match
from bigain_kernels.triton_kernels.laplacian_score import launch_score_and_select
from bigain_kernels.triton_kernels.match_near import is_near, launch_match_near
from tests.contract.inputs import destinations_of, odd_tokens

from .inputs import DTYPES, candidates, on_device

launch_bipartite_match = on_device(launch_bipartite_match)
STRIDE = (2, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [72, 264])
def test_every_config_gives_the_same_bits(dtype, channels):
    x = odd_tokens(1, 35, channels, dtype)
    destinations = destinations_of(x, (5, 7), STRIDE)
    results = [
        launch_bipartite_match(x, destinations, 1, (5, 7), STRIDE, config) for config in candidates("match_near")
    ]
    for similarity, match in results:
        assert torch.equal(similarity, results[0][0])
        assert torch.equal(match, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize(("grid", "stride"), [((7, 8), STRIDE), ((8, 7), (4, 3))])
def test_tensor_cores_decide_the_same(monkeypatch, dtype, window, grid, stride):
    x = odd_tokens(2, grid[0] * grid[1], 72, dtype)
    destinations = destinations_of(x, grid, stride)
    near = launch_bipartite_match(x, destinations, window, grid, stride)
    monkeypatch.setattr(bipartite_match, "is_near", lambda *_: False)
    other = launch_bipartite_match(x, destinations, window, grid, stride)
    torch.testing.assert_close(near[0], other[0], rtol=0, atol=SIMILARITY_TOLERANCE)
    assert torch.equal(near[1], other[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "stride", "channels"),
    [((5, 7), STRIDE, 24), ((7, 8), (3, 2), 24), ((3, 13), (3, 9), 24), ((4, 6), STRIDE, 640)],
)
def test_lists_by_tile_and_any_lists_give_the_same_bits(dtype, grid, stride, channels):
    """What the score pass lists, and what is listed of ascending destinations, each with norms of its own."""
    x = odd_tokens(2, grid[0] * grid[1], channels, dtype)
    scored = launch_score_and_select(x, grid, stride)
    packed, lists = scored["packed"], (scored["inverse_norm"], scored["sources"], scored["words"])
    launch_match_near(x, *lists, None, grid[1] // stride[1], grid, stride, 1, packed)
    destinations = scored["destinations"].sort(1).values
    similarity, match = launch_bipartite_match(x, destinations, 1, grid, stride)
    assert torch.equal((packed & 0x7FFFFFFF).int() ^ 0x7FFFFFFF, match)
    key = (packed >> 32).int()
    assert torch.equal((key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32), similarity)


def test_it_follows_from_the_numbers_of_a_call():
    """Not from its batch or config, and a window of more than one tile, or a crowd, is for the tensor cores."""
    assert is_near(0, (8, 8), (2, 2), 16)
    assert is_near(match_near.WIDEST, (8, 8), (2, 2), 16)
    assert not is_near(match_near.WIDEST + 1, (8, 8), (2, 2), 16)
    assert not is_near(1, (8, 8), (2, 2), 17)
    assert not is_near(None, (8, 8), (2, 2), 16)
    assert is_near(1, (1, 7), (2, 2), 3)
