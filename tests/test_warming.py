"""warm_up: what is called later finds everything compiled and loaded."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import methods
from tests.shapes import tokens


def layer(x, grid=(4, 6)):
    plan = methods.lgtm_plan(x, grid, 0.5)
    return bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x)


def test_every_sample_is_called_without_gradients():
    seen = []

    def call(x, grid):
        seen.append((x.shape, grid, torch.is_grad_enabled()))
        return layer(x, grid)

    samples = [(tokens(1, 24, 16), (4, 6)), {"x": tokens(2, 35, 16), "grid": (5, 7)}]
    assert bk.warm_up(call, samples) == bk.WarmedUp(2, {})
    assert seen == [((1, 24, 16), (4, 6), False), ((2, 35, 16), (5, 7), False)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, [(1,)]), TypeError, "call: got int, expected a model or a function"),
        ((layer, []), ValueError, "samples: got none, expected at least one"),
        ((layer, [torch.zeros(1)]), TypeError, "samples: got a Tensor, expected tuples or dictionaries of arguments"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bk.warm_up(*arguments)
