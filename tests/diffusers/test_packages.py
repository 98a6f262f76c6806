"""Packages that people load beside compression, the real ones: adapters by peft, quantized layers, offloading."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, ToDoConfig, apply_token_compression, token_compression

from .models import dit_inputs, flux_inputs, run, tiny_dit, tiny_flux, tiny_unet, unet_inputs

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MODELS = {"unet": (tiny_unet, unet_inputs), "flux": (tiny_flux, flux_inputs), "dit": (tiny_dit, dit_inputs)}
CONFIGS = [LGTMConfig(modules=("attn1", "ff"), proportional=True), IEKVDConfig(alpha=0.8), ToDoConfig()]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp"]


def adapter(model, seed):
    """Low-rank changes of rank 2, as a state dict in the names of peft, and by the layer."""
    generator = torch.Generator().manual_seed(seed)
    state, changes = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(name.endswith("." + target) for target in TARGETS):
            down = 0.3 * torch.randn(2, layer.in_features, generator=generator)
            up = 0.3 * torch.randn(layer.out_features, 2, generator=generator)
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            changes[name] = up @ down
    return state, changes


def by_hand(build, config, seed):
    """A compressed model whose weights hold the changes of an adapter."""
    model = build()
    for name, change in adapter(model, seed)[1].items():
        model.get_submodule(name).weight.data += change
    apply_token_compression(model, config)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("name", ["unet", "flux"])
def test_adapters_of_peft_loaded_fused_and_swapped(name, config):
    pytest.importorskip("peft")
    build, inputs = MODELS[name]
    wanted = {seed: run(by_hand(build, config, seed), inputs()) for seed in (1, 2)}
    states = {seed: adapter(build(), seed)[0] for seed in (1, 2)}
    for first in (True, False):
        model = build()
        if first:
            apply_token_compression(model, config)
        model.enable_lora_hotswap(target_rank=2)
        model.load_lora_adapter(dict(states[1]), prefix=None, adapter_name="one")
        if not first:
            apply_token_compression(model, config)
        torch.testing.assert_close(run(model, inputs()), wanted[1], **CLOSE)
        model.load_lora_adapter(dict(states[2]), prefix=None, adapter_name="one", hotswap=True)
        torch.testing.assert_close(run(model, inputs()), wanted[2], **CLOSE)
        model.fuse_lora()
        torch.testing.assert_close(run(model, inputs()), wanted[2], **CLOSE)
        model.unfuse_lora()
        model.disable_lora()
        plain = build()
        apply_token_compression(plain, config)
        torch.testing.assert_close(run(model, inputs()), run(plain, inputs()), **CLOSE)


def in_steps(model, steps=4):
    """What a model predicts in each step of a run."""
    inputs, found = flux_inputs(), []
    for step in range(steps):
        inputs |= {"timestep": torch.full((2,), 1.0 - step / steps)}
        found.append(run(model, inputs))
        inputs["hidden_states"] = inputs["hidden_states"] - 0.1 * found[-1]
    return torch.stack(found)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.method)
def test_steps_cached_by_cache_dit(config):
    """It keeps what all blocks behind the first add, outside of what is merged in any of them."""
    cache_dit = pytest.importorskip("cache_dit")
    apply_token_compression(alone := tiny_flux(), config)
    wanted, found = in_steps(alone), {}
    for threshold in (0.0, 10.0):
        for first in (True, False):
            model = tiny_flux()
            if first:
                apply_token_compression(model, config)
            cache = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=threshold
            )
            cache_dit.enable_cache(model, cache_config=cache)
            if not first:
                apply_token_compression(model, config)
            found[threshold, first] = in_steps(model)
            cache_dit.disable_cache(model)
            assert torch.equal(run(model, flux_inputs()), run(alone, flux_inputs()))
    assert torch.equal(found[0.0, True], wanted)
    assert torch.equal(found[0.0, False], wanted)
    # The first step fills the cache; what the others take from it is the compressed model's.
    assert torch.equal(found[10.0, True], found[10.0, False])
    assert torch.equal(found[10.0, True][0], wanted[0])
    assert all((found[10.0, True][1:] - wanted[1:]).abs().amax((1, 2, 3)) > 1e-4)


def _torchao(model):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def _quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.method)
@pytest.mark.parametrize("quantize", [_torchao, _quanto], ids=["torchao", "quanto"])
def test_quantized_layers(quantize, config):
    """Their results are those of layers that hold the rounded weights, whatever came first."""
    build, inputs = MODELS["flux"]
    outputs = []
    for first in (True, False):
        model = build()
        if first:
            apply_token_compression(model, config)
        quantize(model)
        if not first:
            apply_token_compression(model, config)
        outputs.append(run(model, inputs()))
    rounded = build()
    quantize(model := build())
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = model.get_submodule(name).weight.dequantize()
    apply_token_compression(rounded, config)
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
    torch.testing.assert_close(outputs[0], run(rounded, inputs()), atol=1e-4, rtol=1e-4)


def _cpu_offload(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def _group_offload(model):
    apply_group_offloading(
        model,
        torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_device=torch.device("cpu"),
    )


def _leaf_offload(model):
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda config: config.method)
@pytest.mark.parametrize("offload", [_cpu_offload, _group_offload, _leaf_offload])
@pytest.mark.parametrize("name", MODELS)
def test_offloading_of_accelerate_and_in_groups(name, offload, config):
    build, inputs = MODELS[name]
    with token_compression(stays := build(), config):
        wanted = run(stays, inputs())
    for first in (True, False):
        model = build()
        if first:
            apply_token_compression(model, config)
        offload(model)
        if not first:
            apply_token_compression(model, config)
        for _ in range(2):
            assert torch.equal(run(model, inputs()), wanted)
