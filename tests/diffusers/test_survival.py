"""What else people do to a model: fusing projections, IP-Adapters, other processors, offloading, LoRA-like wrappers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from torch import nn

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
)
from bigain_kernels.diffusers.families.plain import CompressedAttnProcessor, FusedCompressedAttnProcessor

from .models import (
    TEXT_DIM,
    flux_inputs,
    qwen_inputs,
    recorded_plans,
    run,
    sd3_inputs,
    tiny_dit,
    tiny_flux,
    tiny_qwen,
    tiny_sd3,
    tiny_unet,
    unet_inputs,
)

CONFIGS = [
    LGTMConfig(max_downsample=2),
    LGTMConfig(modules=("attn1", "attn2")),
    IEKVDConfig(max_downsample=2),
    ToMeConfig(cached_assignment=True, proportional=True),
]
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def _attn1(model) -> Attention:
    return model.down_blocks[0].attentions[0].transformer_blocks[0].attn1


def _processors(model) -> set[type]:
    return {type(processor) for processor in model.attn_processors.values()}


@pytest.mark.parametrize("config", CONFIGS)
def test_fuse_before_apply(config):
    model = tiny_unet()
    with_separate = tiny_unet()
    apply_token_compression(with_separate, config)
    model.fuse_qkv_projections()
    apply_token_compression(model, config)
    calls = []
    _attn1(model).to_qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, unet_inputs()), run(with_separate, unet_inputs()), **CLOSE)
    assert calls  # the joint projection is what runs
    remove_token_compression(model)
    assert _processors(model) == {FusedAttnProcessor2_0}
    model.unfuse_qkv_projections()
    assert _processors(model) == {AttnProcessor2_0}


@pytest.mark.parametrize("config", CONFIGS)
def test_fuse_and_unfuse_after_apply(config):
    model = tiny_unet()
    plain = run(model, unet_inputs())
    apply_token_compression(model, config)
    compressed = run(model, unet_inputs())
    calls = []

    model.fuse_qkv_projections()
    _attn1(model).to_qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, unet_inputs()), compressed, **CLOSE)
    assert calls

    calls.clear()
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, unet_inputs()), compressed)
    assert not calls

    remove_token_compression(model)
    assert _processors(model) == {AttnProcessor2_0}
    assert torch.equal(run(model, unet_inputs()), plain)


def test_unfuse_of_what_was_fused_before_apply_keeps_compressing():
    model = tiny_unet()
    model.fuse_qkv_projections()
    apply_token_compression(model, LGTMConfig())
    compressed = run(model, unet_inputs())
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model, unet_inputs()), compressed, **CLOSE)
    assert type(_attn1(model).processor) is CompressedAttnProcessor
    remove_token_compression(model)
    assert _processors(model) == {AttnProcessor2_0}


@pytest.mark.parametrize("forward_between", [True, False])
def test_unfuse_after_remove_brings_no_compression_back(forward_between):
    model = tiny_unet()
    plain = run(model, unet_inputs())
    apply_token_compression(model, LGTMConfig())
    model.fuse_qkv_projections()
    if forward_between:
        run(model, unet_inputs())
        assert type(_attn1(model).processor) is FusedCompressedAttnProcessor
    remove_token_compression(model)
    assert _processors(model) == {FusedAttnProcessor2_0}
    model.unfuse_qkv_projections()
    assert _processors(model) == {AttnProcessor2_0}
    assert torch.equal(run(model, unet_inputs()), plain)


def test_fused_dit():
    model, separate = tiny_dit(), tiny_dit()
    for config in (LGTMConfig(), IEKVDConfig()):
        apply_token_compression(separate, config)
        apply_token_compression(model, config)
        for module in model.modules():
            if isinstance(module, Attention):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())
        inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 2])}
        inputs["class_labels"] = torch.tensor([1, 2])
        torch.testing.assert_close(run(model, inputs), run(separate, inputs), **CLOSE)


def test_diffusers_other_processors_are_replaced_again(caplog):
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig())
    compressed = run(model, unet_inputs())
    model.set_attn_processor(AttnProcessor())
    with caplog.at_level("INFO", logger="bigain_kernels"):
        torch.testing.assert_close(run(model, unet_inputs()), compressed, **CLOSE)
    assert "compressing again, in place of AttnProcessor" in caplog.text
    model.set_attention_slice(1)
    torch.testing.assert_close(run(model, unet_inputs()), compressed, **CLOSE)


def test_foreign_processor_runs_uncompressed_and_says_so_once(caplog):
    """As if it had been there before compression was applied."""

    class Foreign(AttnProcessor2_0):
        pass

    before, model = tiny_unet(), tiny_unet()
    _attn1(before).set_processor(Foreign())
    apply_token_compression(before, LGTMConfig())
    apply_token_compression(model, LGTMConfig())
    compressed, ours = run(model, unet_inputs()), _attn1(model).processor
    _attn1(model).set_processor(Foreign())
    for _ in range(2):
        assert torch.equal(run(model, unet_inputs()), run(before, unet_inputs()))
    (told,) = [record.message for record in caplog.records if "Foreign" in record.message]
    assert told.startswith("down_blocks.0.attentions.0.transformer_blocks.0.attn1: runs uncompressed while its proc")
    # Nothing of ours reached it, of which diffusers would warn.
    assert not [record for record in caplog.records if "bigain" in record.message]
    _attn1(model).set_processor(ours)
    assert torch.equal(run(model, unet_inputs()), compressed)
    _attn1(model).set_processor(Foreign())
    run(model, unet_inputs())
    remove_token_compression(model)
    assert type(_attn1(model).processor) is Foreign
    assert not _attn1(model)._forward_pre_hooks
    run(model, unet_inputs())


def test_processor_that_outlived_its_patch_raises():
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig())
    processors = model.attn_processors
    remove_token_compression(model)
    model.set_attn_processor(processors)
    with pytest.raises(RuntimeError, match="outlived remove_token_compression"):
        run(model, unet_inputs())


def _ip_adapter(model) -> dict:
    """A random IP-Adapter checkpoint for `model`."""
    generator = torch.Generator().manual_seed(5)
    image_proj = {
        "proj.weight": torch.randn(4 * TEXT_DIM, 16, generator=generator),
        "proj.bias": torch.zeros(4 * TEXT_DIM),
        "norm.weight": torch.ones(TEXT_DIM),
        "norm.bias": torch.zeros(TEXT_DIM),
    }
    adapter, key = {}, 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            width = model.get_submodule(name.removesuffix(".processor")).inner_dim
            for projection in ("to_k_ip", "to_v_ip"):
                adapter[f"{key}.{projection}.weight"] = torch.randn(width, TEXT_DIM, generator=generator)
            key += 2
    return {"image_proj": image_proj, "ip_adapter": adapter}


@pytest.mark.parametrize("config", [LGTMConfig(max_downsample=2), ToMeConfig(), IEKVDConfig()])
def test_ip_adapter_after_apply_equals_before(config, monkeypatch):
    inputs = unet_inputs()
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(7))]}
    before, after = tiny_unet(), tiny_unet()
    before._load_ip_adapter_weights(_ip_adapter(before), low_cpu_mem_usage=False)
    plain = run(before, inputs)
    apply_token_compression(before, config)
    apply_token_compression(after, config)
    run(after, unet_inputs())
    after._load_ip_adapter_weights(_ip_adapter(after), low_cpu_mem_usage=False)
    with recorded_plans(monkeypatch) as records:
        output = run(after, inputs)
    assert records or isinstance(config, IEKVDConfig)
    assert torch.equal(output, run(before, inputs))
    assert not torch.allclose(output, plain, atol=1e-4)
    remove_token_compression(after)
    assert _processors(after) == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}
    assert torch.equal(run(after, inputs), plain)


def test_ip_adapter_on_merged_cross_attention_runs_uncompressed():
    """Its own processor does not merge; the report says so when it is there before."""
    inputs = {**unet_inputs(), "added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 16)]}}
    config = LGTMConfig(modules=("attn1", "attn2"))
    before, after = tiny_unet(), tiny_unet()
    before._load_ip_adapter_weights(_ip_adapter(before), low_cpu_mem_usage=False)
    apply_token_compression(before, config)
    apply_token_compression(after, config)
    after._load_ip_adapter_weights(_ip_adapter(after), low_cpu_mem_usage=False)
    assert torch.equal(run(after, inputs), run(before, inputs))


def _offload(model: nn.Module) -> None:
    """What sequential CPU offloading does, by hand: a module's tensors exist only while its forward runs.

    As accelerate does, this wraps `forward`, copies the dicts among the arguments, and leaves meta tensors behind.
    """

    def copied(value):
        return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value

    for module in model.modules():
        held = dict(module._parameters)
        if not held:
            continue

        def forward(*args, module=module, held=held, inner=module.forward, **kwargs):
            module._parameters.update(held)
            output = inner(*(copied(arg) for arg in args), **copied(kwargs))
            module._parameters.update(away(held))
            return output

        def away(held):
            return {k: p if p is None else nn.Parameter(p.to("meta"), requires_grad=False) for k, p in held.items()}

        module.forward = forward
        module._parameters.update(away(held))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading(config, offload_first):
    model, stays = tiny_unet(), tiny_unet()
    apply_token_compression(stays, config)
    if offload_first:
        _offload(model)
    apply_token_compression(model, config)
    if not offload_first:
        _offload(model)
    for _ in range(2):
        assert torch.equal(run(model, unet_inputs()), run(stays, unet_inputs()))


@pytest.mark.parametrize(
    ("build", "inputs"), [(tiny_flux, flux_inputs), (tiny_sd3, sd3_inputs), (tiny_qwen, qwen_inputs)]
)
@pytest.mark.parametrize("pool", ["keys", "hidden"])
def test_offloading_of_joint_models(build, inputs, pool):
    model, stays = build(), build()
    for target in (model, stays):
        apply_token_compression(target, IEKVDConfig(pool=pool, alpha=(0.8, 1.2)))
    _offload(model)
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs()), run(stays, inputs()), **CLOSE)


def test_layers_are_called_as_modules():
    """Adapters and quantized layers replace projections by modules without a plain weight."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 0.5

    for config in (LGTMConfig(), IEKVDConfig()):
        model, scaled = tiny_dit(), tiny_dit()
        inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 2])}
        inputs["class_labels"] = torch.tensor([1, 2])
        for wrapping, halved in zip(model.transformer_blocks, scaled.transformer_blocks, strict=True):
            for name in ("to_q", "to_k", "to_v"):
                setattr(wrapping.attn1, name, Wrapped(getattr(wrapping.attn1, name)))
                with torch.no_grad():
                    getattr(halved.attn1, name).weight.mul_(0.5)
                    getattr(halved.attn1, name).bias.mul_(0.5)
        apply_token_compression(model, config)
        apply_token_compression(scaled, config)
        torch.testing.assert_close(run(model, inputs), run(scaled, inputs), **CLOSE)
