"""The nodes of ComfyUI: with fakes of the few calls that they make, and in a checkout where COMFYUI_PATH names one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bigain_kernels import kv_downsample, lgtm_plan, token_merge, token_unmerge

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
HEADS, DIM, TEXT = 2, 8, 5


class Schema(SimpleNamespace):
    pass


def socket(kind):
    return SimpleNamespace(
        Input=lambda *names, **given: SimpleNamespace(kind=kind, name=names[0], **given),
        Output=lambda *names: SimpleNamespace(kind=kind),
    )


@pytest.fixture(scope="module")
def extension():
    """The folder as ComfyUI loads it, a package by its path, with a fake of comfy_api."""
    api = types.ModuleType("comfy_api.latest")
    api.ComfyExtension = object
    api.io = SimpleNamespace(
        ComfyNode=object,
        Schema=Schema,
        NodeOutput=lambda *values: values,
        **{kind: socket(kind) for kind in ("Model", "Float", "Int")},
    )
    names = {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.latest": api}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in names.items():
            patch.setitem(sys.modules, name, module)
        name = str(FOLDER).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module
        for loaded in [each for each in sys.modules if each.startswith(f"{name}.")]:
            del sys.modules[loaded]


@pytest.fixture(scope="module")
def nodes(extension):
    made = asyncio.run(asyncio.run(extension.comfy_entrypoint()).get_node_list())
    return {node.define_schema().node_id: node for node in made}


@pytest.fixture(scope="module")
def compression(extension):
    return sys.modules[f"{extension.__name__}.compression"]


class UNetModel:
    """Calls its attention as that of ComfyUI does: (B, N, heads * d), with the shape of the layer in the options."""

    def _forward(self, x, timesteps, context, y, control, transformer_options):
        transformer_options["activations_shape"] = list(x.shape)
        tokens = x.flatten(2).transpose(1, 2)
        out = attention(tokens, tokens * 2, tokens + 1, HEADS, transformer_options=transformer_options)
        # Cross-attention, which has other keys.
        out = out + attention(tokens, context, context, HEADS, transformer_options=transformer_options)
        return out.transpose(1, 2).reshape(x.shape)


class Flux:
    """Text in front of the image, heads apart, patches of 2 x 2."""

    patch_size = 2

    def _forward(self, x, timestep, context, y, guidance, ref_latents, control, transformer_options):
        image = F.pixel_unshuffle(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)), 2).flatten(2).transpose(1, 2)
        tokens = torch.cat([context, image[..., : HEADS * DIM]], 1).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        return attention(
            tokens, tokens * 2, tokens + 1, HEADS, skip_reshape=True, mask=None, transformer_options=transformer_options
        )


def plain_attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(*args, **kwargs):
    override = kwargs["transformer_options"].get("optimized_attention_override")
    return plain_attention(*args, **kwargs) if override is None else override(plain_attention, *args, **kwargs)


class Patcher:
    """ModelPatcher: options that a clone copies, wrappers by key, and the sampling."""

    def __init__(self, model):
        self.model = SimpleNamespace(diffusion_model=model)
        self.model_options, self.wrappers = {"transformer_options": {}}, {}

    def clone(self):
        copy = Patcher(self.model.diffusion_model)
        copy.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        copy.wrappers = {kind: {key: [*each] for key, each in keys.items()} for kind, keys in self.wrappers.items()}
        return copy

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def get_model_object(self, name):
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: 10.0 * (1.0 - percent))


def run(patcher, shape=(2, HEADS * DIM, 6, 8), sigma=5.0):
    generator = torch.Generator().manual_seed(1)
    model = patcher.model.diffusion_model
    x, text = torch.randn(shape, generator=generator), torch.randn(2, TEXT, HEADS * DIM, generator=generator)
    options = {**patcher.model_options["transformer_options"], "sigmas": torch.tensor([sigma])}
    wrappers = [each for keys in patcher.wrappers.get("diffusion_model", {}).values() for each in keys]

    def call(index, *args):
        if index == len(wrappers):
            return model._forward(*args)
        return wrappers[index](Executor(model, call, index), *args)

    between = [None] * (2 if isinstance(model, UNetModel) else 4)
    return call(0, x, torch.zeros(2), text, *between, options)


class Executor:
    def __init__(self, model, call, index):
        self.class_obj, self.call, self.index = model, call, index

    def __call__(self, *args):
        return self.call(self.index + 1, *args)


def lgtm(nodes, model, ratio=0.5, start=0.0, end=1.0, tokens=1):
    return nodes["BiGainLGTM"].execute(model, ratio, start, end, tokens)[0]


def iekvd(nodes, model, factor=2, alpha=0.9, start=0.0, end=1.0, tokens=1):
    return nodes["BiGainIEKVD"].execute(model, factor, alpha, start, end, tokens)[0]


MODELS = pytest.mark.parametrize("model", [UNetModel, Flux])


def test_schemas(nodes):
    assert set(nodes) == {"BiGainLGTM", "BiGainIEKVD", "BiGainRemove"}
    for node in nodes.values():
        schema = node.define_schema()
        assert [each.kind for each in schema.outputs] == ["Model"]
        assert schema.inputs[0].kind == "Model"
    ratio = next(each for each in nodes["BiGainLGTM"].define_schema().inputs if each.name == "ratio")
    assert (ratio.min, ratio.max) == (0.0, 0.75)


@MODELS
def test_what_changes_nothing(nodes, model):
    patcher = Patcher(model())
    plain = run(patcher)
    for made in (lgtm(nodes, patcher, 0.0), iekvd(nodes, patcher, 1), lgtm(nodes, patcher, tokens=1000)):
        assert torch.equal(run(made), plain)
    removed = nodes["BiGainRemove"].execute(lgtm(nodes, patcher))[0]
    assert torch.equal(run(removed), plain)
    assert removed.model_options == patcher.model_options
    assert not torch.equal(run(lgtm(nodes, patcher)), plain)
    assert torch.equal(run(patcher), plain)


def test_merging_in_a_u_net(nodes):
    patcher = Patcher(UNetModel())
    x = torch.randn(2, HEADS * DIM, 6, 8, generator=torch.Generator().manual_seed(1))
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = tokens, tokens * 2, tokens + 1
    plan = lgtm_plan(k, (6, 8), 0.5)
    merged = plain_attention(*(token_merge(each, plan) for each in (q, k, v)), HEADS)
    cross = run(patcher) - plain_attention(q, k, v, HEADS).transpose(1, 2).reshape(x.shape)
    expected = token_unmerge(merged, plan).transpose(1, 2).reshape(x.shape) + cross
    torch.testing.assert_close(run(lgtm(nodes, patcher)), expected, rtol=0, atol=1e-5)


def test_pooling_behind_text(nodes):
    """An odd latent, whose last row and column are padded to a patch; text stays whole."""
    shape = (2, HEADS * DIM, 7, 10)
    patcher, seen = Patcher(Flux()), []

    def spy(func, q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return func(q, k, v, *args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = spy
    run(patcher, shape), run(iekvd(nodes, patcher), shape)
    (q, k, v), (pooled_q, pooled_k, pooled_v) = seen
    assert torch.equal(pooled_q, q)
    for whole, pooled in ((k, pooled_k), (v, pooled_v)):
        assert torch.equal(pooled[:, :, :TEXT], whole[:, :, :TEXT])
        image = whole[:, :, TEXT:].transpose(1, 2).flatten(2)
        expected = kv_downsample(image, (4, 5), 2, 0.9).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        assert torch.equal(pooled[:, :, TEXT:], expected)


@MODELS
def test_steps(nodes, model):
    patcher = Patcher(model())
    plain, always = run(patcher), run(lgtm(nodes, patcher))
    some = lgtm(nodes, patcher, start=0.2, end=0.6)  # sigmas 8 to 4
    for sigma, expected in ((9.0, plain), (8.0, always), (5.0, always), (4.0, always), (3.9, plain)):
        assert torch.equal(run(some, sigma=sigma), expected)


@MODELS
def test_other_overrides(nodes, model):
    """One before compression attends to what it leaves; one behind is not lost; the later node of ours replaces."""
    patcher, calls = Patcher(model()), []

    def other(func, *args, **kwargs):
        calls.append(args[1].shape)
        return func(*args, **kwargs)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = other
    plain = run(patcher)
    count = len(calls)
    merged = lgtm(nodes, patcher)
    result = run(merged)
    assert len(calls) == 2 * count
    assert calls[count] != calls[0]
    assert torch.equal(run(lgtm(nodes, iekvd(nodes, patcher))), result)
    removed = nodes["BiGainRemove"].execute(merged)[0]
    assert removed.model_options["transformer_options"]["optimized_attention_override"] is other

    inner = merged.model_options["transformer_options"]["optimized_attention_override"]
    around = merged.clone()
    around.model_options["transformer_options"]["optimized_attention_override"] = lambda *a, **k: inner(*a, **k)
    assert torch.equal(run(around), result)
    assert torch.equal(run(nodes["BiGainRemove"].execute(around)[0]), plain)
    pooled = run(iekvd(nodes, patcher))
    assert torch.equal(run(iekvd(nodes, around)), pooled)


def test_masks_stay(compression):
    method = compression.Method(ratio=0.5)
    override = compression.Compression(method, "levels", None)
    q = torch.randn(1, 16, 8)
    options = {"bigain": (method, compression.Image(0, (4, 4))), "activations_shape": [1, 8, 4, 4]}
    given = {"mask": torch.zeros(16, 16), "transformer_options": options}
    seen = []
    override(lambda *args, **kwargs: seen.append(args[0].shape[1]), q, q, q, 2, **given)
    given["mask"] = None
    override(lambda *args, **kwargs: seen.append(args[0].shape[1]) or args[0], q, q, q, 2, **given)
    assert seen == [16, 8]


def test_refusals(nodes):
    other = Patcher(SimpleNamespace())
    with pytest.raises(ValueError, match=r"^model: got a SimpleNamespace, expected one of \['Flux', 'UNetModel'\]"):
        lgtm(nodes, other)
    with pytest.raises(ValueError, match=r"^start_percent, end_percent: got \(0.8, 0.2\)"):
        lgtm(nodes, Patcher(Flux()), start=0.8, end=0.2)


def test_the_picture_shows_the_nodes(nodes):
    picture = (FOLDER / "nodes.svg").read_text(encoding="utf-8")
    for node in nodes.values():
        schema = node.define_schema()
        assert f">{schema.display_name}<" in picture
        for each in schema.inputs:
            assert f">{each.name}<" in picture


def test_the_workflow_names_the_nodes(nodes):
    workflow = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
    used = {node["class_type"]: node["inputs"] for node in workflow.values()}
    for name in {"BiGainLGTM", "BiGainIEKVD"} & set(used):
        assert set(used[name]) == {each.name for each in nodes[name].define_schema().inputs}
    assert "BiGainLGTM" in used


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set to a checkout of ComfyUI")
def test_in_a_checkout():
    command = [sys.executable, Path(__file__).with_name("comfyui_checkout.py"), os.environ["COMFYUI_PATH"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the model itself is as it was") == 3
    assert "the workflow is valid" in done.stdout
