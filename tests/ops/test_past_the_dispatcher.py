"""Public functions go past the dispatcher of PyTorch only where nothing waits there for the op."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bigain_kernels as bk
from bigain_kernels import MergePlan
from bigain_kernels.ops import _library

GRID = (4, 4)


def score(x):
    return bk.laplacian_score(x, GRID)


@pytest.fixture
def plain(monkeypatch):
    """What was found of each call: whether it is plain."""
    found, is_plain = [], _library._is_plain

    def noted(args):
        found.append(is_plain(args))
        return found[-1]

    monkeypatch.setattr(_library, "_is_plain", noted)
    return found


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_usual_calls_go_past_it(plain, around, kind):
    with around():
        x = kind(torch.randn(2, 16, 8)).requires_grad_(False)
        assert torch.equal(score(x), torch.ops.bigain.laplacian_score(x, *GRID, "l1"))
    assert plain == [True]


class Modes(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Modes, Functions])
def test_modes_see_the_op(plain, mode):
    seen = []
    with mode(seen):
        score(torch.randn(2, 16, 8))
    assert "bigain.laplacian_score.default" in seen
    assert plain == [False]


class Own(torch.Tensor):
    pass


def of_forward_ad(x):
    with forward_ad.dual_level():
        return score(x)


def recorded(x):
    with torch.enable_grad():
        assert bk.token_merge(x.requires_grad_(), MergePlan.identity(2, GRID)).requires_grad


def profiled(x):
    with torch.profiler.profile() as profile:
        score(x)
    assert "bigain::laplacian_score" in {event.name for event in profile.events()}


def autocast(x):
    with torch.autocast("cpu"):
        score(x)


def traced(x):
    assert "bigain::laplacian_score" in str(torch.jit.trace(score, x, check_trace=False).graph)


def to_graph(x):
    assert "laplacian_score" in make_fx(score)(x).code


WATCHED = {
    "profiler": profiled,
    "autocast": autocast,
    "torch.jit.trace": traced,
    "make_fx": to_graph,
    "vmap": lambda x: torch.func.vmap(score)(x[None]),
    "functionalize": lambda x: torch.func.functionalize(score)(x),
    "forward mode": of_forward_ad,
    "gradients": recorded,
    "a negated view": lambda x: score(torch.complex(x, x).conj().imag),
    "a subclass": lambda x: score(x.as_subclass(Own)),
    "meta tensors": lambda x: score(x.to("meta")),
    "fake tensors": lambda x: score(FakeTensorMode().from_tensor(x)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("by", WATCHED)
def test_who_watches_gets_the_op(plain, by):
    WATCHED[by](torch.randn(2, 16, 8))
    assert plain
    assert not any(plain)


def test_compiled_code_has_the_op(plain):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(score, fullgraph=True, backend=backend)(torch.randn(2, 16, 8))
    assert "torch.ops.bigain.laplacian_score.default" in graphs[0]
    assert plain == []
