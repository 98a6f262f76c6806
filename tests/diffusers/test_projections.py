"""Which layers pool and project in one op, and that all others are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from bigain_kernels.diffusers import IEKVDConfig, apply_token_compression, projections, token_compression
from bigain_kernels.diffusers.projections import is_plain_linear

from .models import dit_inputs, run, sd3_inputs, tiny_dit, tiny_sd3, tiny_unet, unet_inputs

MODELS = [(tiny_unet, unet_inputs), (tiny_dit, dit_inputs), (lambda: tiny_sd3(qk_norm=None), sd3_inputs)]
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


class Lora(nn.Module):
    """A linear layer with a low-rank update, as adapters put it in the layer's place."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.inner = inner
        self.down = nn.Parameter(torch.randn(2, inner.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, generator=generator) * 0.3)

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


def _with_lora(attn):
    attn.to_k, attn.to_v = Lora(attn.to_k), Lora(attn.to_v)


def _with_hook(attn):
    attn.to_k.register_forward_hook(lambda module, args, output: output * 2.0)


def _with_pre_hook(attn):
    attn.to_v.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def _with_replaced_forward(attn):
    """What offloading and layerwise casting do."""
    inner = attn.to_v.forward
    attn.to_v.forward = lambda x: inner(x) * 2.0


def _with_parametrization(attn):
    attn.to_k = parametrizations.weight_norm(attn.to_k)
    assert is_parametrized(attn.to_k)
    with torch.no_grad():
        attn.to_k.parametrizations.weight.original0.mul_(2.0)


class TwiceTensor(torch.Tensor):
    """Stands for the tensors of quantized weights: what a product with it is, only the class knows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) * 2.0 if func is nn.functional.linear else result


def _with_tensor_subclass(attn):
    attn.to_k.weight = nn.Parameter(attn.to_k.weight.detach().as_subclass(TwiceTensor), requires_grad=False)


CHANGES = [
    _with_lora,
    _with_hook,
    _with_pre_hook,
    _with_replaced_forward,
    _with_parametrization,
    _with_tensor_subclass,
]


def _patched(model):
    return [module for module in model.modules() if hasattr(module, "_bigain") and hasattr(module, "to_k")]


@pytest.fixture
def taken(monkeypatch):
    """One entry for each call of the op that pools and projects."""
    calls, op = [], projections.pooled_kv_projection
    monkeypatch.setattr(projections, "pooled_kv_projection", lambda *args: calls.append(1) or op(*args))
    return calls


@pytest.fixture
def never(monkeypatch):
    """The op that pools and projects is not considered: what results must be equal to."""

    def disable():
        monkeypatch.setattr(projections, "is_plain_linear", lambda layer: False)

    return disable


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", [IEKVDConfig(), IEKVDConfig(alpha=(0.2, 1.4), factor=(2, 1), pool="hidden")])
def test_plain_layers_take_the_op_and_agree_with_calling_them(build, inputs, config, taken, never):
    model = build()
    report = apply_token_compression(model, config)
    assert {row.path for row in report.patched} == {"pooled projection"}
    by_op = run(model, inputs())
    assert len(taken) == len(report.patched)
    never()
    torch.testing.assert_close(run(model, inputs()), by_op, **CLOSE)
    assert len(taken) == len(report.patched)
    assert {row.path for row in apply_token_compression(model, config).patched} == {"pool, then project"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [False, True])
def test_changed_layers_are_called(change, after, taken, never):
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig())
    before = run(model, dit_inputs())
    assert len(taken) == 4
    attn = model.transformer_blocks[1].attn1
    change(attn)
    assert not (is_plain_linear(attn.to_k) and is_plain_linear(attn.to_v))
    if not after:
        report = apply_token_compression(model, IEKVDConfig())
        assert [row.path for row in report.rows].count("pool, then project") == 1
        assert report.rows[1].path == "pool, then project"
    taken.clear()
    changed = run(model, dit_inputs())
    assert len(taken) == 3
    assert not torch.allclose(changed, before, atol=1e-4)
    never()
    torch.testing.assert_close(run(model, dit_inputs()), changed, **CLOSE)


def test_lora_that_comes_and_goes_in_compiled_blocks():
    torch._dynamo.reset()
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig())
    plain = run(model, dit_inputs())
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, dit_inputs()), plain, **CLOSE)
    attn = model.transformer_blocks[0].attn1
    layers = attn.to_k, attn.to_v
    _with_lora(attn)
    eager = tiny_dit()
    _with_lora(eager.transformer_blocks[0].attn1)
    with token_compression(eager, IEKVDConfig()):
        torch.testing.assert_close(run(model, dit_inputs()), run(eager, dit_inputs()), **CLOSE)
    attn.to_k, attn.to_v = layers
    torch.testing.assert_close(run(model, dit_inputs()), plain, **CLOSE)
    attn.to_k.forward = lambda x: nn.Linear.forward(layers[0], x) * 3.0
    eager = tiny_dit()
    with torch.no_grad():
        eager.transformer_blocks[0].attn1.to_k.weight.mul_(3.0)
        eager.transformer_blocks[0].attn1.to_k.bias.mul_(3.0)
    with token_compression(eager, IEKVDConfig()):
        torch.testing.assert_close(run(model, dit_inputs()), run(eager, dit_inputs()), **CLOSE)
    torch._dynamo.reset()


def test_layerwise_casting_after_apply(taken):
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig())
    full = run(model, dit_inputs())
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    taken.clear()
    cast = run(model, dit_inputs())
    assert not taken
    assert cast.dtype == torch.float32
    assert (cast - full).abs().mean() < 0.1 * full.abs().mean()


def test_autocast_calls_the_layers(taken):
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig())
    full = run(model, dit_inputs())
    taken.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model, dit_inputs())
        # Inputs in the dtype of the weights too: the layer would cast both.
        attn = model.transformer_blocks[0].attn1
        _, key, value = projections.project_pooled(attn, torch.randn(1, 64, 32), (8, 8), (2, 2), 0.9)
    assert not taken
    assert key.dtype == value.dtype == torch.bfloat16
    assert (low.float() - full).abs().mean() < 0.1 * full.abs().mean()


def test_gradients_are_those_of_the_layers_called(monkeypatch):
    model = tiny_dit()
    apply_token_compression(model, IEKVDConfig())

    def gradients():
        with torch.enable_grad():
            loss = model(**dit_inputs()).sample.square().sum()
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    found = gradients()
    monkeypatch.setattr(projections, "is_plain_linear", lambda layer: False)
    torch.testing.assert_close(found, gradients(), rtol=1e-4, atol=1e-4)
