"""Single-stream blocks merged as a whole, against the blocks written out in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from bigain_kernels.diffusers import LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression, token_compression
from bigain_kernels.diffusers.current import in_block

from .family_inputs import TEXT
from .family_models import build, case_of
from .models import flux_inputs, image_ids, run, tiny_flux
from .test_rebound_hidden import Merged, turned

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
BOTH = ("attn1", "ff")
CONFIGS = [
    LGTMConfig(modules=BOTH),
    LGTMConfig(modules=BOTH, ratio=0.7, proportional=True, share_plan=2),
    LGTMConfig(modules=BOTH, ratio=0.6, proportional=True, window=(1, 1), over_time=True),
    ToMeConfig(modules=BOTH, destinations="first", mode="mlerp"),
]
NAMES = ["flux", "chroma", "hunyuan_video", "flux_controlnet"]
READS_ITS_GRID = "hunyuan_video"


def single_only(name, config):
    """The config for the blocks of one stream alone, which stand behind those of two."""
    model = build(name)
    double = len(model.transformer_blocks)
    return replace(config, blocks=tuple(range(double, double + len(model.single_transformer_blocks))))


def written_out(block, config, grid):
    """The forward method of a single-stream block, of whose image tokens `grid` are merged.

    Text stands in front: apart, as Flux has it, or among the hidden states, as Chroma has it. In HunyuanVideo it is
    apart and stands behind, and is not turned.
    """
    attn, count = block.attn, grid[0] * grid[1] * grid[2]

    def forward(hidden_states, text=None, temb=None, attention_mask=None, image_rotary_emb=None, *rest, **kwargs):
        text, mask = kwargs.get("encoder_hidden_states", text), attention_mask
        behind = image_rotary_emb[0].shape[0] == count
        parts = [hidden_states] if text is None else [hidden_states, text] if behind else [text, hidden_states]
        x = torch.cat(parts, dim=1)
        start = 0 if behind else TEXT
        merged = Merged(config, x[:, start : start + count], grid, start)
        few = torch.cat([x[:, :start], merged.down(x[:, start : start + count]), x[:, start + count :]], dim=1)
        norm, gate = block.norm(few, emb=temb)
        query, key, value = (layer(norm).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        tables = [merged.left(table) for table in image_rotary_emb]
        seen = tables[0].shape[1]
        query, key = (
            torch.cat([turned(each[:, :seen], *tables), each[:, seen:]], dim=1)
            for each in (attn.norm_q(query), attn.norm_k(key))
        )
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None] * mask[:, None, :, None]
        out = merged.attend(query, key, value, mask)
        mlp = block.act_mlp(block.proj_mlp(norm))
        added = gate[:, None] * block.proj_out(torch.cat([out, mlp], dim=2))
        stop = start + merged.anchors.shape[1]
        x = x + torch.cat([added[:, :start], merged.up(added[:, start:stop]), added[:, stop:]], dim=1)
        if text is None:
            return x
        length = text.shape[1]
        return (x[:, :-length], x[:, -length:]) if behind else (x[:, :length], x[:, length:])

    return forward


def returned(name, model, inputs):
    """All that a model returns; of a ControlNet, what it gives the blocks of one stream too."""
    if name == "flux":
        return run(model, inputs)
    with torch.no_grad():
        found = model(**inputs, return_dict=False)
    return torch.stack([*found[0], *found[1]]) if name == "flux_controlnet" else found[0]


def expected(name, config, grid, inputs):
    model = build(name)
    for block in model.single_transformer_blocks:
        block.forward = written_out(block, config, grid)
    return returned(name, model, inputs)


def with_reference(inputs, tokens=12):
    """A second picture behind the first, as Flux Kontext has it."""
    more = torch.randn(inputs["hidden_states"].shape[0], tokens, 16, generator=torch.Generator().manual_seed(5))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], more], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], image_ids(3, tokens // 3, 1)])
    return inputs


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.ratio}")
@pytest.mark.parametrize("name", NAMES)
def test_whole_blocks_equal_blocks_written_out(name, config):
    model, case, config = build(name), case_of(name), single_only(name, config)
    for batch, size in ((2, (6, 10)), (4, (5, 7))):
        grid = (case.frames, *size)
        calls = [case.inputs(batch, grid)]
        if name == "flux":
            calls.append(with_reference(case.inputs(batch, grid)))
        for inputs in calls:
            wanted = expected(name, config, grid, inputs)
            with token_compression(model, config) as report:
                assert [row.kind for row in report.patched] == list(BOTH) * len(config.blocks)
                found = returned(name, model, inputs)
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert (wanted - returned(name, model, inputs)).abs().max() > 1e-4
    assert in_block() is None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_merge_is_the_unpatched_model(name):
    model, case = build(name), case_of(name)
    inputs = case.inputs(1, (case.frames, 6, 10))
    plain = returned(name, model, inputs)
    for config in (LGTMConfig(ratio=0.0, modules=BOTH), SiToConfig(end=0.0, modules=BOTH)):
        with token_compression(model, config):
            assert torch.equal(returned(name, model, inputs), plain)


@pytest.mark.parametrize("name", NAMES[1:])
def test_whole_blocks_with_all_others_in_one_graph(name):
    torch._dynamo.reset()
    model, case = build(name), case_of(name)
    inputs = case.inputs(2, (case.frames, 6, 6))
    apply_token_compression(model, LGTMConfig(modules=BOTH, proportional=True))
    wanted = returned(name, model, inputs)
    if name != READS_ITS_GRID:
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    found = returned(name, torch.compile(model, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_blocks_that_count_the_tokens_of_their_first_frame_are_not_merged_as_a_whole():
    torch.manual_seed(0)
    config = {**case_of("hunyuan_video").config, "image_condition_type": "token_replace"}
    model = HunyuanVideoTransformer3DModel(**config).eval()
    inputs = case_of("hunyuan_video").inputs(2, (3, 6, 6))
    plain = returned("", model, inputs)
    with token_compression(model, LGTMConfig(modules=BOTH)) as report:
        assert [row.name for row in report.rows if row not in report.patched] == ["single_transformer_blocks.0.ff"]
        assert report.rows[-1].reason == "its MLP and its attention are one"
        found = returned("", model, inputs)
    assert found.isfinite().all()
    assert (found - plain).abs().max() > 1e-4


def test_halves_random_methods_and_one_graph():
    torch._dynamo.reset()
    model = tiny_flux().bfloat16()
    inputs = flux_inputs(2, (6, 6), dtype=torch.bfloat16)
    for config in (SiToConfig(modules=BOTH), ToMeConfig(modules=BOTH, cached_assignment=True)):
        with token_compression(model, config):
            found = run(model, inputs)
            assert found.dtype == torch.bfloat16
            assert found.isfinite().all()
            assert torch.equal(run(model, inputs), found)
    model, inputs = tiny_flux(), flux_inputs(2, (6, 6))
    apply_token_compression(model, LGTMConfig(modules=BOTH, proportional=True))
    wanted = run(model, inputs)
    inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    found = run(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_block_whose_attention_is_not_ours_runs_as_it_is():
    class Foreign(FluxAttnProcessor):
        pass

    first, other = tiny_flux(), tiny_flux()
    apply_token_compression(first, LGTMConfig(modules=BOTH))
    apply_token_compression(other, LGTMConfig(modules=BOTH, blocks=(0, 1, 3)))
    first.single_transformer_blocks[0].attn.set_processor(Foreign())
    assert torch.equal(run(first, flux_inputs()), run(other, flux_inputs()))


def test_caches_over_steps_are_refused_by_name():
    model = tiny_flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    apply_token_compression(model, LGTMConfig(modules=BOTH))
    with model.cache_context("cond"), pytest.raises(ValueError, match=r"modules: got 'ff' and FBC.*Hook on FluxSingle"):
        run(model, flux_inputs())
    assert in_block() is None


def test_a_failed_block_leaves_nothing():
    model = tiny_flux()
    apply_token_compression(model, LGTMConfig(modules=BOTH))
    wanted = run(model, flux_inputs())
    handle = model.single_transformer_blocks[1].proj_mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, flux_inputs())
    handle.remove()
    assert in_block() is None
    assert torch.equal(run(model, flux_inputs()), wanted)


def test_a_class_put_around_that_of_a_block_changes_nothing():
    """As FSDP2 does it: the class of a module becomes one derived from its own, which adds methods."""
    config, plain, model = LGTMConfig(modules=BOTH), build("flux"), build("flux")
    rows = apply_token_compression(plain, config).rows
    for block in model.single_transformer_blocks:
        block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {"unshard": lambda self: None})
    assert apply_token_compression(model, config).rows == rows
    assert torch.equal(run(model, flux_inputs()), run(plain, flux_inputs()))


def test_a_block_with_a_forward_method_of_its_own_is_not_merged_whole():
    model = build("flux")
    block = model.single_transformer_blocks[0]
    block.__class__ = type("Other", (type(block),), {"forward": lambda self, *args, **kwargs: None})
    rows = [row for row in apply_token_compression(model, LGTMConfig(modules=BOTH)).rows if row.kind == "ff"]
    assert [row.patched for row in rows] == [True, True, False, True]
    assert "its MLP and its attention are one" in rows[2].reason
