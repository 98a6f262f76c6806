"""Families that are compressed in the middle of their attention, against attention written out in plain PyTorch.

The oracle is the unpatched model with another function in the place of the one by which its processors attend.
"""

from __future__ import annotations

import threading
import types

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

from bigain_kernels import reference
from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.diffusers.families import REFUSED, family_of, registered
from bigain_kernels.methods import PoolConfig

from .family_inputs import noise
from .family_models import CASES, CONTROLNETS, WRITTEN_OUT, build, case_of, module_of, outputs

SIZES = [(6, 8), (5, 9)]
CLOSE = {"atol": 3e-5, "rtol": 3e-5}
# Compressed by `PlainFamily`, which projects fewer tokens; all others are rebound.
REBOUND = [name for name in CASES if name != "pixart"]
CONFIGS = [
    IEKVDConfig(alpha=0.8),
    ToDoConfig(factor=(2, 3)),
    IEKVDConfig(alpha=(0.6, 1.3)),
    LGTMConfig(merge="attention"),
    LGTMConfig(merge="attention", ratio=0.7, proportional=True),
    ToMeConfig(merge="attention", mode="prune", destinations="first"),
]


def noisiness(name) -> float:
    """How noisy the timestep of a case's inputs is, by the convention of its pipeline."""
    return 500 / 999 if name in ("pixart", "hunyuan_dit", "cogvideox", "allegro", "latte") else 0.5


class Oracle:
    """Attends as a compressed layer should, with explicit softmax, from the definition."""

    def __init__(self, case, grid, config, sigma) -> None:
        self.case, self.config = case, config
        self.frames = 1 if case.batched_frames else grid[0]
        self.grid = grid[1:]
        self.tokens = self.frames * grid[1] * grid[2]
        if getattr(config, "spans_frames", False) and self.frames > 1:
            self.frames, self.grid = 1, grid
        alpha = getattr(config, "alpha", None)
        self.alpha = alpha[0] * sigma + alpha[1] * (1 - sigma) if isinstance(alpha, tuple) else alpha
        self.hidden = None  # of the layer that runs
        self.calls = 0

    def fold(self, x):
        """(B, image tokens, C) to rows of one frame."""
        return x.reshape(x.shape[0] * self.frames, -1, x.shape[2])

    def reduce(self, x, plan):
        """(B, T, heads, d) with its image tokens pooled or merged."""
        start = self.case.start
        image = self.fold(x[:, start : start + self.tokens].flatten(2))
        if plan is None:
            image = reference.kv_downsample(image, self.grid, self.config.factor, self.alpha)
        else:
            image = reference.token_merge(image, plan, self.config.mode)
        image = image.reshape(x.shape[0], -1, *x.shape[2:])
        return torch.cat([x[:, :start], image, x[:, start + self.tokens :]], dim=1)

    def columns(self, plan, device):
        """Which key of all stands for each that is left, where a mask is asked."""
        start = self.case.start
        tokens = torch.arange(self.tokens).view(self.frames, -1)
        if plan is None:
            (h, w), (sy, sx) = self.grid, self.config.factor
            rows = torch.tensor([int((i + 0.5) * h / (h // sy)) for i in range(h // sy)])
            cols = torch.tensor([int((i + 0.5) * w / (w // sx)) for i in range(w // sx)])
            left = tokens[:, (rows[:, None] * w + cols).flatten()]
        else:
            # Of the first row of the batch: no mask here looks at the image's tokens.
            left = torch.stack([tokens[f, plan.anchor[f].long()] for f in range(self.frames)])
        return start + left.flatten()

    def attend(self, query, key, value, mask, scale):
        plan, config = None, self.config
        stop = self.case.start + self.tokens
        if not isinstance(config, PoolConfig):
            plan = config.plan(self.fold(self.hidden), self.grid, config.ratio)
        k, v = self.reduce(key, plan), self.reduce(value, plan)
        q = query if plan is None else self.reduce(query, plan)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        left = torch.cat(
            [torch.arange(self.case.start), self.columns(plan, q.device), torch.arange(stop, key.shape[1])]
        )
        if mask is not None:
            mask = mask[..., left]
            if mask.shape[-2] != 1:
                mask = mask[..., left, :] if plan is not None else mask
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            scores = scores + mask
        if plan is not None and config.proportional:
            sizes = plan.sizes().reshape(query.shape[0], -1).float().log()
            ends = key.shape[1] - stop
            scores = scores + F.pad(sizes, (self.case.start, ends))[:, None, None]
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        if plan is None:
            return out
        slots = self.frames * plan.num_slots
        image = self.fold(out[:, self.case.start : self.case.start + slots].flatten(2))
        image = reference.token_unmerge(image, plan).reshape(out.shape[0], -1, *out.shape[2:])
        return torch.cat([out[:, : self.case.start], image, out[:, self.case.start + slots :]], dim=1)

    def is_self_attention(self, query, key) -> bool:
        return self.hidden is not None and query == key

    def dispatch(self, query, key, value, attn_mask=None, **kwargs):
        if not self.is_self_attention(query.shape[1], key.shape[1]):
            return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **kwargs)
        self.calls += 1
        return self.attend(query, key, value, attn_mask, kwargs.get("scale"))

    def sdpa(self, query, key, value, attn_mask=None, scale=None, **kwargs):
        if not self.is_self_attention(query.shape[2], key.shape[2]):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale, **kwargs)
        self.calls += 1
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self.attend(query, key, value, attn_mask, scale).transpose(1, 2)


def expected(name, model, inputs, grid, config, monkeypatch):
    """What the compressed model should return, and how many of its layers attended."""
    case = case_of(name)
    with token_compression(model, config) as report:
        layers = [row.name for row in report.patched]
    oracle = Oracle(case, grid, config, noisiness(name))
    handles = []

    def before(layer):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            start = case.start - case.apart(layer)
            oracle.hidden = hidden[:, start : start + oracle.tokens]

        return hook

    def after(module, args, output):
        oracle.hidden = None

    for layer in layers:
        attention = model.get_submodule(layer)
        handles.append(attention.register_forward_pre_hook(before(layer), with_kwargs=True))
        handles.append(attention.register_forward_hook(after))
    functional = types.SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": oracle.sdpa})
    with monkeypatch.context() as patch:
        for module in {module_of(model.get_submodule(layer).processor) for layer in layers}:
            if hasattr(module, "dispatch_attention_fn"):
                patch.setattr(module, "dispatch_attention_fn", oracle.dispatch)
            if hasattr(module, "F"):
                patch.setattr(module, "F", functional)
        wanted = outputs(model, inputs)
    for handle in handles:
        handle.remove()
    assert oracle.calls == len(layers)
    return wanted


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_do_is_the_unpatched_model(name, batch):
    model, case = build(name), CASES[name]
    inputs = case.inputs(batch, (case.frames, 6, 8))
    plain = outputs(model, inputs)
    for config in (IEKVDConfig(factor=1), LGTMConfig(ratio=0.0, merge="attention"), LGTMConfig(ratio=0.0)):
        with token_compression(model, config) as report:
            assert len(report.patched) == len([row for row in report.rows if row.kind == "attn1"]) >= 2
            assert torch.equal(outputs(model, inputs), plain)
    assert torch.equal(outputs(model, inputs), plain)
    assert not hasattr(model, "_bigain")


# Pooling by processors that are written out is in other files.
@pytest.mark.parametrize(
    ("name", "config"),
    [(name, config) for name in (*CASES, *WRITTEN_OUT) for config in (CONFIGS if name in REBOUND else CONFIGS[3:])],
    ids=lambda value: value if isinstance(value, str) else f"{value.method}-{CONFIGS.index(value)}",
)
def test_the_model_equals_the_oracle(name, config, monkeypatch):
    model, case = build(name), case_of(name)
    for size in SIZES if name not in ("hidream", "dit") else [(6, 6), (8, 8)]:
        grid = (case.frames, *size)
        inputs = case.inputs(2, grid)
        wanted = expected(name, model, inputs, grid, config, monkeypatch)
        with token_compression(model, config):
            found = outputs(model, inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (wanted - outputs(model, inputs)).abs().max() > 1e-4


# One of each: several streams and text behind, text in front, a mask over text, MLPs and hidden states apart.
@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan_video"])
@pytest.mark.parametrize("window", [(1, 1), (None, 2)], ids=["near", "all"])
def test_a_video_planned_as_a_whole_equals_the_oracle(name, window, monkeypatch):
    model, case = build(name), case_of(name)
    config = LGTMConfig(merge="attention", window=window, over_time=window[0] == 1, proportional=True)
    grid = (case.frames, 5, 8)
    inputs = case.inputs(2, grid)
    wanted = expected(name, model, inputs, grid, config, monkeypatch)
    with token_compression(model, config):
        found = outputs(model, inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)
    with token_compression(model, LGTMConfig(merge="attention", proportional=True)):
        assert (wanted - outputs(model, inputs)).abs().max() > 1e-4


class Decided(LGTMConfig):
    """L-GTM of tokens that have nothing to do with the model's, so that rounding decides nothing."""

    def plan(self, x, grid, ratio, timestep=None):
        return super().plan(noise(x.shape[0], x.shape[1], 8), grid, ratio, timestep)


@pytest.mark.parametrize("config", [IEKVDConfig(), Decided(), Decided(proportional=True)], ids=["pool", "own", "size"])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_close_to_float32(name, config):
    model, case = build(name), CASES[name]
    inputs = case.inputs(1, (case.frames, 6, 6))
    with token_compression(model, config):
        wanted = outputs(model, inputs)
    model = model.to(torch.bfloat16)

    def narrow(value):
        if isinstance(value, list):
            return [narrow(each) for each in value]
        # Positions and rotations stay in float32, as pipelines make them.
        return value.bfloat16() if torch.is_tensor(value) and value.dtype == torch.float32 else value

    kept = ("img_ids", "txt_ids", "image_rotary_emb")
    with token_compression(model, config):
        found = outputs(model, {key: value if key in kept else narrow(value) for key, value in inputs.items()})
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().mean() < 0.04 * wanted.abs().mean()


class Graphs:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module, example_inputs):
        self.count += 1
        return module.forward


# HiDream's experts and Lumina's lengths are read on the host; uncompressed they compile no better.
UNCOMPILED = {"hidream", "lumina2"}
# The long skips of Hunyuan-DiT join a layer of the first half to one of the second; Wan stands for all others.
SEVERAL_LAYERS = {"hunyuan_dit", "wan"}
GIVES_GRID = {"flux2": "joint_attention_kwargs", "chroma": "joint_attention_kwargs"}


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [IEKVDConfig(), LGTMConfig(proportional=True)], ids=["pool", "merge"])
@pytest.mark.parametrize("name", sorted(set(CASES) - UNCOMPILED))
def test_the_whole_model_compiles_as_one_graph(name, config):
    """One layer of each kind, as tracing takes its time for each; whole models of several are in test_compile.py."""
    model, case = build(name, layers=2 if name in SEVERAL_LAYERS else 1), CASES[name]
    inputs = case.inputs(1, (case.frames, 4, 6))
    apply_token_compression(model, config)
    wanted = outputs(model, inputs)
    if name in GIVES_GRID:
        inputs[GIVES_GRID[name]] = {"bigain_grid": (4, 6)}
    found = outputs(torch.compile(model, fullgraph=True, backend=Graphs()), inputs)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("config", [IEKVDConfig(), LGTMConfig()], ids=["pool", "merge"])
@pytest.mark.parametrize("name", ["wan", "flux", "dit", "cogview4"])
def test_a_patched_model_can_be_exported(name, config):
    model, case = build(name), case_of(name)
    inputs = case.inputs(1, (case.frames, 6, 6))
    apply_token_compression(model, config)
    if name == "flux":
        inputs["joint_attention_kwargs"] = {"bigain_grid": (6, 6)}
    wanted = outputs(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=False)
    assert torch.equal(program.module()(**inputs, return_dict=False)[0], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux2", "cogview4"])
def test_blocks_compile_to_as_many_graphs_as_without_compression(name):
    case, counts = CASES[name], []
    for config in (None, IEKVDConfig(), LGTMConfig(proportional=True)):
        torch._dynamo.reset()
        model, graphs = build(name), Graphs()
        if config is not None:
            apply_token_compression(model, config)
        calls = [case.inputs(2, (case.frames, *size)) for size in ((4, 4), (6, 10), (5, 7))]
        eager = [outputs(model, call) for call in calls]
        for block in model.blocks if name == "wan" else model.transformer_blocks:
            block.compile(fullgraph=True, backend=graphs)
        for call, wanted in zip(calls, eager, strict=True):
            torch.testing.assert_close(outputs(model, call), wanted, **CLOSE)
        counts.append(graphs.count)
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize("config", [IEKVDConfig(alpha=0.8), LGTMConfig(proportional=True)], ids=["pool", "merge"])
def test_the_attention_backend_of_the_user_is_kept(config):
    model, case = build("wan"), CASES["wan"]
    inputs = case.inputs(1, (case.frames, 6, 6))
    apply_token_compression(model, config)
    wanted = outputs(model, inputs)
    # diffusers makes it that of all models that have none, until this block ends.
    with attention_backend("native"):
        model.set_attention_backend("_native_math")
    torch.testing.assert_close(outputs(model, inputs), wanted, **CLOSE)
    remove_token_compression(model)
    processors = model.attn_processors.values()
    assert {processor._attention_backend.value for processor in processors} == {"_native_math"}
    assert {type(processor).__name__ for processor in processors} == {"WanAttnProcessor"}


@pytest.mark.parametrize("method", [SiToConfig, ToMeConfig])
def test_random_methods_and_kept_plans_in_a_video(method):
    model, case = build("wan"), CASES["wan"]
    inputs = case.inputs(2, (case.frames, 6, 8))
    found = {}
    for cached in (False, True):
        for share in (None, 2):
            with token_compression(model, method(cached_assignment=cached, share_plan=share)):
                first = outputs(model, inputs)
                assert torch.equal(outputs(model, inputs), first)
                found[cached, share] = first
    assert len({tensor.sum().item() for tensor in found.values()}) == 4


def test_a_failed_pass_leaves_nothing_behind_and_threads_do_not_meet():
    names = ["wan", "cogview4"]
    models = {name: build(name) for name in names}
    calls = {name: CASES[name].inputs(1, (CASES[name].frames, 6, 8)) for name in names}
    wanted = {}
    for name, model in models.items():
        apply_token_compression(model, LGTMConfig())
        wanted[name] = outputs(model, calls[name])
    with pytest.raises(RuntimeError):
        outputs(models["wan"], {**calls["wan"], "encoder_hidden_states": torch.zeros(1, 2, 3)})
    layer = models["wan"].blocks[0].attn1
    with pytest.raises(RuntimeError, match="called without the hooks of its model"):
        layer(torch.zeros(1, 144, 24))
    found = {name: [] for name in names}

    def work(name):
        for _ in range(8):
            found[name].append(outputs(models[name], calls[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert len(found[name]) == 8
        assert all(torch.equal(each, wanted[name]) for each in found[name])


def test_a_model_inside_another_ones_pass():
    """What is called while another model runs, as some adapters are, does not change what the outer one is told."""
    outer, inner = build("wan"), build("cogview4")
    for model in (outer, inner):
        apply_token_compression(model, LGTMConfig())
    call, inside = CASES["wan"].inputs(1, (3, 6, 8)), CASES["cogview4"].inputs(1, (1, 4, 6))
    wanted = outputs(outer, call)
    called = []
    outer.blocks[0].register_forward_hook(lambda *_: called.append(outputs(inner, inside)))
    assert torch.equal(outputs(outer, call), wanted)
    assert len(called) == 1


def test_a_refused_call_inside_another_pass_leaves_that_one_as_it_is():
    outer, inner = build("wan"), build("z_image")
    for model in (outer, inner):
        apply_token_compression(model, LGTMConfig())
    call, inside = CASES["wan"].inputs(1, (3, 6, 8)), CASES["z_image"].inputs(2, (1, 6, 8))
    inside["x"][1] = inside["x"][1][:, :, :8]
    wanted, refused = outputs(outer, call), []

    def refuse(*_):
        with pytest.raises(ValueError, match="x: got pictures of shapes"):
            outputs(inner, inside)
        refused.append(True)

    outer.blocks[0].register_forward_hook(refuse)
    assert torch.equal(outputs(outer, call), wanted)
    assert refused


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_a_failed_pass_says_nothing_of_layers_that_were_not_reached(name, caplog):
    model, inputs = build(name), case_of(name).inputs(1, (case_of(name).frames, 6, 6))
    apply_token_compression(model, LGTMConfig())
    with pytest.raises((RuntimeError, IndexError)):
        outputs(model, {**inputs, "hidden_states": inputs["hidden_states"][:, :3]})
    assert not caplog.records
    outputs(model, inputs)
    assert not caplog.records


def test_what_a_family_does_not_offer_is_refused_by_name():
    model = build("ltx")
    for config, message in (
        (LGTMConfig(merge="hidden"), r"merge='hidden', this model offers 'attention'"),
        (IEKVDConfig(pool="hidden"), r"pool='hidden', this model offers 'keys'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_token_compression(model, config)
    model, inputs = build("lumina2"), CASES["lumina2"].inputs(2, (1, 6, 8))
    inputs["encoder_attention_mask"][1, 3:] = False
    apply_token_compression(model, IEKVDConfig())
    with pytest.raises(ValueError, match=r"encoder_attention_mask: got prompts of \[5, 3\] tokens in one batch"):
        outputs(model, inputs)
    model, inputs = build("z_image"), CASES["z_image"].inputs(2, (1, 6, 8))
    inputs["x"][1] = inputs["x"][1][:, :, :8]
    apply_token_compression(model, IEKVDConfig())
    with pytest.raises(ValueError, match="x: got pictures of shapes"):
        outputs(model, inputs)


def test_every_registered_family_has_a_case():
    names = {family.model.__name__ for family in registered()}
    cases = {case.model for case in (*CASES.values(), *WRITTEN_OUT.values(), *CONTROLNETS.values())}
    assert names == {"UNet2DConditionModel", "ControlNetModel"} | cases


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_attention_to_compress_are_refused_with_the_reason(name):
    assert hasattr(diffusers, name)
    stand_in = type(name, (torch.nn.Module,), {})()
    with pytest.raises(TypeError, match=rf"model_or_pipe: got {name}, which cannot be compressed: its attention"):
        apply_token_compression(stand_in, IEKVDConfig())


def test_a_refused_class_is_of_no_family_that_it_derives_from():
    assert issubclass(diffusers.DreamLiteUNetModel, diffusers.UNet2DConditionModel)
    assert family_of(object.__new__(diffusers.DreamLiteUNetModel)) is None
