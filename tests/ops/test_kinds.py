"""Numbers and tensors of every kind that reach the ops: NumPy's numbers, autocast, views, subclasses, transforms."""

from __future__ import annotations

from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bigain_kernels as bk
from bigain_kernels.testing import samples
from tests.ops.test_registration import GRID, PLAN, PUBLIC_CALLS, Q, X

pytestmark = pytest.mark.usefixtures("backend")
W = X[0, :6]
SCORE = bk.laplacian_score(X, GRID)

# Public calls by the number that they are given; (call, an integer or a number, whether it has to be an integer).
NUMBERS = {
    "grid": (lambda n: bk.laplacian_score(X, (n, 8)), 6, True),
    "stride": (lambda n: bk.select_destinations(SCORE, GRID, (n, 2)), 2, True),
    "window": (lambda n: bk.lgtm_plan(X, GRID, 0.5, window=n), 1, True),
    "window of a match": (lambda n: bk.tome_plan(X, GRID, 0.5, window=n), 1, True),
    "share_plan": (lambda n: bk.lgtm_plan(X, GRID, 0.5, share_plan=n), 2, True),
    "seed": (lambda n: bk.tome_plan(X, GRID, 0.5, seed=n), 3, True),
    "seed of noise": (lambda n: bk.sito_plan(X, GRID, 0.5, seed=n, noise=1), 3, True),
    "r": (lambda n: bk.block_merge_plan(SCORE, GRID, (2, 2), n), 12, True),
    "factor": (lambda n: bk.kv_downsample(X, GRID, n, 0.9), 2, True),
    "factor of attention": (lambda n: bk.kv_downsample_attention(Q, Q, Q, GRID, (n, 2), 0.9), 2, True),
    "image_tokens": (
        lambda n: bk.kv_downsample_attention(Q, Q, Q, (5, 8), 2, 0.9, image_tokens=(n, 43)),
        3,
        True,
    ),
    "num_train_timesteps": (
        lambda n: bk.alpha_schedule((0.8, 1.2), torch.arange(4), n),
        100,
        True,
    ),
    "ratio": (lambda n: bk.lgtm_plan(X, GRID, n), 0.5, False),
    "ratio of abm": (lambda n: bk.abm_plan(X, GRID, n), 0.5, False),
    "noise": (lambda n: bk.sito_plan(X, GRID, 0.5, noise=n), 0.5, False),
    "alpha": (lambda n: bk.kv_downsample(X, GRID, 2, n), 0.75, False),
    "alpha of a projection": (lambda n: bk.pooled_kv_projection(X, GRID, 2, n, W, W), 1, False),
    "alpha of a schedule": (lambda n: bk.alpha_schedule((n, n), torch.arange(4)), 0.75, False),
    "scale": (lambda n: bk.kv_downsample_attention(Q, Q, Q, GRID, 2, 0.9, scale=n), 0.25, False),
    "norm_eps": (lambda n: bk.token_merge(X, PLAN, norm_eps=n), 0.125, False),
    "max_ratio": (lambda n: bk.max_ratio((n, 8), (2, n)), 2, True),
}
INTEGERS = [np.int64, np.int32, np.uint8, np.int16]
REALS = [np.float64, np.float32, np.float16, Fraction]
NO_NUMBERS = [
    np.array,
    lambda n: np.array([n]),
    torch.tensor,
    lambda n: torch.tensor([n]),
    Decimal,
    str,
    bool,
    np.bool_,
    complex,
    lambda n: None,
]


def assert_same(one, other):
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", [*INTEGERS, *REALS], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_are_numbers(name, kind):
    call, number, is_integer = NUMBERS[name]
    if (is_integer and kind in REALS) or (kind in INTEGERS and number != int(number)):
        if is_integer:
            with pytest.raises(TypeError, match=r"^\w+(\[\d\])?: got .*, expected"):
                call(kind(number))
        return
    assert_same(call(kind(number)), call(number))


@pytest.mark.parametrize("kind", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
@pytest.mark.parametrize("name", NUMBERS)
def test_what_only_looks_like_a_number_is_none(name, kind):
    call, number, _ = NUMBERS[name]
    allowed = {
        ("window", None), ("window of a match", None), ("share_plan", None), ("scale", None), ("norm_eps", None),
    }  # fmt: skip
    value = kind(number)
    if (name, value if value is None else ...) in allowed:
        return
    with pytest.raises((TypeError, ValueError), match=r"^\w+(\[\d\])?: got "):
        call(value)


@pytest.mark.parametrize("name", [name for name, (_, _, is_integer) in NUMBERS.items() if not is_integer])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.float64("-inf"), 10**400])
def test_numbers_are_finite(name, value):
    with pytest.raises(ValueError, match=r"^\w+(\[\d\])?: got .*expected a finite number"):
        NUMBERS[name][0](value)


def test_a_size_is_a_grid():
    size = torch.empty(6, 8).shape
    assert_same(bk.lgtm_plan(X, size, 0.5), PLAN)
    assert_same(bk.lgtm_plan(X, list(GRID), 0.5), PLAN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_autocast_changes_nothing(call, dtype):
    """The dtype of a result is the documented one, and what is matched in float32 stays that."""
    x = X.to(dtype)
    expected = PUBLIC_CALLS[call](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = PUBLIC_CALLS[call](x)
    for result, each in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        assert result.dtype == each.dtype
        assert torch.equal(result, each)


def test_autocast_ends_inside_the_ops_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bk.pooled_kv_projection(X, GRID, 2, 0.9, W, W)
        assert torch.nn.functional.linear(X, W).dtype == torch.bfloat16


@pytest.mark.parametrize("call", sorted(samples()))
def test_vmap_is_a_loop(call):
    op, arguments = samples()[call]
    function = getattr(torch.ops.bigain, op)
    several = tree_map_only(torch.Tensor, lambda x: torch.stack([x, x.flip(0)]), arguments)
    dims = tuple(
        0 if isinstance(each, torch.Tensor) else [0] * len(each) if isinstance(each, list) else None
        for each in arguments
    )
    results = func.vmap(function, in_dims=dims)(*several)
    for i in range(2):
        one = function(*tree_map_only(torch.Tensor, lambda x, i=i: x[i], several))
        assert_same(tree_map_only(torch.Tensor, lambda x, i=i: x[i], results), one)


def test_vmap_over_one_argument_and_another_dimension():
    x = torch.stack([X, 2 * X, X.flip(1)], dim=2)
    results = func.vmap(lambda x, y: bk.kv_downsample((x, y), GRID, 2, 0.9), in_dims=(2, None))(x, X)
    for i in range(3):
        assert_same([y[i] for y in results], bk.kv_downsample((x[:, :, i], X), GRID, 2, 0.9))
    with pytest.raises(RuntimeError, match="kv_downsample: got a mapped dimension of size 0, expected at least 1"):
        func.vmap(lambda x: bk.kv_downsample((x, x), GRID, 2, 0.9))(X[None][:0])


def same_tokens(kind):
    """X in memory, or by a flag, in another way."""
    if kind == "transposed":
        return X.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "negated":  # a view with the bit that says so
        return torch.complex(X, -X).conj().imag
    if kind == "expanded":
        return X[:1].expand(4, -1, -1)
    if kind == "parameter":
        return torch.nn.Parameter(X)
    if kind == "subclass":
        return X.as_subclass(type("Own", (torch.Tensor,), {}))
    with torch.inference_mode():
        return X.clone()


@pytest.mark.parametrize("kind", ["transposed", "negated", "expanded", "parameter", "subclass", "inference"])
@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_views_and_subclasses(call, kind):
    x = same_tokens(kind)
    assert x.is_neg() == (kind == "negated")
    expected = PUBLIC_CALLS[call](X if kind != "expanded" else x.contiguous())
    for result, each in zip(tree_leaves(PUBLIC_CALLS[call](x)), tree_leaves(expected), strict=True):
        # The order of PyTorch's own sums follows the layout.
        torch.testing.assert_close(result.as_subclass(torch.Tensor), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_functionalized_and_deterministic(call):
    expected = PUBLIC_CALLS[call](X)
    assert_same(func.functionalize(PUBLIC_CALLS[call])(X), expected)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(PUBLIC_CALLS[call](X), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("op", ["select_destinations", "block_merge_plan", "kv_downsample", "pooled_kv_projection"])
def test_tiles_of_no_size_are_refused_where_nothing_is_computed(op, device):
    arguments = {
        "select_destinations": lambda x: (x[..., 0], 6, 8, 0, 2),
        "block_merge_plan": lambda x: (x[..., 0], 6, 8, 2, 0, 3, "max"),
        "kv_downsample": lambda x: ([x], 6, 8, 2, 0, 0.9, None),
        "pooled_kv_projection": lambda x: (x, 6, 8, 0, 2, 0.9, None, x[0], x[0], None, None),
    }[op]
    with FakeTensorMode() if device == "fake" else nullcontext():
        x = torch.empty(2, 48, 4, device="meta" if device == "meta" else "cpu")
        with pytest.raises(ValueError, match=r"^(stride|factor): got \(.*\), expected both to be at least 1"):
            getattr(torch.ops.bigain, op)(*arguments(x))


@pytest.mark.parametrize("name", ["alpha", "ratio", "scale", "norm_eps", "factor", "window"])
def test_compiled_code_takes_another_number(name):
    call, number, is_integer = NUMBERS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for value in (number, number + (1 if is_integer else 0.125), number + (2 if is_integer else 0.25)):
        assert_same(compiled(value), call(value))
