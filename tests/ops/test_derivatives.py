"""Whoever asks for a derivative that there is not is told so; indices can be used where others learn."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import bigain_kernels as bk
from tests.ops.test_registration import GRID, OP_CALLS, PLAN, PUBLIC_CALLS, Q, X

REFUSED = r"bigain_kernels\.\w+: has no derivative; run under torch.no_grad\(\) or detach the input"
FORWARD = REFUSED.replace("no derivative", "no forward-mode derivative")
SELECTS = ("select_destinations", "merge_plan", "block_merge_plan", "lgtm_plan")
SCORES = ("laplacian_score", "bipartite_match")


@pytest.fixture(autouse=True)
def _grad():
    with torch.enable_grad():
        yield


def float_inputs():
    """Every tensor that a raw op takes and could have a gradient: (call, its place among the leaves)."""
    for call in sorted(OP_CALLS):
        for place, leaf in enumerate(tree_leaves(OP_CALLS[call][1])):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                yield call, place


def of(call, place):
    """The raw op as a function of one of its tensors, and that tensor."""
    leaves, spec = torch.utils._pytree.tree_flatten(OP_CALLS[call][1])

    def function(x):
        args = torch.utils._pytree.tree_unflatten([x if i == place else leaf for i, leaf in enumerate(leaves)], spec)
        return getattr(torch.ops.bigain, OP_CALLS[call][0])(*args)

    return function, leaves[place].clone()


def total(results):
    return sum(x.double().sum() for x in tree_leaves(results) if x.is_floating_point())


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "grad": lambda f, x: func.grad(lambda x: total(f(x)))(x),
    "vjp": lambda f, x: func.vjp(f, x),
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),)),
    "linearize": lambda f, x: func.linearize(f, x),
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "hessian": lambda f, x: func.hessian(lambda x: total(f(x)))(x),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: total(f(x))))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: func.grad(lambda x: total(func.vmap(f)(x)))(torch.stack([x, x])),
    "dual numbers": dual,
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(lambda x: total(f(x)), x),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(lambda x: total(f(x)), x, torch.ones_like(x)),
}


@pytest.mark.parametrize(("call", "place"), list(float_inputs()))
def test_raw_ops_have_a_derivative_or_refuse_in_backward(call, place):
    function, x = of(call, place)
    results = [y for y in tree_leaves(function(x.requires_grad_())) if y.is_floating_point()]
    assert bool(results) == (OP_CALLS[call][0] not in SELECTS)
    assert any(y.requires_grad for y in results) == bool(results)
    for y in results:
        if OP_CALLS[call][0] in SCORES:
            with pytest.raises(RuntimeError, match=REFUSED):
                y.sum().backward()
    if results and OP_CALLS[call][0] not in SCORES:
        assert torch.autograd.grad(total(results), x)[0].shape == x.shape


CALLS = {
    "laplacian_score": lambda x: bk.laplacian_score(x, GRID),
    "bipartite_match": lambda x: bk.bipartite_match(x, OP_CALLS["bipartite_match"][1][1])[0],
    "token_merge": lambda x: bk.token_merge(x, PLAN),
    "norm": lambda x: bk.token_merge(x, PLAN, norm_eps=1e-5),
    "token_unmerge": lambda x: bk.token_unmerge(X[:, :24].contiguous(), PLAN, residual=x),
    "kv_downsample": lambda x: bk.kv_downsample((X, x), GRID, 2, 0.9),
    "attention": lambda x: bk.kv_downsample_attention(Q, Q, x[:, None].expand(-1, 2, -1, -1), GRID, 2, 0.9),
    "projection": lambda x: bk.pooled_kv_projection(X, GRID, 2, 0.9, x[0, :4], X[0, :4]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", SCORES)
def test_every_transform_refuses_scores(call, transform):
    with pytest.raises(RuntimeError, match=REFUSED):
        TRANSFORMS[transform](CALLS[call], X)


@pytest.mark.parametrize("transform", ["jvp", "linearize", "jacfwd", "hessian", "dual numbers"])
@pytest.mark.parametrize("call", sorted(set(CALLS) - set(SCORES)))
def test_forward_mode_is_refused(call, transform):
    with pytest.raises(RuntimeError, match=FORWARD):
        TRANSFORMS[transform](CALLS[call], X)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "dual numbers"])
@pytest.mark.parametrize("method", ["lgtm", "lgtm window", "abm", "tome", "sito"])
def test_plans_can_be_made_where_others_learn(method, transform):
    """The loss is differentiable, and the choice of tokens in it a constant."""

    def loss(x):
        plan = PUBLIC_CALLS[method](x)
        return (x * plan.assign()[..., None]).sum()

    plain = X.clone().requires_grad_()
    loss(plain).backward()
    result = TRANSFORMS[transform](loss, X)
    if "grad" in transform:
        assert torch.equal(result, plain.grad if transform == "grad" else torch.stack([plain.grad] * 2))


def test_scores_choose_tokens_in_training_code():
    x = X.clone().requires_grad_()
    score = bk.laplacian_score(x, GRID)
    destinations = bk.select_destinations(score, GRID, (2, 2))
    similarity, match = bk.bipartite_match(x, destinations)
    plan = bk.merge_plan(similarity, match, destinations, 20, GRID)
    assert score.requires_grad
    assert not match.requires_grad
    x.gather(1, plan.anchor.long()[..., None].expand(-1, -1, 10)).sum().backward()
    assert x.grad.sum() == plan.anchor.numel() * 10


@pytest.mark.parametrize("call", sorted(PUBLIC_CALLS))
def test_without_gradients_nothing_is_recorded(call):
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not any(y.requires_grad for y in tree_leaves(PUBLIC_CALLS[call](x)))
    with torch.inference_mode():
        expected = PUBLIC_CALLS[call](X)
    results = PUBLIC_CALLS[call](x)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(results), tree_leaves(expected), strict=True))


def test_compiled_code_refuses_in_backward_and_no_sooner():
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["laplacian_score"], fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, CALLS["laplacian_score"](X))
    with pytest.raises(RuntimeError, match=REFUSED):
        y.sum().backward()
