"""Software that wraps or replaces what compression relies on: noticed, or survived."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import PAGCFGHunyuanAttnProcessor2_0, PAGHunyuanAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, ToDoConfig, ToMeConfig, apply_token_compression, families
from bigain_kernels.diffusers.families import unet

from .family_models import build as build_family
from .family_models import case_of, outputs
from .models import (
    dit_inputs,
    flux_inputs,
    layer_context,
    only,
    qwen_inputs,
    run,
    tiny_dit,
    tiny_flux,
    tiny_qwen,
    tiny_unet,
    unet_inputs,
)


@pytest.mark.parametrize("where", ["blocks", "attentions"])
def test_replaced_forwards_are_noticed_once(where, caplog):
    """Other accelerators replace forward methods; then no layer of ours takes part, and no report says so."""
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig())
    for module in model.modules():
        if type(module).__name__ == {"blocks": "BasicTransformerBlock", "attentions": "Attention"}[where]:
            module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    for _ in range(2):
        run(model, unet_inputs())
    assert [record.message[:70] for record in caplog.records] == [
        "UNet2DConditionModel: a forward pass reached none of its 3 compressed "
    ]


def test_a_pass_that_is_not_compressed_is_no_reason_to_warn(caplog):
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig(end=0.5))
    for timestep in (10, 900, 10):
        run(model, {**unet_inputs(), "timestep": timestep})
    assert not caplog.records


@pytest.mark.parametrize("build", [tiny_unet, lambda: build_family("wan")], ids=["handed on", "told by hooks"])
def test_threads_do_not_warn_for_each_other(build, caplog):
    """The pass of one thread ends while that of another, begun later, waits in front of its first compressed layer."""
    model = build()
    inputs = unet_inputs() if build is tiny_unet else case_of("wan").inputs(1, (2, 4, 4))
    apply_token_compression(model, IEKVDConfig())
    waits, go = [[threading.Event(), threading.Event()] for _ in range(2)]
    threads = [threading.Thread(target=run, args=(model, inputs)) for _ in range(2)]

    def wait(module, args):
        number = threads.index(threading.current_thread())
        waits[number].set()
        assert go[number].wait(60)

    first = next(module for module in model.modules() if type(module).__name__.endswith("TransformerBlock"))
    first.register_forward_pre_hook(wait)
    for number in (0, 1):
        threads[number].start()
        assert waits[number].wait(60)
    for number in (0, 1):
        go[number].set()
        threads[number].join()
    assert not caplog.records


@pytest.mark.parametrize("config", [IEKVDConfig(alpha=(0.8, 1.2)), ToMeConfig(), LGTMConfig(share_plan=2)])
@pytest.mark.parametrize("name", ["cogvideox", "allegro"])
def test_faster_cache_goes_on_with_half_of_the_batch(name, config):
    """The conditional half: at the steps that leave out the other, a video there is what it is beside others."""

    def generate(rows):
        model, found = build_family(name), []
        apply_token_compression(model, config)
        model.enable_cache(
            FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 901),
                unconditional_batch_skip_range=5,
                unconditional_batch_timestep_skip_range=(-1, 901),
                spatial_attention_block_identifiers=("transformer_blocks",),
                temporal_attention_block_identifiers=(),
                attention_weight_callback=lambda _: 0.3,
                tensor_format={"cogvideox": "BFCHW", "allegro": "BCFHW"}[name],
                current_timestep_callback=lambda: 500,
            )
        )
        inputs = only(case_of(name).inputs(4, (3, 4, 4)), rows)
        with model.cache_context("pass"):
            for _ in range(5):
                found.append(outputs(model, inputs))
        return found

    for together, alone in zip(generate([0, 1, 2, 3]), generate([0, 2]), strict=True):
        torch.testing.assert_close(together[[0, 2]], alone, atol=1e-4, rtol=1e-4)


def test_argument_names_are_those_of_diffusers():
    """They are written down in the families, because wrapped classes do not tell them."""
    signatures = {family.model: family.signature for family in families.registered()}
    signatures[Transformer2DModel] = unet._TRANSFORMER
    for cls, signature in signatures.items():
        names = list(inspect.signature(cls.forward).parameters)[1:]
        assert signature.positions == {name: names.index(name) for name in signature.positions}
        assert signature.carrier is None or signature.carrier in signature.positions


def test_classes_that_were_wrapped_before_the_import():
    """Profilers and patches wrap forward methods as (*args, **kwargs), without the signature of what they wrap."""
    code = """
import torch
from diffusers import UNet2DConditionModel
from diffusers import FasterCacheConfig
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
def wrap(cls):
    inner = cls.forward
    cls.forward = lambda self, *args, **kwargs: inner(self, *args, **kwargs)
for cls in (UNet2DConditionModel, BasicTransformerBlock, Transformer2DModel): wrap(cls)
from bigain_kernels.diffusers import LGTMConfig, apply_token_compression
from tests.diffusers.models import run, tiny_unet, unet_inputs
model = tiny_unet()
plain = run(model, unet_inputs())
apply_token_compression(model, LGTMConfig())
assert not torch.equal(run(model, unet_inputs()), plain)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def with_bank(model, bank):
    """What reference-only generation does: keys of another picture behind the layer's own."""
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    inner = attn.forward

    def forward(hidden_states, encoder_hidden_states=None, **kwargs):
        return inner(hidden_states, encoder_hidden_states=torch.cat([hidden_states, bank], dim=1), **kwargs)

    attn.forward = forward
    return model


@pytest.mark.parametrize(
    "config", [LGTMConfig(), LGTMConfig(proportional=True), ToMeConfig(), IEKVDConfig(), ToDoConfig()]
)
def test_keys_given_to_self_attention_count(config):
    banks = [torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (3, 4)]
    outputs = []
    for bank in banks:
        model = tiny_unet()
        apply_token_compression(model, config)
        outputs.append(run(with_bank(model, bank), unet_inputs()))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [LGTMConfig(ratio=0.0), IEKVDConfig(factor=1), LGTMConfig(end=0.0)])
def test_what_compresses_nothing_changes_nothing_of_it(config):
    bank = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(3)) * 3
    plain = run(with_bank(tiny_unet(), bank), unet_inputs())
    model = tiny_unet()
    apply_token_compression(model, config)
    torch.testing.assert_close(run(with_bank(model, bank), unet_inputs()), plain, atol=1e-5, rtol=1e-5)


def text_mask(batch, keys):
    mask = torch.ones(batch, keys)
    mask[:, 3:] = 0
    return mask


@pytest.mark.parametrize("modules", [("attn1", "attn2"), ("attn2",)])
@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_text_masks_reach_cross_attention_whose_queries_merge(name, modules):
    fresh = tiny_unet if name == "unet" else partial(build_family, name)
    plain = unet_inputs() if name == "unet" else case_of(name).inputs(2, (1, 8, 8))
    masked = {**plain, "encoder_attention_mask": text_mask(2, 5)}
    other = {**masked, "encoder_hidden_states": masked["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][:, 3:] = 7.0  # masked words
    model = fresh()
    report = apply_token_compression(model, LGTMConfig(modules=modules))
    assert {row.kind for row in report.patched} == set(modules)
    output = run(model, masked)
    assert torch.equal(output, run(model, other))
    assert not torch.allclose(output, run(model, plain), atol=1e-4)
    # At ratio 0 nothing merges, and the mask does what it does uncompressed.
    apply_token_compression(model, LGTMConfig(ratio=0.0, modules=modules))
    torch.testing.assert_close(run(model, masked), run(fresh(), masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [LGTMConfig(end=0.5), IEKVDConfig(end=0.5)])
def test_a_mask_over_tokens_counts_where_nothing_is_compressed(config):
    mask = torch.zeros(2, 1, 64)
    mask[:, :, 30:] = -10000.0
    call = {"hidden_states": torch.randn(2, 64, 32), "attention_mask": mask}
    model = tiny_dit()
    plain = model.transformer_blocks[0].attn1(**call)
    apply_token_compression(model, config)
    output = model.transformer_blocks[0].attn1(**call, bigain=layer_context(config, active=False))
    torch.testing.assert_close(output, plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="attention_mask: got a mask"):
        model.transformer_blocks[0].attn1(**call, bigain=layer_context(config))
    assert run(model, dit_inputs()).isfinite().all()


SKIPPED = [
    (tiny_dit, dit_inputs, LGTMConfig(proportional=True)),
    (tiny_dit, dit_inputs, IEKVDConfig()),
    (tiny_qwen, qwen_inputs, IEKVDConfig()),
]


@pytest.mark.parametrize(("build", "inputs", "config"), SKIPPED, ids=["dit-merge", "dit-pool", "qwen-pool"])
@pytest.mark.parametrize(
    "options",
    [
        {"skip_attention": True, "skip_ff": False},
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    ],
    ids=["attention", "scores"],
)
def test_layer_skipping_of_diffusers(build, inputs, config, options):
    """Skip-layer and perturbed-attention guidance of modular pipelines rest on it, before and after compression.

    What is skipped takes no part in compression; the other blocks are compressed all the same.
    """
    if build is tiny_qwen and options["skip_attention"]:
        pytest.skip("diffusers' own skipping gives Qwen's two streams the outputs of each other, uncompressed too")
    layers = LayerSkipConfig(indices=[1], fqn="transformer_blocks", **options)
    first, after, other = build(), build(), build()
    apply_layer_skip(first, layers)
    apply_token_compression(first, config)
    apply_token_compression(after, config)
    whole = run(after, inputs())
    apply_layer_skip(after, layers)
    apply_layer_skip(other, layers)
    rest = tuple(index for index in range(len(other.transformer_blocks)) if index != 1)
    apply_token_compression(other, replace(config, blocks=rest))
    outputs = [run(model, inputs()) for model in (first, after, other)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], whole, atol=1e-4)


@pytest.mark.parametrize("config", [LGTMConfig(), ToMeConfig(), IEKVDConfig(alpha=(0.8, 1.2)), IEKVDConfig()])
@pytest.mark.parametrize(
    ("perturbed", "batch"), [(PAGHunyuanAttnProcessor2_0, 2), (PAGCFGHunyuanAttnProcessor2_0, 3)], ids=["pag", "cfg"]
)
def test_perturbed_attention_of_hunyuan_dit(perturbed, batch, config, caplog):
    """Its processors attend for a part of the batch. Their layer is not compressed, put in before or for one call."""
    inputs = case_of("hunyuan_dit").inputs(batch, (1, 6, 8))

    def perturb(model):
        model.blocks[0].attn1.set_processor(perturbed())
        return model

    other = perturb(build_family("hunyuan_dit"))
    plain = run(other, inputs)
    apply_token_compression(other, replace(config, blocks=(1,)))
    wanted = run(other, inputs)
    assert not torch.allclose(wanted, plain, atol=1e-4)

    model = build_family("hunyuan_dit")
    apply_token_compression(model, config)
    compressed, ours = run(model, inputs), model.blocks[0].attn1.processor
    perturb(model)
    for _ in range(2):
        assert torch.equal(run(model, inputs), wanted)
    assert [record.message for record in caplog.records] == [
        f"blocks.0.attn1: runs uncompressed while its processor is {perturbed.__name__}, which compression cannot "
        "stand in for"
    ]
    model.blocks[0].attn1.set_processor(ours)
    assert torch.equal(run(model, inputs), compressed)

    model = perturb(build_family("hunyuan_dit"))
    first = apply_token_compression(model, config).rows[0]
    assert (first.patched, first.reason) == (False, f"it has a processor of its own, {perturbed.__name__}")
    assert torch.equal(run(model, inputs), wanted)


def _first_block_cache(model):
    from diffusers.hooks import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def _pyramid(model):
    from diffusers import PyramidAttentionBroadcastConfig

    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=1,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
        )
    )


def _mag_cache(model):
    from diffusers.hooks import MagCacheConfig

    # Ratios of 1 for five steps, of which the first 80 % are computed.
    model.enable_cache(MagCacheConfig(num_inference_steps=5, retention_ratio=0.8, mag_ratios=[1.0] * 5))


def _taylor(model):
    from diffusers.hooks import TaylorSeerCacheConfig

    model.enable_cache(TaylorSeerCacheConfig(disable_cache_before_step=5))


CACHES = [_first_block_cache, _pyramid, _mag_cache, _taylor]


@pytest.mark.parametrize("enable", CACHES, ids=["first-block", "pyramid", "mag", "taylor"])
@pytest.mark.parametrize("before", [True, False])
def test_caches_of_diffusers(enable, before):
    """With a threshold at which nothing is reused, a cached and compressed model is the compressed one."""
    alone = tiny_flux()
    apply_token_compression(alone, IEKVDConfig())
    expected = run(alone, flux_inputs())
    model = tiny_flux()
    if before:
        enable(model)
    apply_token_compression(model, IEKVDConfig())
    if not before:
        enable(model)
    with model.cache_context("cond"):
        for _ in range(2):
            torch.testing.assert_close(run(model, flux_inputs()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("enable", [_first_block_cache, _mag_cache], ids=["first-block", "mag"])
def test_caches_around_merged_mlps(enable):
    """Those of whole blocks stand around what is merged, where blocks have two streams."""
    config = LGTMConfig(modules=("attn1", "ff"), blocks=(0, 1))
    alone, model = tiny_flux(), tiny_flux()
    apply_token_compression(alone, config)
    apply_token_compression(model, config)
    enable(model)
    with model.cache_context("cond"):
        torch.testing.assert_close(run(model, flux_inputs()), run(alone, flux_inputs()), atol=1e-5, rtol=1e-5)
