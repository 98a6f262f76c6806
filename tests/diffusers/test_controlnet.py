"""ControlNets and T2I-adapters: compressed beside their model or alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel, FluxControlNetModel, T2IAdapter

from bigain_kernels import reference
from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, ToMeConfig, apply_token_compression, token_compression

from .family_inputs import noise
from .family_models import CONTROLNETS, build, case_of, outputs
from .models import flux_inputs, run, tiny_flux, tiny_unet, unet_inputs
from .test_families import expected

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
CONFIGS = [IEKVDConfig(alpha=0.8), LGTMConfig(merge="attention", proportional=True)]


def tiny_controlnet():
    model = ControlNetModel.from_unet(tiny_unet(), conditioning_channels=3).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def picture(inputs):
    height, width = inputs["sample"].shape[-2:]
    return {"controlnet_cond": noise(inputs["sample"].shape[0], 3, 8 * height, 8 * width, seed=7)}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_with_nothing_to_do_is_the_unpatched_one(name):
    model = build(name)
    for batch, size in ((1, (6, 8)), (2, (5, 7))):
        inputs = case_of(name).inputs(batch, (1, *size))
        plain = outputs(model, inputs)
        for config in (IEKVDConfig(factor=1), LGTMConfig(ratio=0.0, modules=("attn1", "ff"))):
            with token_compression(model, config):
                assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("config", CONFIGS, ids=["pool", "merge"])
@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_equals_attention_written_out(name, config, monkeypatch):
    model = build(name)
    for size in (6, 8), (5, 7):
        inputs = case_of(name).inputs(2, (1, *size))
        wanted = expected(name, model, inputs, (1, *size), config, monkeypatch)
        with token_compression(model, config):
            torch.testing.assert_close(outputs(model, inputs), wanted, **CLOSE)
        assert (wanted - outputs(model, inputs)).abs().max() > 1e-5


@pytest.mark.parametrize("name", CONTROLNETS)
def test_hidden_states_and_mlps_of_controlnets(name):
    model, inputs = build(name), case_of(name).inputs(2, (1, 6, 6))
    config = ToMeConfig(modules=("attn1", "ff"), proportional=True)
    with token_compression(model, config) as report:
        assert {row.kind for row in report.patched} == {"attn1", "ff"}
        assert {row.path for row in report.patched if row.kind == "attn1"} == {"merge tokens, weigh keys by size"}
        found = outputs(model, inputs)
        assert torch.equal(outputs(model, inputs), found)
    assert found.isfinite().all()
    assert not torch.equal(found, outputs(model, inputs))


def test_merged_hidden_states_of_a_stable_diffusion_3_controlnet():
    """Its first attention, written out: text behind the image, no rotation."""
    model, inputs = build("sd3_controlnet"), case_of("sd3_controlnet").inputs(2, (1, 6, 6))
    config, seen = LGTMConfig(proportional=True), {}
    apply_token_compression(model, config)
    attn = model.transformer_blocks[0].attn

    def keep(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"], text=kwargs["encoder_hidden_states"], output=output)

    attn.register_forward_hook(keep, with_kwargs=True)
    outputs(model, inputs)
    plan = config.plan(seen["x"], (6, 6), 0.5)
    x = reference.token_merge(seen["x"], plan)
    with torch.no_grad():
        image, text = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query, key, value = (
            torch.cat([ours(x), theirs(seen["text"])], 1).unflatten(2, (attn.heads, -1))
            for ours, theirs in zip(image, text, strict=True)
        )
        sizes = torch.nn.functional.pad(plan.sizes().float().log(), (0, seen["text"].shape[1]))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5 + sizes[:, None, None]
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        wanted = reference.token_unmerge(attn.to_out[0](out[:, :18]), plan)
        torch.testing.assert_close(seen["output"][0], wanted, **CLOSE)
        torch.testing.assert_close(seen["output"][1], attn.to_add_out(out[:, 18:]), **CLOSE)


class Decided(LGTMConfig):
    """L-GTM of tokens that have nothing to do with the model's, so that rounding decides nothing."""

    def plan(self, x, grid, ratio, timestep=None):
        return super().plan(noise(x.shape[0], x.shape[1], 8), grid, ratio, timestep)


@pytest.mark.parametrize("config", [IEKVDConfig(), Decided(modules=("attn1", "ff"), proportional=True)])
@pytest.mark.parametrize("name", ["unet_controlnet", *CONTROLNETS])
def test_bfloat16_of_controlnets(name, config):
    if name == "unet_controlnet":
        model, inputs = tiny_controlnet(), unet_inputs()
        inputs |= picture(inputs)
    else:
        model, inputs = build(name), case_of(name).inputs(2, (1, 6, 6))
    apply_token_compression(model, config)

    def blocks():
        with torch.no_grad():
            return torch.cat([each.flatten() for each in model(**inputs, return_dict=False)[0]])

    wanted = blocks()
    model.bfloat16()
    for key, value in inputs.items():
        # Positions stay in float32, as pipelines make them.
        if torch.is_tensor(value) and value.is_floating_point() and "ids" not in key:
            inputs[key] = value.bfloat16()
    found = blocks()
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().mean() < 0.04 * wanted.abs().mean()


def test_a_union_has_its_mode_in_front_of_the_text(monkeypatch):
    torch.manual_seed(0)
    config = {**CONTROLNETS["flux_controlnet"].config, "num_mode": 3}
    model = FluxControlNetModel(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.normal_(std=0.1)
    inputs = {**case_of("flux_controlnet").inputs(2, (1, 6, 6)), "controlnet_mode": torch.tensor([[1], [2]])}
    for compression in (IEKVDConfig(factor=1), LGTMConfig(ratio=0.0)):
        plain = outputs(model, inputs)
        with token_compression(model, compression):
            assert torch.equal(outputs(model, inputs), plain)
    case = CONTROLNETS["flux_controlnet"]._replace(start=6, apart=lambda name: 6 if name.startswith("trans") else 0)
    monkeypatch.setitem(CONTROLNETS, "flux_controlnet", case)
    wanted = expected("flux_controlnet", model, inputs, (1, 6, 6), CONFIGS[1], monkeypatch)
    apply_token_compression(model, CONFIGS[1])
    torch.testing.assert_close(outputs(model, inputs), wanted, **CLOSE)


@pytest.mark.parametrize("config", [LGTMConfig(), LGTMConfig(modules=("attn1", "ff")), IEKVDConfig()])
def test_a_unet_and_its_controlnet(config):
    """Both compressed are each compressed: the U-Net of what the compressed ControlNet gives it."""
    inputs = unet_inputs()
    control = tiny_controlnet()

    def residuals(model):
        with torch.no_grad():
            down, middle = model(**inputs, **picture(inputs), return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    plain = residuals(control)
    report = apply_token_compression(control, config)
    assert [row.block for row in report.patched if row.kind == "attn1"] == [0]
    given = residuals(control)
    assert not torch.equal(given["mid_block_additional_residual"], plain["mid_block_additional_residual"])
    model = tiny_unet()
    alone = run(model, {**inputs, **given})
    with token_compression(model, config):
        both = run(model, {**inputs, **given})
    assert both.isfinite().all()
    assert not torch.equal(both, alone)
    whole = type(config)(**{"factor": 1} if isinstance(config, IEKVDConfig) else {"ratio": 0.0})
    with token_compression(model, whole), token_compression(control, whole):
        assert torch.equal(run(model, {**inputs, **residuals(control)}), run(tiny_unet(), {**inputs, **plain}))


def test_flux_with_what_a_controlnet_gives():
    inputs = flux_inputs()
    residuals = {
        "controlnet_block_samples": [noise(2, 60, 32, seed=3)],
        "controlnet_single_block_samples": [noise(2, 60, 32, seed=4)],
    }
    model = tiny_flux()
    plain = run(model, {**inputs, **residuals})
    for config in (IEKVDConfig(), LGTMConfig(modules=("attn1", "ff"))):
        with token_compression(model, config):
            found = run(model, {**inputs, **residuals})
            assert not torch.equal(found, run(model, inputs))
        assert found.isfinite().all()
        assert not torch.equal(found, plain)


@pytest.mark.parametrize("config", [LGTMConfig(modules=("attn1", "ff")), IEKVDConfig()])
def test_t2i_adapters(config):
    """An adapter adds to what the blocks give, outside of what is merged; it has no attention itself."""
    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=8).eval()
    inputs = unet_inputs()
    with torch.no_grad():
        features = adapter(noise(2, 3, 128, 128, seed=3))
    given = {**inputs, "down_intrablock_additional_residuals": features}

    def fresh():
        return {**given, "down_intrablock_additional_residuals": [each.clone() for each in features]}

    model = tiny_unet()
    apply_token_compression(model, config)
    found = run(model, fresh())
    assert not torch.equal(found, run(model, inputs))
    whole = type(config)(**{"factor": 1} if isinstance(config, IEKVDConfig) else {"ratio": 0.0})
    apply_token_compression(model, whole)
    assert torch.equal(run(model, fresh()), run(tiny_unet(), fresh()))
    with pytest.raises(
        TypeError, match=r"model_or_pipe: got T2IAdapter, expected a UNet2DConditionModel, .* or a pipeline"
    ):
        apply_token_compression(adapter, config)


def test_tokens_without_a_grid_are_refused():
    model, inputs = build("sd3_controlnet"), case_of("sd3_controlnet").inputs(1, (1, 6, 6))
    apply_token_compression(model, IEKVDConfig())
    with pytest.raises(ValueError, match=r"hidden_states: got \(1, 36, 4\), expected a latent picture"):
        outputs(model, {**inputs, "hidden_states": noise(1, 36, 4)})
