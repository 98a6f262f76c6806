"""Several configs in one model, each for blocks of its own."""

from __future__ import annotations

import copy

import pytest
import torch

from bigain_kernels.diffusers import (
    ABMConfig,
    IEKVDConfig,
    LGTMConfig,
    MixedConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)

from .models import dit_inputs, flux_inputs, run, tiny_dit, tiny_flux, tiny_unet, unet_inputs

BLOCKS = ("BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
MODELS = {
    "unet": (tiny_unet, unet_inputs, 7),
    "dit": (tiny_dit, dit_inputs, 4),
    "flux": (tiny_flux, flux_inputs, 4),
}
DEEP = {"max_downsample": 2}
# By model, configs for some of its blocks.
MIXED = {
    "a ratio each": (
        "unet",
        [LGTMConfig(ratio=0.7, blocks=(0, 5)), LGTMConfig(ratio=0.25, blocks=(2, 6), proportional=True, **DEEP)],
    ),
    "merging and pooling": (
        "unet",
        [ToMeConfig(blocks=(4,)), IEKVDConfig(alpha=1.1, blocks=(0, 5)), ToDoConfig(blocks=(3,), **DEEP)],
    ),
    "modules each": (
        "unet",
        [ABMConfig(blocks=(0, 1), modules=("attn1", "attn2", "ff"), **DEEP), LGTMConfig(blocks=(4,))],
    ),
    "plans kept apart": (
        "dit",
        [LGTMConfig(blocks=(0, 2), cached_assignment=True), ABMConfig(blocks=(1, 3), cached_assignment=True)],
    ),
    "timesteps each": (
        "dit",
        [
            LGTMConfig(blocks=(0,), end=0.3),
            LGTMConfig(blocks=(1,), ratio=(0.7, 0.2)),
            IEKVDConfig(blocks=(3,), alpha=(0.8, 1.2)),
        ],
    ),
    "shared plans": ("dit", [LGTMConfig(blocks=(0, 3), share_plan=2), ToMeConfig(blocks=(1,), seed=3)]),
    "two kinds of blocks": (
        "flux",
        [
            LGTMConfig(blocks=(0,)),
            IEKVDConfig(blocks=(1,)),
            LGTMConfig(blocks=(3,), ratio=0.6, modules=("attn1", "ff")),
        ],
    ),
}


def blocks_of(model):
    return [module for module in model.modules() if type(module).__name__ in BLOCKS]


def traced(model, inputs, given=None):
    """What each block is given and gives back in a forward pass; `given` takes the place of what it is given."""
    calls, handles = [], []

    def before(block, args, kwargs):
        if given is not None:
            _, hidden, text, _ = given[len(calls)]
            args, kwargs = (hidden, *args[1:]) if args else args, dict(kwargs)
            if not args:
                kwargs["hidden_states"] = hidden
            if text is not None and type(block).__name__ != "BasicTransformerBlock":
                kwargs["encoder_hidden_states"] = text
        hidden = args[0] if args else kwargs["hidden_states"]
        calls.append([block, hidden, kwargs.get("encoder_hidden_states"), None])
        return args, kwargs

    def after(block, args, kwargs, output):
        calls[-1][3] = output if isinstance(output, tuple) else (output,)

    for block in blocks_of(model):
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    run(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("case", MIXED)
def test_every_block_computes_what_it_does_under_its_own_config_alone(case):
    name, configs = MIXED[case]
    make, inputs, count = MODELS[name]
    model, call = make(), inputs()
    apply_token_compression(model, MixedConfig(configs))
    mixed = traced(model, call)
    assert len(mixed) == count
    order = [next(i for i, block in enumerate(blocks_of(model)) if block is call[0]) for call in mixed]
    remove_token_compression(model)
    plain = traced(model, call, mixed)
    owned = {block: config for config in configs for block in config.blocks}
    changed = []
    for config in configs:
        with token_compression(model, config):
            alone = traced(model, call, mixed)
        for position, index in enumerate(order):
            if owned.get(index) is config:
                pairs = zip(mixed[position][3], alone[position][3], strict=True)
                assert all(torch.equal(*pair) for pair in pairs), index
    for position, index in enumerate(order):
        equal = all(torch.equal(*pair) for pair in zip(mixed[position][3], plain[position][3], strict=True))
        assert not equal or index not in owned or owned[index].has_window, index
        assert equal or index in owned, index
        changed += [] if equal else [index]
    assert len(changed) >= len(owned) - 1


def test_the_report_says_what_compresses_each_layer():
    configs = (LGTMConfig(ratio=0.7, blocks=(0,), proportional=True), IEKVDConfig(blocks=(4, 5)))
    report = apply_token_compression(tiny_unet(), MixedConfig(configs))
    assert [(row.block, row.config) for row in report.patched] == [(0, configs[0]), (4, configs[1]), (5, configs[1])]
    text = str(report)
    assert "MixedConfig on UNet2DConditionModel: 3 of 7 layers patched" in text
    assert "merge tokens, weigh keys by size; lgtm ratio=0.7 proportional" in text
    assert "pooled projection; iekvd factor=2x2 alpha=0.9" in text
    assert "block 1 is in none of the 2 configs" in text


def test_a_config_that_compresses_nothing_is_refused_and_changes_nothing():
    model = tiny_unet()
    before = apply_token_compression(model, LGTMConfig())
    with pytest.raises(ValueError, match=r"config: got LGTMConfig\(max_downsample=1, .*blocks=\(1,\)"):
        apply_token_compression(model, MixedConfig((IEKVDConfig(blocks=(0,)), LGTMConfig(blocks=(1,)))))
    with pytest.raises(ValueError, match=r"blocks: got \[7\], expected indices below 7"):
        apply_token_compression(model, MixedConfig((IEKVDConfig(blocks=(0,)), LGTMConfig(blocks=(4, 7)))))
    assert model._bigain.config == before.config


def test_it_is_taken_out_put_back_and_copied():
    model, call = tiny_dit(), dit_inputs()
    plain = run(model, call)
    config = MixedConfig((LGTMConfig(blocks=(0,)), IEKVDConfig(blocks=(1, 2))))
    apply_token_compression(model, config)
    mixed = run(model, call)
    assert not torch.equal(mixed, plain)
    with token_compression(model, LGTMConfig()):
        assert not torch.equal(run(model, call), mixed)
    assert torch.equal(run(model, call), mixed)
    assert torch.equal(run(copy.deepcopy(model), call), mixed)
    remove_token_compression(model)
    assert torch.equal(run(model, call), plain)


@pytest.mark.parametrize("case", ["a ratio each", "two kinds of blocks"])
def test_blocks_of_several_configs_compile(case):
    name, configs = MIXED[case]
    make, inputs, _ = MODELS[name]
    model, call = make(), inputs()
    apply_token_compression(model, MixedConfig(configs))
    wanted = run(model, call)
    torch._dynamo.reset()
    for block in blocks_of(model):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, call), wanted, atol=3e-5, rtol=3e-5)
