from __future__ import annotations

import numpy as np
import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.testing import assert_match_is_best
from bigain_kernels.triton_kernels import bipartite_match, configs
from bigain_kernels.triton_kernels.aot import ARCHITECTURES
from bigain_kernels.triton_kernels.bipartite_match import launch_bipartite_match, launch_match
from tests import tensor_core
from tests.contract.inputs import destinations_of, odd_tokens

from .inputs import DTYPES, INTERPRETED, ON_GPU, candidates, on_device

launch_bipartite_match, launch_match = on_device(launch_bipartite_match), on_device(launch_match)

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
KEPT, GROUPED = {**SMALL, "KEEP": True}, {**SMALL, "BLOCK_M": 32, "GROUPS": 2}


def shipped(dtype, window):
    """The configs that must agree: on a GPU those it takes for such a call, in the interpreter all there are."""
    if INTERPRETED:
        ops = ("bipartite_match", "bipartite_match_narrow", "bipartite_match_fp32", "bipartite_match_window")
        every = [c for op in ops for architecture in ARCHITECTURES for c in configs.candidates(op, architecture)]
        # Warps and stages are nothing to the interpreter: configs that differ in these alone are one case.
        different = {repr([(k, c[k]) for k in sorted(c) if k.isupper()]): c for c in [*every, SMALL, KEPT, GROUPED]}
        return list(different.values())
    return candidates(bipartite_match.config_op(dtype, 72, window))


@pytest.mark.parametrize("config", [SMALL, KEPT, GROUPED], ids=["read again", "kept", "in groups"])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_match_the_lowest_destination(dtype, split, config):
    x = torch.full((2, 64, 64), 0.3, dtype=dtype)
    destinations = torch.arange(1, 64, 3, dtype=torch.int32).repeat(2, 1)
    similarity, match = launch_bipartite_match(x, destinations, config={**config, "SPLIT": split})
    sources = torch.ones(64, dtype=torch.bool)
    sources[destinations[0].long()] = False
    assert (match[:, sources] == 1).all()
    assert_match_is_best(x, destinations, similarity, match)


@pytest.mark.parametrize("count", [21, 32, 48, 65])
@pytest.mark.parametrize("tiles", [7, 16, 24])
def test_of_equal_destinations_in_any_order_within_their_row_the_lowest_is_taken(tiles, count):
    """As L-GTM lists them: rows of tiles ascend, within one the tokens do not."""
    n = 2 * count
    order = torch.cat([row.flip(0) for row in torch.arange(0, n, 2, dtype=torch.int32).split(tiles)])[None]
    x = torch.full((1, n, 16), 0.3, dtype=torch.bfloat16)
    norm = 1 / x.float().norm(dim=2)
    words = norm[0, order.long()].view(torch.int32).long() << 32 | order
    sources = torch.arange(1, n, 2, dtype=torch.int32)[None]
    for split in (1, 2):
        packed = torch.full((1, n), -(1 << 63))
        config = {**KEPT, "SPLIT": split}
        launch_match(x, norm, sources, words, min(tiles, count), None, None, None, packed, config)
        assert (packed[0, 1::2] & 0x7FFFFFFF == 0x7FFFFFFF).all()


def test_a_window_beside_which_tiles_are_high():
    """All rows of tiles and a part of their columns: the tokens of as many rows as columns would pass 2^31."""
    grid, stride, window = (10, 20_000), (10, 1), 15_000
    x, norm = torch.ones(1, 200_000, 1), torch.ones(1, 200_000)
    order = torch.tensor([[0, 19_999, 180_000]], dtype=torch.int32)
    words = norm[0, order.long()].view(torch.int32).long() << 32 | order
    sources = torch.tensor([[1, 15_000, 15_001, 19_998, 199_998]], dtype=torch.int32)
    packed = torch.full((1, 200_000), -(1 << 63))
    launch_match(x, norm, sources, words, 1, grid, stride, window, packed, {**SMALL, "SPLIT": 1})
    match = packed[0, sources[0].long()] & 0x7FFFFFFF ^ 0x7FFFFFFF
    assert match.tolist() == [0, 0, 19_999, 19_999, 19_999]


@pytest.mark.parametrize("split", [1, 2])
def test_without_any_direction(split):
    x = torch.zeros(1, 40, 64)
    destinations = torch.tensor([[7, 9, 30]], dtype=torch.int32)
    similarity, match = launch_bipartite_match(x, destinations, config={**SMALL, "SPLIT": split})
    expected = reference.bipartite_match(x, destinations)
    assert torch.equal(similarity, expected[0])
    assert torch.equal(match, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 2])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_ways_to_sum_parts_give_the_same_bits(dtype):
    """Three parts, the last one short: a loop for each, or one accumulator put aside."""
    x = odd_tokens(1, 24, 584, dtype)
    destinations = torch.arange(0, 24, 4, dtype=torch.int32)[None]
    one, other = (launch_bipartite_match(x, destinations, config={**SMALL, "NEST": nest}) for nest in (False, True))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert_match_is_best(x, destinations, *one)


def test_the_split_does_not_decide_between_destinations_that_round_to_one_similarity():
    """Multiples of a few directions: their similarities differ before the source's own scale rounds them, or after."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator)[torch.arange(256) % 4]
    scales = torch.rand(2, 256, 1, generator=generator) * 4 + 0.1
    x = directions * scales
    destinations = torch.arange(0, 256, 3, dtype=torch.int32).repeat(2, 1)
    one, other, third = (
        launch_bipartite_match(x, destinations, config={**SMALL, "BLOCK_M": 64, "SPLIT": split}) for split in (1, 2, 4)
    )
    for similarity, match in (other, third):
        assert torch.equal(similarity, one[0])
        assert torch.equal(match, one[1])


# The channels of the models there are (U-Nets, DiT, PixArt, SD 3, Flux, video), the most that stay one part, and 4,096.
WIDTHS = [320, 384, 640, 1152, 1280, 1536, 2432, 3072, 4096]


def similar_tokens(channels, cosine, dtype, n=24):
    """(1, n, channels) tokens any two of which have about that cosine."""
    generator = torch.Generator().manual_seed(channels)
    common, own = torch.randn(channels, generator=generator), torch.randn(1, n, channels, generator=generator)
    return (cosine**0.5 * common + (1 - cosine) ** 0.5 * own).to(dtype)


def error_on_tensor_cores(monkeypatch, x):
    """The largest error of a similarity when the kernel's products are summed as tensor cores sum."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, total, *precision):
        a, b = ((each.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for each in (a, b))
        return TensorHandle(tensor_core.dot(a, b, total.data), total.dtype.scalar)

    destinations = torch.arange(0, x.shape[1], 2, dtype=torch.int32)[None]
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        similarity, _ = launch_bipartite_match(x, destinations, config=KEPT)
    expected, _ = reference.bipartite_match(x.double(), destinations)
    return (similarity - expected)[:, 1::2].abs().max().item()


@pytest.mark.skipif(ON_GPU, reason="replaces the products of the interpreter")
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("cosine", [0.95, 0.999])
def test_similarities_survive_sums_that_are_cut_off(monkeypatch, channels, cosine):
    x = similar_tokens(channels, cosine, torch.bfloat16)
    assert error_on_tensor_cores(monkeypatch, x) <= 1e-6
    monkeypatch.setattr(bipartite_match, "LONGEST_PART", 10_000)
    if channels >= 1152:
        assert error_on_tensor_cores(monkeypatch, x) > 1e-6
