"""Derivatives of the ops: right to the second order, by whichever means they are asked for, and kept small."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves

import bigain_kernels as bk
from bigain_kernels.testing import assert_close
from tests.contract.inputs import norm_operands, positive_weights, random_plan
from tests.shapes import tokens

PLAN = random_plan(2, 15)
DOUBLE = torch.float64
X = tokens(4, 15, 3, DOUBLE)
Y = tokens(4, PLAN.num_slots, 3, DOUBLE, seed=1)
WEIGHTS = positive_weights(4, 15).double()
NORM = norm_operands(4, 3, DOUBLE)
ALPHA = torch.tensor([0.3, 0.0, 1.0, 1.2])
W_K, W_V = tokens(2, 4, 3, DOUBLE, seed=3)
B_K, B_V = tokens(2, 1, 4, DOUBLE, seed=4)[:, 0]
Q, K, V = (tokens(2, 17, 4, DOUBLE, seed=seed).unflatten(2, (2, 2)).transpose(1, 2) for seed in (5, 6, 7))
TEXT = {"image_tokens": (1, 16)}
CASES = {
    "mean": (lambda x: bk.token_merge(x, PLAN), X),
    "mean, weights": (lambda x, w: bk.token_merge(x, PLAN, weights=w), X, WEIGHTS),
    "mlerp": (lambda x: bk.token_merge(x, PLAN, "mlerp"), X),
    "mlerp, weights": (lambda x, w: bk.token_merge(x, PLAN, "mlerp", w), X, WEIGHTS),
    "prune": (lambda x: bk.token_merge(x, PLAN, "prune"), X),
    "norm": (lambda x: bk.token_merge(x, PLAN, norm_eps=1e-3), X),
    "norm, all": (
        lambda x, w, *given: bk.token_merge(x, PLAN, "mean", w, norm_eps=1e-3, **dict(zip(NORM, given, strict=True))),
        X,
        WEIGHTS,
        *NORM.values(),
    ),
    "unmerge": (lambda y: bk.token_unmerge(y, PLAN), Y),
    "unmerge, all": (lambda y, residual, gate: bk.token_unmerge(y, PLAN, residual, gate), Y, X, X[:, 0]),
    "pool": (lambda x, y: bk.kv_downsample((x, y), (5, 3), (2, 2), 0.8), X, X[..., :2]),
    "nearest": (lambda x: bk.kv_downsample(x, (5, 3), (2, 1), 1.0), X),
    "average": (lambda x: bk.kv_downsample(x, (5, 3), (2, 1), 0.0), X),
    "pool, rows": (lambda x: bk.kv_downsample(x, (3, 5), (3, 2), ALPHA), X),
    # A window as large as the grid: one share for all tokens.
    "pool, one window": (lambda x: bk.kv_downsample(x, (5, 3), (5, 3), 0.8), X),
    "pool, one window, rows": (lambda x: bk.kv_downsample(x, (1, 15), (1, 15), ALPHA), X),
    "projection": (lambda x, *w: bk.pooled_kv_projection(x, (5, 3), 2, 1.2, *w), X, W_K, W_V, B_K, B_V),
    "projection, one window": (lambda x, *w: bk.pooled_kv_projection(x, (3, 5), (3, 5), 1.2, *w), X, W_K, W_V),
    "attention": (lambda q, k, v: bk.kv_downsample_attention(q, k, v, (3, 5), 2, 0.8, **TEXT), Q, K, V),
    "attention, one window": (
        lambda q, k, v: bk.kv_downsample_attention(q, k, v, (3, 5), (3, 5), 0.8, **TEXT),
        *(Q, K, V),
    ),
    "attention, bias": (
        lambda q, k, v, bias: bk.kv_downsample_attention(q, k, v, (3, 5), 3, 0.8, 0.4, bias, **TEXT),
        *(Q, K, V),
        Q[:1, 0, :3, 0],
    ),
}
# PyTorch's attention has no second derivative, and says so.
TWICE = [name for name in CASES if not name.startswith("attention")]


@pytest.fixture(autouse=True)
def _grad():
    with torch.enable_grad():
        yield


def leaves(name):
    return [x.clone().requires_grad_() for x in CASES[name][1:]]


def loss(results, power=2):
    return sum(y.pow(power).sum() for y in tree_leaves(results))


def grads(name, inputs, **kwargs):
    return torch.autograd.grad(loss(CASES[name][0](*inputs)), inputs, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_finite_differences(name):
    assert gradcheck(CASES[name][0], leaves(name), fast_mode=True)
    if name in TWICE:
        assert gradgradcheck(CASES[name][0], leaves(name), fast_mode=True)


def test_attention_has_no_second_derivative():
    (first, *_) = grads("attention", leaves("attention"), create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_transforms_of_functions_agree_with_autograd(name):
    function, x, *others = CASES[name]
    expected = grads(name, leaves(name))[0]

    def of(x):
        return loss(function(x, *others))

    torch.testing.assert_close(func.grad(of)(x), expected)
    torch.testing.assert_close(func.vmap(func.grad(of))(torch.stack([x, 0 * x]))[0], expected)
    torch.testing.assert_close(func.grad(lambda x: func.vmap(of)(x).sum())(torch.stack([x, x]))[1], expected)


@pytest.mark.parametrize("name", TWICE)
def test_nested_transforms_agree_with_autograd(name):
    """The outer one sees the inner one's steps, which would be zeros otherwise."""
    function, x, *others = CASES[name]

    def of(x):
        return loss(function(x, *others), 3)

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), leaf)
    assert second.abs().max() > 1e-3
    torch.testing.assert_close(func.grad(lambda x: func.grad(of)(x).sin().sum())(x), second)


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_needed_is_differentiated(name):
    function, *inputs = CASES[name]
    expected = grads(name, leaves(name))
    for i, x in enumerate(inputs):
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(function(*inputs[:i], leaf, *inputs[i + 1 :])), leaf)
        torch.testing.assert_close(found, expected[i])
    results = tree_leaves(function(*leaves(name)))
    if len(results) > 1:  # and only what something follows from
        assert len(torch.autograd.grad(results[1].sum(), leaves(name), allow_unused=True)) == len(inputs)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, DOUBLE])
def test_operands_of_a_norm_have_dtypes_of_their_own(kind):
    """Each gets its gradient in its dtype, computed in that of the tokens, float32."""
    function, x, *others = CASES["norm, all"]
    others = [y.to(kind) for y in others]
    wide = [y.double().clone().requires_grad_() for y in (x, *others)]
    expected = torch.autograd.grad(loss(function(*wide)), wide)
    inputs = [x.float().requires_grad_(), *(y.clone().requires_grad_() for y in others)]
    found = torch.autograd.grad(loss(function(*inputs)), inputs)
    for one, other, given in zip(found, expected, inputs, strict=True):
        assert one.dtype == given.dtype
        assert_close(one, other, torch.float32 if given.dtype == DOUBLE else None)


def saved(function, *inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(*inputs)
    return [x for x in kept if x.is_floating_point()]


def test_linear_ops_keep_no_tokens():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert not saved(lambda: bk.token_merge(x, PLAN))
    assert not saved(lambda: bk.token_merge(x, PLAN, "prune"))
    assert not saved(lambda: bk.token_unmerge(y, PLAN, residual=x))
    assert not saved(lambda: bk.kv_downsample((x, x), (5, 3), 2, 0.8))
    gated = saved(lambda: bk.token_unmerge(y, PLAN, gate=X[:, 0]))
    assert [x.shape for x in gated] == [(4, 3)]
    frozen = saved(lambda: bk.pooled_kv_projection(x, (5, 3), 2, 0.8, W_K, W_V, B_K, B_V))
    assert [x.shape for x in frozen] == [(4, 3), (4, 3)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_any_layout_and_the_same_bits_again(name):
    inputs = leaves(name)
    results = tree_leaves(CASES[name][0](*inputs))
    shapes = [y.shape for y in results]
    kinds = {
        "expanded": [y.new_ones(()).expand(shape) for y, shape in zip(results, shapes, strict=True)],
        "transposed": [torch.rand(shape[::-1], dtype=DOUBLE).permute(*range(len(shape))[::-1]) for shape in shapes],
    }
    for kind, given in kinds.items():
        found = torch.autograd.grad(results, inputs, given, retain_graph=True)
        again = torch.autograd.grad(results, inputs, [x.contiguous() for x in given], retain_graph=True)
        for one, other in zip(found, again, strict=True):
            torch.testing.assert_close(one, other, msg=kind)
        repeated = torch.autograd.grad(results, inputs, given, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(found, repeated, strict=True))


@pytest.mark.parametrize("name", ["mean", "mlerp", "prune", "norm", "unmerge", "pool", "nearest"])
def test_gradients_of_tokens_do_not_depend_on_the_rest_of_the_batch_or_threads(name):
    function, *inputs = CASES[name]
    whole = [x.float().requires_grad_() for x in inputs]
    pair = [x[:2].detach().requires_grad_() for x in whole]
    threads = torch.get_num_threads()
    expected = torch.autograd.grad(loss(function(*whole)), whole)
    torch.set_num_threads(4)
    try:
        found = torch.autograd.grad(loss(function(*pair)), pair)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other[:2]) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["mean", "mlerp", "prune", "norm", "unmerge", "pool", "projection"])
def test_empty_batches(name):
    function, x, *others = CASES[name]
    others = [y[:0] if name == "pool" else y for y in others]
    leaf = x[:0].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(function(leaf, *others)), leaf)
    assert found.shape == leaf.shape


@pytest.mark.parametrize("name", CASES)
def test_compiled_backward_is_the_eager_one(name):
    torch._dynamo.reset()
    inputs = leaves(name)
    compiled = torch.compile(CASES[name][0], fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(loss(compiled(*inputs)), inputs)
    for one, other in zip(found, grads(name, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CASES)
def test_under_hooks_on_saved_tensors(name):
    """Those of offloading and checkpointing, in force in both passes: the same bits, and the hooks stay in force."""
    function, *inputs = CASES[name]
    inputs = [x.clone().requires_grad_() for x in inputs]
    packed = []

    def gradients():
        return torch.autograd.grad(sum(y.square().sum() for y in tree_leaves(function(*inputs))), inputs)

    wanted = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x.clone(), lambda x: x):
        found = gradients()
        before = len(packed)
        inputs[0].square()
        assert len(packed) > before > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
