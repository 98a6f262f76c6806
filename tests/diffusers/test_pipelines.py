"""Whole pipelines: perturbed attention, guidance that ends, several pictures, and who shares a plan with whom."""

from __future__ import annotations

import ast
import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.diffusers.families import registered
from bigain_kernels.diffusers.schedulers import ONE_CONDITION, Pipeline

from .models import (
    TEXT_DIM,
    dit_inputs,
    flux_inputs,
    only,
    recorded_plans,
    run,
    tiny_dit,
    tiny_flux,
    tiny_unet,
    unet_inputs,
)

TEXT = torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(5))


def pipeline(cls=StableDiffusionPipeline, **changes):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipe = cls(vae=vae, unet=tiny_unet(), scheduler=DDIMScheduler(), requires_safety_checker=False, **parts, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, guidance=5.0, pictures=1, steps=4, **changes):
    return pipe(
        prompt_embeds=TEXT[:1],
        negative_prompt_embeds=TEXT[1:],
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=pictures,
        height=16 * pipe.vae_scale_factor,
        width=16 * pipe.vae_scale_factor,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **changes,
    ).images


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        ("mid", LGTMConfig()),
        ("mid", LGTMConfig(max_downsample=8)),
        ("down_blocks.0", LGTMConfig(share_plan=3)),
        ("down_blocks.0", ToMeConfig(modules=("attn1", "attn2"))),
        ("up_blocks.1", IEKVDConfig(max_downsample=2)),
    ],
)
def test_perturbed_attention(layer, config):
    """Its pipeline puts other processors in for one call. Their layers run as they do uncompressed, the others not."""
    pipe = pipeline(StableDiffusionPAGPipeline, pag_applied_layers=layer)
    plain, plain_perturbed = generate(pipe), generate(pipe, pag_scale=3.0)
    apply_token_compression(pipe, config)
    compressed, processors = generate(pipe, pag_scale=0.0), dict(pipe.unet.attn_processors)
    perturbed = generate(pipe, pag_scale=3.0)
    assert perturbed.isfinite().all()
    assert not torch.equal(perturbed, plain_perturbed) or layer == "mid"
    assert not torch.equal(compressed, plain)
    assert pipe.unet.attn_processors == processors
    assert torch.equal(generate(pipe, pag_scale=0.0), compressed)


def in_modules(transformer):
    """The denoising of Flux's modular pipeline, with inputs given in the place of what comes before."""
    blocks = SequentialPipelineBlocks.from_blocks_dict({"denoise": FluxDenoiseStep()})
    blocks.sub_blocks["denoise"].set_progress_bar_config(disable=True)
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


def denoise(pipe):
    inputs = flux_inputs()
    pipe.scheduler.set_timesteps(4)
    return pipe(
        latents=inputs["hidden_states"],
        prompt_embeds=inputs["encoder_hidden_states"],
        pooled_prompt_embeds=inputs["pooled_projections"],
        txt_ids=inputs["txt_ids"],
        img_ids=inputs["img_ids"],
        timesteps=pipe.scheduler.timesteps,
        num_inference_steps=4,
        output="latents",
    )


@pytest.mark.parametrize(
    "config",
    [LGTMConfig(ratio=(0.6, 0.3), modules=("attn1", "ff")), LGTMConfig(start=0.3), IEKVDConfig(alpha=(0.8, 1.2))],
)
def test_modular_pipelines(config):
    """Step by step what the model alone, compressed, makes of the same inputs."""
    pipe = in_modules(tiny_flux())
    plain = denoise(pipe)
    apply_token_compression(pipe, config)
    found = denoise(pipe)
    apply_token_compression(alone := tiny_flux(), config)
    inputs, scheduler = flux_inputs(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x = inputs["hidden_states"]
    for timestep in scheduler.timesteps:
        inputs |= {"hidden_states": x, "timestep": timestep.flatten() / 1000}
        x = scheduler.step(run(alone, inputs), timestep, x).prev_sample
    assert torch.equal(found, x)
    assert not torch.equal(found, plain)
    remove_token_compression(pipe)
    assert torch.equal(denoise(pipe), plain)


def end_guidance(pipe, step, timestep, tensors):
    """The callback of diffusers' documentation that turns guidance off in mid-run."""
    if step == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("order", ["cat", "interleave"])
def test_sharing_lapses_when_guidance_ends(pictures, order, monkeypatch):
    pipe = pipeline()
    apply_token_compression(pipe, LGTMConfig(share_plan=2, share_order=order))
    with recorded_plans(monkeypatch) as records:
        generate(
            pipe,
            pictures=pictures,
            callback_on_step_end=end_guidance,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    rows = [(x.shape[0], plan.num_rows) for x, plan in records]
    assert set(rows) == {(2 * pictures, pictures), (pictures, pictures)}


def test_pictures_without_guidance_do_not_share(monkeypatch):
    pipe = pipeline()
    apply_token_compression(pipe, LGTMConfig(share_plan=2))
    with recorded_plans(monkeypatch) as records:
        shared = generate(pipe, guidance=1.0, pictures=2)
    assert all(plan.num_rows == 2 for _, plan in records)
    apply_token_compression(pipe, LGTMConfig())
    assert torch.equal(generate(pipe, guidance=1.0, pictures=2), shared)


def test_a_copied_model_does_not_share(monkeypatch):
    """It has no pipeline to ask, and its original's may run guidance or not."""
    pipe = pipeline()
    apply_token_compression(pipe, LGTMConfig(share_plan=2))
    model = copy.deepcopy(pipe.unet)
    with recorded_plans(monkeypatch) as records:
        run(model, unet_inputs())
    assert all(plan.num_rows == 2 for _, plan in records)
    # A model that never had one shares as it is told.
    apply_token_compression(model, LGTMConfig(share_plan=2))
    with recorded_plans(monkeypatch) as records:
        run(model, unet_inputs())
    assert all(plan.num_rows == 1 for _, plan in records)


def test_a_guider_calls_once_for_each_condition(monkeypatch):
    model = tiny_unet()
    pipe = SimpleNamespace(unet=model, scheduler=DDIMScheduler(), guider=object())
    apply_token_compression(pipe, LGTMConfig(share_plan=2))
    with recorded_plans(monkeypatch) as records:
        run(model, unet_inputs())
    assert all(plan.num_rows == 2 for _, plan in records)


def methods_of_pipelines():
    """(class name, text of __init__, text of __call__) of the pipelines of diffusers, but for those it keeps as they
    were."""
    for path in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        text = path.read_text()
        for cls in ast.parse(text).body if "deprecated" not in path.parts else ():
            if isinstance(cls, ast.ClassDef) and cls.name.endswith("Pipeline"):
                methods = {m.name: ast.get_source_segment(text, m) for m in cls.body if isinstance(m, ast.FunctionDef)}
                if {"__init__", "__call__"} <= methods.keys():
                    yield cls.name, methods["__init__"], methods["__call__"]


def test_which_pipelines_call_once_for_each_condition():
    """As their code says: those do whose `__call__` calls the model twice and doubles nothing."""
    ours = re.compile(r"\b(" + "|".join(family.model.__name__ for family in registered()) + r")\b")
    one, several = [], []
    for name, init, call in methods_of_pipelines():
        if ours.search(init):
            calls = len(re.findall(r"(?:self\.(?:transformer|unet)|current_model)\(", call))
            doubles = re.search(r"\] \* [23]|repeat\(2|\[latents, latents\]|_prepare_perturbed", call)
            if calls > 1 and not doubles:
                one.append(name)
            elif doubles and calls == 1:
                several.append(name)
    assert len(one) > 20
    assert len(several) > 60
    assert [name for name in one if not name.startswith(ONE_CONDITION)] == []
    assert [name for name in several if name.startswith(ONE_CONDITION)] == []


@pytest.mark.parametrize(
    ("name", "guided", "expected"),
    [
        ("WanPipeline", True, 1),
        ("Lumina2Pipeline", True, 1),
        ("StableDiffusionPipeline", True, 2),
        ("StableDiffusionPipeline", False, 1),
        ("StableDiffusionInstructPix2PixPipeline", True, 3),
        ("StableDiffusionInstructPix2PixPipeline", False, 1),
    ],
)
def test_conditions_of_pipelines(name, guided, expected):
    derived = type("Ours", (getattr(diffusers, name),), {"do_classifier_free_guidance": guided})
    pipe = derived.__new__(derived)
    assert Pipeline(pipe).conditions() == expected


@pytest.mark.parametrize("build", ["unet", "dit"])
@pytest.mark.parametrize("config", [LGTMConfig(share_plan=2), ToMeConfig(share_plan=2, cached_assignment=True)])
def test_interleaved_rows_share_as_rows_apart_do(build, config):
    model, inputs = (tiny_unet(), unet_inputs(6)) if build == "unet" else (tiny_dit(), dit_inputs(6))
    with token_compression(model, config):
        apart = run(model, inputs)
    order = [0, 3, 1, 4, 2, 5]  # the pairs (0, 3), (1, 4) and (2, 5) as neighbours
    with token_compression(model, replace(config, share_order="interleave")):
        neighbours = run(model, only(inputs, order))
    torch.testing.assert_close(neighbours, apart[order], atol=1e-5, rtol=1e-5)
