"""Compressed models learn: gradients, gradient checkpointing, compiled backward passes, LoRA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import reference
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    apply_token_compression,
    projections,
    steps,
    token_compression,
)

from .family_inputs import noise
from .family_models import CASES, WRITTEN_OUT, build, case_of
from .models import TEXT_DIM, tiny_dit, tiny_flux, tiny_unet

CONFIGS = {"pool": IEKVDConfig(alpha=0.8), "merge": LGTMConfig(proportional=True)}
NAMES = ["unet", *CASES, *WRITTEN_OUT]
# diffusers has no checkpointing for the other.
CHECKPOINTED = [name for name in NAMES if name != "hunyuan_dit"]


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


def reference_in_place(monkeypatch):
    """Puts the reference's steps, which PyTorch differentiates, in the places of the ops; a list of those called."""
    called = []

    def plain(op):
        def run(*args, **kwargs):
            called.append(op)
            return getattr(reference, op)(*args, **kwargs)

        return run

    for op in ("token_merge", "token_unmerge"):
        monkeypatch.setattr(steps, op, plain(op))
    for op in ("kv_downsample", "pooled_kv_projection"):
        monkeypatch.setattr(projections, op, plain(op))
    return called


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"of_{name}")
def test_gradients_are_those_of_the_reference(name, config, monkeypatch):
    model, inputs = model_of(name), inputs_of(name)
    apply_token_compression(model, CONFIGS[config])
    found = gradients(model, inputs)
    called = reference_in_place(monkeypatch)
    assert_same(found, gradients(model, inputs))
    assert called


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CHECKPOINTED, ids=lambda name: f"of_{name}")
def test_gradients_are_the_same_bits_with_checkpointing(name, config):
    """Layers that are called again in the backward pass make the plan that they made."""
    model = model_of(name)
    calls = inputs_of(name), inputs_of(name, (8, 8))
    for call in calls:
        # diffusers hands it on to Chroma's blocks of two streams alone.
        call.pop("attention_mask", None)
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


@pytest.mark.parametrize(("name", "config"), [("flux", "merge"), ("dit", "pool")])
def test_whole_models_compile_with_their_backward_pass(name, config):
    model, inputs = tiny_flux(num_layers=1, num_single_layers=1) if name == "flux" else tiny_dit(), inputs_of(name)
    apply_token_compression(model, CONFIGS[config])
    if name == "flux":
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    else:
        del model.transformer_blocks[1:]
    expected = gradients(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(grads_of(loss(compiled, inputs), model), expected)


def test_a_block_of_a_unet_compiles_with_its_backward_pass():
    model, inputs = model_of("unet"), inputs_of("unet")
    apply_token_compression(model, CONFIGS["merge"])
    expected = gradients(model, inputs)
    model.down_blocks[0].attentions[0].transformer_blocks[0].compile(fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, inputs), expected)


def smooth(inputs, name):
    """Inputs as pictures are: neighbours are alike."""
    sample = "sample" if name == "unet" else "hidden_states"
    x = inputs[sample]
    image = x if name == "unet" else x.transpose(1, 2).unflatten(2, (6, 6))
    image = F.interpolate(F.avg_pool2d(image, 3), image.shape[2:], mode="bilinear") * 3
    return {**inputs, sample: image if name == "unet" else image.flatten(2).transpose(1, 2)}


def learn(name, config, adapter, steps=15):
    """The losses of a LoRA fine-tune towards what another adapter makes of the uncompressed model.

    In 15 steps they fall to a tenth; compressed, within a fifth of that.
    """
    model, inputs = model_of(name), smooth(inputs_of(name), name)
    torch.manual_seed(1)
    model.add_adapter(adapter(init_lora_weights=False))
    with torch.no_grad():
        target = model(**inputs, return_dict=False)[0]
    model.delete_adapters("default")
    torch.manual_seed(2)
    model.add_adapter(adapter())
    if config is not None:
        apply_token_compression(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = (model(**inputs, return_dict=False)[0] - target).square().mean()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_lora_learns_as_without_compression(name):
    peft = pytest.importorskip("peft")

    def adapter(**options):
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options)

    plain = learn(name, None, adapter)
    assert plain[-1] < 0.2 * plain[0]
    for config in (LGTMConfig(), IEKVDConfig(alpha=0.9)):
        losses = learn(name, config, adapter)
        assert losses[-1] / losses[0] < 1.2 * plain[-1] / plain[0]
