"""Every family, in every way of compressing it that it offers, with what people do to models: what docs/models.md is
made of. Tests of what compression computes are in other files; these are about what stands around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression
from bigain_kernels.diffusers.families import family_of

from .family_inputs import noise
from .family_models import CASES, CONTROLNETS, WRITTEN_OUT, build, case_of
from .models import tiny_unet, unet_inputs
from .test_controlnet import picture, tiny_controlnet
from .test_training import assert_same, gradients, reference_in_place

pytestmark = pytest.mark.slow

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
MODES = {
    "attention": LGTMConfig(merge="attention", proportional=True),
    "hidden": LGTMConfig(merge="hidden", proportional=True),
    "pool": IEKVDConfig(alpha=0.8),
}
UNETS = {"unet": tiny_unet, "unet_controlnet": tiny_controlnet}
NAMES = ["unet", *CASES, *WRITTEN_OUT, "unet_controlnet", *CONTROLNETS]


def model_of(name: str, layers: int | None = None) -> Any:
    return UNETS[name]() if name in UNETS else build(name, layers)


def inputs_of(name: str, size: tuple[int, int] = (6, 6), batch: int = 2) -> dict[str, Any]:
    if name not in UNETS:
        case = case_of(name)
        return case.inputs(batch, (case.frames, *size))
    inputs = unet_inputs(batch, (2 * size[0], 2 * size[1]))
    return inputs if name == "unet" else {**inputs, **picture(inputs)}


OFFERED = [
    (name, mode) for name in NAMES for mode in MODES if mode == "pool" or mode in family_of(model_of(name, 1)).merges
]
WAYS = pytest.mark.parametrize(("name", "mode"), OFFERED, ids=[f"{name}-{mode}" for name, mode in OFFERED])


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


# Why a whole model is no one graph, compressed or not.
NO_GRAPH = {
    "lumina2": "reads lengths of prompts on the host",
    "hidream": "reads numbers of tokens on the host",
}
# Those that do not say their grid, and the argument that gives it.
GIVES_GRID = dict.fromkeys(("flux", "flux2", "chroma", "flux_controlnet"), "joint_attention_kwargs")


def given(name: str, size: tuple[int, int] = (6, 6)) -> dict[str, Any]:
    inputs = inputs_of(name, size)
    if name in GIVES_GRID:
        inputs[GIVES_GRID[name]] = {"bigain_grid": size}
    return inputs


def results(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """All that a model returns first, in one row."""
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return torch.cat([each.flatten() for each in (found if isinstance(found, (list, tuple)) else [found])])


def as_it_is(module, example_inputs):
    return module.forward


@WAYS
def test_fullgraph(name, mode):
    if name in NO_GRAPH:
        pytest.skip(NO_GRAPH[name])
    model, inputs = model_of(name, 1), given(name)
    apply_token_compression(model, MODES[mode])
    wanted = results(model, inputs)
    found = results(torch.compile(model, fullgraph=True, backend=as_it_is), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)


@WAYS
def test_export(name, mode):
    if name in NO_GRAPH:
        pytest.skip(NO_GRAPH[name])
    if name == "cogvideox":
        pytest.skip("makes a tensor of its positions while it runs, unpatched too")
    model, inputs = model_of(name, 1), given(name)
    apply_token_compression(model, MODES[mode])
    wanted = results(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=False)
    torch.testing.assert_close(results(program.module(), inputs), wanted, **CLOSE)


# The mask over the text, of those that have one. In ControlNets of U-Nets it is one of self-attention.
MASKS = {
    "unet": "encoder_attention_mask",
    "pixart": "encoder_attention_mask",
    "hunyuan_dit": "text_embedding_mask",
    "chroma": "attention_mask",
    "qwen": "encoder_hidden_states_mask",
    "qwen_controlnet": "encoder_hidden_states_mask",
    "lumina2": "encoder_attention_mask",
    "ltx": "encoder_attention_mask",
    "ltx2": "encoder_attention_mask",
    "hunyuan_video": "encoder_attention_mask",
    "allegro": "encoder_attention_mask",
}
NO_MASK = {
    "cogview4": "diffusers adds its mask as 0 and 1, unpatched too",
    "latte": "diffusers does not repeat its mask over frames, unpatched too",
    "unet_controlnet": "its mask is over the image: refused",
    "z_image": "pads by itself",
}


@WAYS
def test_mask(name, mode):
    """What the mask hides of the text is seen nowhere, and what it does not hide is."""
    if name not in MASKS:
        pytest.skip(NO_MASK.get(name, "takes no mask over text"))
    model, inputs = model_of(name), inputs_of(name)
    text = inputs["encoder_hidden_states"]
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[:, -2:] = False
    if name == "chroma":  # of the image's tokens too
        mask = torch.cat([mask, torch.ones(2, inputs["hidden_states"].shape[1], dtype=torch.bool)], dim=1)
    whole = name in ("hunyuan_dit", "hunyuan_video", "allegro", "pixart", "unet")
    inputs[MASKS[name]] = mask.float() if whole else mask
    apply_token_compression(model, MODES[mode])
    wanted = results(model, inputs)
    changed = text.clone()
    changed[:, -2:] += 3.0
    torch.testing.assert_close(results(model, {**inputs, "encoder_hidden_states": changed}), wanted, **CLOSE)
    changed[:, 0] += 3.0
    assert (results(model, {**inputs, "encoder_hidden_states": changed}) - wanted).abs().max() > 1e-4


@WAYS
def test_lora(name, mode):
    """Adapters of peft in all compressed attentions, put in before and after: a model whose weights hold the change."""
    peft = pytest.importorskip("peft")
    by_hand, inputs = model_of(name), inputs_of(name)
    report = apply_token_compression(by_hand, MODES[mode])
    targets = [
        f"{row.name}.{inner}"
        for row in report.patched
        for inner, layer in by_hand.get_submodule(row.name).named_modules()
        if isinstance(layer, nn.Linear)
    ]
    assert targets
    adapters = {}
    for name_of_layer in targets:
        layer = by_hand.get_submodule(name_of_layer)
        down, up = noise(2, layer.in_features, seed=3) * 0.2, noise(layer.out_features, 2, seed=4) * 0.2
        layer.weight.data += up @ down
        adapters[name_of_layer] = {"lora_A": down, "lora_B": up}
    wanted = results(by_hand, inputs)
    for first in (True, False):
        model = model_of(name)
        if first:
            apply_token_compression(model, MODES[mode])
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), model)
        for name_of_layer, values in adapters.items():
            for part, value in values.items():
                getattr(model.get_submodule(name_of_layer), part)["default"].weight.data.copy_(value)
        if not first:
            plain = results(model, inputs)
            apply_token_compression(model, MODES[mode])
            assert (plain - wanted).abs().max() > 1e-4
        torch.testing.assert_close(results(model, inputs), wanted, atol=1e-4, rtol=1e-4)


NO_OFFLOAD = {"hunyuan_dit": "the model itself holds a tensor that offloading takes away, unpatched too"}


@WAYS
def test_offload(name, mode):
    """Accelerate's hooks on a compressed model, and compression of one whose layers come one by one: the same bits."""
    if name in NO_OFFLOAD:
        pytest.skip(NO_OFFLOAD[name])
    accelerate = pytest.importorskip("accelerate")
    cpu, inputs = torch.device("cpu"), inputs_of(name)
    apply_token_compression(stays := model_of(name), MODES[mode])
    wanted = results(stays, inputs)
    accelerate.cpu_offload(stays, execution_device=cpu)
    assert torch.equal(results(stays, inputs), wanted)
    model = model_of(name)
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")
    apply_token_compression(model, MODES[mode])
    assert torch.equal(results(model, inputs), wanted)


@WAYS
def test_gradients(name, mode, monkeypatch):
    """The reference's steps, which PyTorch differentiates, in the places of the ops."""
    model, inputs = model_of(name), inputs_of(name)
    apply_token_compression(model, MODES[mode])
    with torch.enable_grad():
        found = gradients(model, inputs)
        called = reference_in_place(monkeypatch)
        assert_same(found, gradients(model, inputs))
    assert called
