"""Merging around MLPs, with one plan for the layers of a block, against blocks written out in plain PyTorch."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bigain_kernels import reference
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.diffusers.current import in_block
from bigain_kernels.diffusers.families import family_of

from .family_models import CASES, CONTROLNETS, WRITTEN_OUT, build, case_of, outputs
from .models import dit_inputs, tiny_dit, tiny_unet, unet_inputs
from .test_controlnet import tiny_controlnet

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
NAMES = [name for name in (*CASES, *WRITTEN_OUT) if family_of(build(name)).mlp is not None]
ALL = ("attn1", "attn2", "ff")
# Names of the blocks whose MLP sees the text in front of the image.
TEXT_IN_FRONT = {"lumina2": "layers", "aura_flow": "single_", "cogvideox": "transformer_blocks"}


def merged(plan, mode, layer, x, *args, **kwargs):
    """A layer on merged tokens, its result on all of them."""
    return reference.token_unmerge(layer(reference.token_merge(x, plan, mode), *args, **kwargs), plan)


class Around(nn.Module):
    """An MLP with merging around it; the image's tokens, `frames` grids, stand behind `start` others."""

    def __init__(self, mlp, config, frames, grid, start):
        super().__init__()
        self.start, self.count = start, frames * grid[0] * grid[1]
        if config.spans_frames and frames > 1:
            frames, grid = 1, (frames, *grid)
        self.mlp, self.config, self.frames, self.grid, self.calls = mlp, config, frames, grid, 0

    def forward(self, x):
        self.calls += 1
        start, stop = self.start, self.start + self.count
        image = x[:, start:stop].reshape(x.shape[0] * self.frames, -1, x.shape[2])
        plan = self.config.plan(image, self.grid, self.config.ratio)
        few = reference.token_merge(image, plan, self.config.mode).reshape(x.shape[0], -1, x.shape[2])
        y = self.mlp(torch.cat([x[:, :start], few, x[:, stop:]], dim=1))
        end = start + few.shape[1]
        slots = y[:, start:end].reshape(image.shape[0], -1, y.shape[2])
        whole = reference.token_unmerge(slots, plan).reshape(x.shape[0], self.count, -1)
        return torch.cat([y[:, :start], whole, y[:, end:]], dim=1)


def expected(name, config, grid, inputs):
    """What a model returns whose MLPs alone are compressed, and of how many blocks."""
    model, case = build(name), case_of(name)
    family, frames = family_of(model), 1 if case.batched_frames else grid[0]
    wrapped = []
    for layer in family.mlps(family.layers(model)):
        if layer.attn is not None and not layer.is_whole:
            start = case.start if name in TEXT_IN_FRONT and layer.name.startswith(TEXT_IN_FRONT[name]) else 0
            wrapped.append(Around(layer.attn, config, frames, grid[1:], start))
            setattr(layer.block, family.mlp, wrapped[-1])
    wanted = outputs(model, inputs)
    assert wrapped
    assert all(each.calls == 1 for each in wrapped)
    return wanted, len(wrapped)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"mlp-{name}")
def test_mlps_alone_equal_mlps_written_out(name):
    model, case = build(name), case_of(name)
    other = ToMeConfig(destinations="first", mode="mlerp", window=(1, 1))
    for batch, size, config in ((2, (6, 8), LGTMConfig()), (1, (8, 6), other)):
        config = replace(config, modules=("ff",))
        if name == "dit":
            size = (6, 6)
        grid = (case.frames, *size)
        inputs = case.inputs(batch, grid)
        plain = outputs(model, inputs)
        wanted, count = expected(name, config, grid, inputs)
        with token_compression(model, config) as report:
            assert len(report.patched) == count
            found = outputs(model, inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (wanted - plain).abs().max() > 1e-4
        with token_compression(model, replace(config, ratio=0.0)):
            assert torch.equal(outputs(model, inputs), plain)
    assert in_block() is None


def written_out(config, grid):
    """The forward method of a U-Net's block with one plan of its input around all its layers."""

    def forward(block):
        def run(x, attention_mask=None, encoder_hidden_states=None, **kwargs):
            plan = config.plan(x, grid, config.ratio)

            def around(kind, layer, x, *args):
                return merged(plan, config.mode, layer, x, *args) if kind in config.modules else layer(x, *args)

            x = x + around("attn1", block.attn1, block.norm1(x))
            x = x + around("attn2", block.attn2, block.norm2(x), encoder_hidden_states)
            return x + around("ff", block.ff, block.norm3(x))

        return run

    return forward


@pytest.mark.parametrize("modules", [("ff",), ("attn1", "ff"), ALL])
def test_layers_of_a_unets_block_share_the_plan_of_its_input(modules):
    for size in ((16, 16), (10, 12)):
        config = LGTMConfig(modules=modules)
        oracle, model, inputs = tiny_unet(), tiny_unet(), unet_inputs(size=size)
        with token_compression(oracle, config) as report:
            blocks = {row.name.rpartition(".")[0] for row in report.patched}
        forward = written_out(config, size)
        for name in blocks:
            block = oracle.get_submodule(name)
            block.forward = forward(block)
        assert len(report.patched) == len(modules) * len(blocks)
        apply_token_compression(model, config)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).sample, oracle(**inputs).sample, **CLOSE)


def test_attention_and_mlp_of_a_dit_share_the_plan_of_its_attention():
    config = LGTMConfig(modules=("attn1", "ff"))
    oracle, model, inputs = tiny_dit(), tiny_dit(), dit_inputs()
    for block in oracle.transformer_blocks:
        plans = []
        attend, mlp = block.attn1.forward, block.ff.forward

        def attention(x, *args, attend=attend, plans=plans, **kwargs):
            plans.append(config.plan(x, (8, 8), config.ratio))
            return merged(plans[0], "mean", attend, x)

        def feed(x, mlp=mlp, plans=plans):
            return merged(plans[0], "mean", mlp, x)

        block.attn1.forward, block.ff.forward = attention, feed
    apply_token_compression(model, config)
    torch.testing.assert_close(outputs(model, inputs), outputs(oracle, inputs), **CLOSE)


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "flux"])
def test_an_mlp_costs_what_its_merged_tokens_do(name):
    model, case = build(name), case_of(name)
    inputs, counts = case.inputs(2, (case.frames, 6, 6)), {}
    for modules in (("attn1",), ("attn1", "ff")):
        with token_compression(model, LGTMConfig(modules=modules)) as report, FlopCounterMode(display=False) as counter:
            outputs(model, inputs)
        counts[modules] = counter.get_total_flops()
    saved = 0
    for row in report.patched:
        if row.kind == "ff":
            module = model.get_submodule(row.name)
            layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
            if hasattr(module, "proj_mlp"):  # a whole block, whose attention is merged in both
                layers = [module.proj_mlp, module.proj_out]
            saved += sum(2 * each.in_features * each.out_features for each in layers) * 2 * case.frames * 18
    assert saved > 0
    assert counts["attn1",] - counts["attn1", "ff"] == saved


@pytest.mark.parametrize("name", ["unet", *NAMES])
def test_bfloat16_and_one_plan_for_random_methods(name):
    model = tiny_unet() if name == "unet" else build(name)
    inputs = unet_inputs() if name == "unet" else case_of(name).inputs(2, (case_of(name).frames, 6, 6))
    kept = ("img_ids", "txt_ids", "image_rotary_emb")

    def narrow(value):
        if isinstance(value, list):
            return [narrow(each) for each in value]
        return value.bfloat16() if torch.is_tensor(value) and value.dtype == torch.float32 else value

    narrowed = {key: value if key in kept else narrow(value) for key, value in inputs.items()}
    model = model.to(torch.bfloat16)
    for config in (SiToConfig(modules=("attn1", "ff")), ToMeConfig(modules=("attn1", "ff"), cached_assignment=True)):
        with token_compression(model, config):
            found = outputs(model, narrowed)
            assert found.dtype == torch.bfloat16
            assert found.isfinite().all()
            assert torch.equal(outputs(model, narrowed), found)


@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_a_model_with_compressed_mlps_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model, case = build(name), case_of(name)
    config = LGTMConfig(modules=("attn1", "ff"), proportional=True)
    apply_token_compression(model, config)
    inputs = case.inputs(1, (case.frames, 6, 6))
    wanted = outputs(model, inputs)
    found = outputs(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_blocks_compile_once_for_all_resolutions(name):
    torch._dynamo.reset()
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    if name == "unet":
        model = tiny_unet()
        calls = [unet_inputs(size=size) for size in ((16, 16), (12, 20), (8, 16))]
        blocks = [module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"]
    else:
        model = build(name)
        calls = [CASES[name].inputs(2, (3, *size)) for size in ((4, 4), (6, 10), (5, 7))]
        blocks = list(model.blocks)
    apply_token_compression(model, LGTMConfig(modules=ALL if name == "unet" else ("attn1", "ff"), max_downsample=2))
    wanted = [outputs(model, call) for call in calls]
    for block in blocks:
        block.compile(fullgraph=True, backend=count)
    numbers = []
    for call, each in zip(calls, wanted, strict=True):
        torch.testing.assert_close(outputs(model, call), each, **CLOSE)
        numbers.append(len(graphs))
    assert numbers[2] == numbers[1]
    assert in_block() is None


def test_what_stands_around_is_left_as_it_was():
    model = build("flux")
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    keys = list(model.state_dict())
    report = apply_token_compression(model, LGTMConfig(modules=("attn1", "ff")))
    assert [row.kind for row in report.patched] == ["attn1", "ff"] * 4
    assert report.patched[-1].path == "merge the tokens of the whole block"
    for config in (LGTMConfig(modules=("ff",)), LGTMConfig(modules=("attn1", "ff"), merge="attention")):
        with token_compression(model, config) as other:
            assert other.rows[-1].reason.startswith("its MLP and its attention are one: they merge with 'attn1'")
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    for each in (model, copied):
        remove_token_compression(each)
        assert {name: set(vars(module)) for name, module in each.named_modules()} == names
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in each.modules()] == hooks


def test_a_failed_pass_and_one_inside_another():
    outer, inner = build("flux"), build("wan")
    config = LGTMConfig(modules=("attn1", "ff"))
    call, inside = case_of("flux").inputs(2, (1, 6, 6)), case_of("wan").inputs(1, (3, 6, 6))
    for model in (outer, inner):
        apply_token_compression(model, config)
    wanted, of_inner = outputs(outer, call), outputs(inner, inside)
    bad = {**inside, "encoder_hidden_states": torch.zeros(1, 2, 3)}
    seen = []

    def interrupt(*_):
        with pytest.raises(RuntimeError):
            outputs(inner, bad)
        seen.append(outputs(inner, inside))

    handle = outer.transformer_blocks[0].ff.net[0].register_forward_hook(interrupt)
    assert torch.equal(outputs(outer, call), wanted)
    assert torch.equal(seen[0], of_inner)
    handle.remove()
    handle = outer.transformer_blocks[0].ff.net[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(outer, call)
    assert in_block() is None
    handle.remove()
    assert torch.equal(outputs(outer, call), wanted)
    # An MLP by itself is one that is not compressed.
    x = torch.randn(1, 7, 32)
    mlp = outer.transformer_blocks[0].ff
    assert torch.equal(mlp(x), build("flux").transformer_blocks[0].ff(x))


def test_skipped_layers_take_no_part():
    config = LGTMConfig(modules=("attn1", "ff"))
    layers = LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=True, skip_ff=True)
    first, other = tiny_dit(), tiny_dit()
    for model in (first, other):
        apply_layer_skip(model, layers)
    apply_token_compression(first, config)
    apply_token_compression(other, replace(config, blocks=(0, 2, 3)))
    torch.testing.assert_close(outputs(first, dit_inputs()), outputs(other, dit_inputs()), **CLOSE)


@pytest.mark.parametrize("name", ["unet", *CASES, *WRITTEN_OUT, "unet_controlnet", *CONTROLNETS])
def test_arguments_stand_where_diffusers_has_them(name):
    model = {"unet": tiny_unet, "unet_controlnet": tiny_controlnet}.get(name, lambda: build(name))()
    family = family_of(model)
    read = [(type(model), family.signature)]
    if family.mlp is not None:
        read += [(type(layer.block), family.block) for layer in family.layers(model)]
    for cls, signature in read:
        names = list(inspect.signature(cls.forward).parameters)[1:]
        assert signature.positions == {name: names.index(name) for name in signature.positions}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"modules: got .*'ff'.* expected attentions alone: .* CogView4"):
        apply_token_compression(build("cogview4"), LGTMConfig(modules=("attn1", "ff")))
    with pytest.raises(ValueError, match=r"modules: got \('attn1', 'ff'\), expected \('attn1',\)"):
        IEKVDConfig(modules=("attn1", "ff"))
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig(modules=("ff",)))
    for block in model.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(1, 1)
    with pytest.raises(ValueError, match="modules: got 'ff' for a model whose MLPs run in chunks"):
        model(**unet_inputs())
