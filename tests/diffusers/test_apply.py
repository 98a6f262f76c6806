"""Applying, replacing, removing, reporting; and what is refused."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)

from .models import dit_inputs, recorded_plans, run, tiny_dit, tiny_unet, unet_inputs

MODELS = [(tiny_unet, unet_inputs), (tiny_dit, dit_inputs)]


def _traces(model: nn.Module) -> dict[str, object]:
    """Everything about a model that applying could leave behind."""
    return {
        name: (
            sorted(set(vars(module)) - {"processor"}),
            type(getattr(module, "processor", None)),
            id(getattr(module, "processor", None)),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            list(module._buffers),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", [LGTMConfig(max_downsample=2), ToMeConfig(), IEKVDConfig()])
def test_remove_restores_everything(build, inputs, config):
    model = build()
    before, output = _traces(model), run(model, inputs())
    apply_token_compression(model, config)
    assert _traces(model) != before
    assert not torch.allclose(run(model, inputs()), output, atol=1e-5)
    remove_token_compression(model)
    assert _traces(model) == before
    assert torch.equal(run(model, inputs()), output)
    remove_token_compression(model)  # nothing left to do, and no error


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_applying_twice_replaces(build, inputs):
    first, second, fresh = LGTMConfig(ratio=0.7), ToDoConfig(), build()
    apply_token_compression(fresh, second)
    model = build()
    before = _traces(model)
    apply_token_compression(model, first)
    apply_token_compression(model, second)
    assert torch.equal(run(model, inputs()), run(fresh, inputs()))
    remove_token_compression(model)
    assert _traces(model) == before


def _fail_inside(model, config):
    with token_compression(model, config):
        remove_token_compression(model)
        raise ZeroDivisionError


def test_context_manager_restores_also_nested_and_on_exception():
    model, inputs = tiny_dit(), dit_inputs()
    plain, before = run(model, inputs), _traces(model)
    with token_compression(model, LGTMConfig(ratio=0.7)) as report:
        outer = run(model, inputs)
        assert len(report.patched) == 4
        with token_compression(model, ToDoConfig()):
            assert not torch.equal(run(model, inputs), outer)
        assert torch.equal(run(model, inputs), outer)
        with pytest.raises(ZeroDivisionError):
            _fail_inside(model, ToDoConfig())
        assert torch.equal(run(model, inputs), outer)
        with pytest.raises(ValueError, match=r"^blocks: got"), token_compression(model, LGTMConfig(blocks=(99,))):
            pass
        assert torch.equal(run(model, inputs), outer)
    assert torch.equal(run(model, inputs), plain)
    assert _traces(model) == before


def test_unet_report_lists_levels_and_reasons():
    report = apply_token_compression(tiny_unet(), LGTMConfig())
    assert [row.block for row in report.patched] == [0, 4, 5]
    reasons = {row.block: row.reason for row in report.rows if row.kind == "attn1"}
    assert reasons[0] == "full resolution"
    assert reasons[6] == "1/2 resolution, max_downsample=1"
    text = str(report)
    assert "LGTMConfig on UNet2DConditionModel: 3 of 7 layers patched" in text
    assert "    0  down_blocks.0.attentions.0.transformer_blocks.0.attn1  patched  full resolution" in text
    assert "7 layers left alone by modules=('attn1',)" in text


def test_levels_and_blocks_of_a_deeper_unet():
    model = tiny_unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
    )
    half = apply_token_compression(model, LGTMConfig(max_downsample=2))
    assert {row.name.split(".attentions")[0] for row in half.patched} == {"down_blocks.1", "up_blocks.1"}
    assert len(apply_token_compression(model, LGTMConfig(max_downsample=4)).patched) == 11
    # Part of a transformer's blocks: its other block must neither change nor complain.
    report = apply_token_compression(model, LGTMConfig(max_downsample=4, blocks=(1,)))
    assert [row.name for row in report.patched] == ["down_blocks.2.attentions.0.transformer_blocks.0.attn1"]
    assert run(model, unet_inputs()).isfinite().all()


def test_config_that_patches_nothing_raises_and_leaves_the_model_alone():
    model = tiny_unet()
    with pytest.raises(ValueError, match=r"(?s)config: got .*block 0 is not among blocks=\(\)"):
        apply_token_compression(model, LGTMConfig(blocks=()))
    # Block 6 is at half resolution.
    with pytest.raises(ValueError, match="1/2 resolution, max_downsample=1"):
        apply_token_compression(model, LGTMConfig(blocks=(6,)))
    with pytest.raises(ValueError, match="at least one layer"):
        apply_token_compression(tiny_dit(), LGTMConfig(modules=("attn2",)))
    apply_token_compression(model, LGTMConfig())
    traces = _traces(model)
    with pytest.raises(ValueError, match="at least one layer"):
        apply_token_compression(model, ToDoConfig(blocks=(6,)))
    assert _traces(model) == traces


def test_unsupported_attention_is_reported():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.residual_connection = True
    model.transformer_blocks[1].attn1.rescale_output_factor = 2.0
    model.transformer_blocks[2].attn1.set_processor(SimpleNamespace())
    report = apply_token_compression(model, LGTMConfig())
    assert [row.patched for row in report.rows] == [False, False, False, True]
    assert "residual" in report.rows[0].reason
    assert "a processor of its own, SimpleNamespace" in report.rows[2].reason
    unet = tiny_unet(only_cross_attention=True)
    with pytest.raises(ValueError, match="it is a cross-attention in this block"):
        apply_token_compression(unet, LGTMConfig())


@pytest.mark.parametrize(
    "target",
    [
        nn.Linear(2, 2),
        SimpleNamespace(unet=None),
        SimpleNamespace(transformer=nn.Linear(2, 2)),
        nn.DataParallel(tiny_dit()),
    ],
)
def test_other_models_are_refused(target):
    message = r"model_or_pipe: got .*, expected a model of diffusers, or a pipeline .* wrapped .* its \.module"
    with pytest.raises(TypeError, match=message):
        apply_token_compression(target, LGTMConfig())
    with pytest.raises(TypeError, match=message):
        remove_token_compression(target)


def test_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="config: got dict"):
        apply_token_compression(tiny_dit(), {"ratio": 0.5})


def test_context_parallel_models_are_refused():
    model = tiny_dit()
    apply_token_compression(model, LGTMConfig())
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match="context-parallel"):
        run(model, dit_inputs())
    with pytest.raises(ValueError, match="context-parallel"):
        apply_token_compression(model, LGTMConfig())
    model._parallel_config = SimpleNamespace(context_parallel_config=None, tensor_parallel_config=object())
    run(model, dit_inputs())
    other = tiny_unet()
    other._cp_plan = {"": {}}
    with pytest.raises(ValueError, match="context-parallel"):
        apply_token_compression(other, LGTMConfig())


def test_pipelines_and_their_schedule():
    model = tiny_dit()
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipe = DiTPipeline(transformer=model, vae=vae, scheduler=DDPMScheduler(num_train_timesteps=500))
    report = apply_token_compression(pipe, LGTMConfig(ratio=0.5))
    assert report.config.num_train_timesteps == 500
    assert apply_token_compression(pipe, LGTMConfig(num_train_timesteps=100)).config.num_train_timesteps == 100
    remove_token_compression(pipe)
    assert not hasattr(model, "_bigain")
    report = apply_token_compression(SimpleNamespace(unet=tiny_unet(), scheduler=None), LGTMConfig())
    assert report.model == "UNet2DConditionModel"


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_saving_is_unchanged(build, inputs, tmp_path):
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    apply_token_compression(model, ToMeConfig(max_downsample=2))
    run(model, inputs())
    model.save_pretrained(tmp_path / "after")
    read = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert read[0] == read[1]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    again = type(model).from_pretrained(tmp_path / "after").eval()
    remove_token_compression(model)
    assert torch.equal(run(again, inputs()), run(model, inputs()))


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_deepcopy_works_and_is_independent(build, inputs, monkeypatch):
    model = build()
    plain = run(model, inputs())
    before = _traces(model)
    apply_token_compression(model, ToMeConfig(ratio=0.7, max_downsample=2))
    compressed = run(model, inputs())
    copied = copy.deepcopy(model)
    remove_token_compression(model)
    assert _traces(model) == before
    with recorded_plans(monkeypatch) as records:
        assert torch.equal(run(copied, inputs()), compressed)
    assert records
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(run(model, inputs()), plain)
    remove_token_compression(copied)
    assert {n: t[:2] for n, t in _traces(copied).items()} == {n: t[:2] for n, t in before.items()}
    assert not any(module._forward_pre_hooks for module in copied.modules())


def test_unknown_block_index_raises_even_beside_a_known_one():
    model = tiny_dit()
    with pytest.raises(ValueError, match=r"^blocks: got \[99\], expected indices below"):
        apply_token_compression(model, LGTMConfig(blocks=(0, 99)))


@pytest.mark.parametrize("config", [LGTMConfig(modules=("attn1", "ff")), ToMeConfig(), IEKVDConfig()])
def test_a_block_that_stands_twice_is_patched_once(config):
    def twice():
        model = tiny_dit()
        model.transformer_blocks[1] = model.transformer_blocks[0]
        return model

    model = twice()
    before, plain = _traces(model), run(twice(), dit_inputs())
    apply_token_compression(model, config)
    assert not torch.equal(run(model, dit_inputs()), plain)
    remove_token_compression(model)
    assert _traces(model) == before
    assert torch.equal(run(model, dit_inputs()), plain)


def test_the_way_out_of_set_default_attn_processor():
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig())
    compressed = run(model, unet_inputs())
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        model.set_default_attn_processor()
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(model, unet_inputs()), compressed)
    remove_token_compression(model)
    model.set_default_attn_processor()
