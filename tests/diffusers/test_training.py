"""Compressed models learn: gradients, gradient checkpointing, compiled backward passes, LoRA."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import reference
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    apply_token_compression,
    projections,
    steps,
    token_compression,
)

from .family_models import CASES, WRITTEN_OUT, build, case_of, noise
from .models import TEXT_DIM, tiny_unet

CONFIGS = {"pool": IEKVDConfig(alpha=0.8), "merge": LGTMConfig(proportional=True)}
NAMES = ["unet", *CASES, *WRITTEN_OUT]


@pytest.fixture(autouse=True)
def _grad():
    with torch.enable_grad():
        yield
    torch._dynamo.reset()


def model_of(name):
    return tiny_unet() if name == "unet" else build(name)


def inputs_of(name, size=(6, 6), batch=2):
    if name != "unet":
        return case_of(name).inputs(batch, (case_of(name).frames, *size))
    text = noise(batch, 5, TEXT_DIM, seed=2)
    return {"sample": noise(batch, 4, *(2 * n for n in size)), "timestep": 500, "encoder_hidden_states": text}


def loss(model, inputs):
    found = model(**inputs, return_dict=False)[0]
    return sum(x.square().mean() for x in (found if isinstance(found, (list, tuple)) else [found]))


def gradients(model, *calls):
    """By all parameters, of the sum over several calls."""
    return grads_of(sum(loss(model, call) for call in calls), model)


def grads_of(total, model):
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


def assert_same(found, expected, exactly=False):
    assert found.keys() == expected.keys()
    assert any(g.abs().max() > 1e-4 for g in found.values())
    for name, g in found.items():
        scale = 0 if exactly else 1e-4 * expected[name].abs().max().item() + 1e-7
        torch.testing.assert_close(g, expected[name], rtol=0, atol=scale, msg=name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name, config, monkeypatch):
    """The reference's steps, which PyTorch differentiates, in the places of the ops."""
    model, inputs = model_of(name), inputs_of(name)
    apply_token_compression(model, CONFIGS[config])
    found, called = gradients(model, inputs), []

    def plain(op):
        def run(*args, **kwargs):
            called.append(op)
            return getattr(reference, op)(*args, **kwargs)

        return run

    for op in ("token_merge", "token_unmerge"):
        monkeypatch.setattr(steps, op, plain(op))
    for op in ("kv_downsample", "pooled_kv_projection"):
        monkeypatch.setattr(projections, op, plain(op))
    assert_same(found, gradients(model, inputs))
    assert called


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_bits_with_checkpointing(name, config):
    """Layers that are called again in the backward pass make the plan that they made."""
    model = model_of(name)
    model.train()
    calls = inputs_of(name), inputs_of(name, (8, 8))
    with token_compression(model, CONFIGS[config]):
        expected = gradients(model, *calls)
        model.enable_gradient_checkpointing()
        before, count = model._gradient_checkpointing_func, []
        handles = [
            module.register_forward_pre_hook(lambda *_: count.append(1))
            for name, module in model.named_modules()
            if hasattr(module, "_bigain") and module is not model
        ]
        # Two passes before the first backward pass.
        total = sum(loss(model, call) for call in calls)
        forward = len(count)
        assert_same(grads_of(total, model), expected, exactly=True)
        assert len(count) == 2 * forward
        for handle in handles:
            handle.remove()
    assert model._gradient_checkpointing_func is before
    gradients(model, calls[0])
