"""IE-KVD in joint attention: Flux and Stable Diffusion 3, against attention written out by hand."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from bigain_kernels.diffusers import (
    IEKVDConfig,
    LGTMConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
    attention,
    grids,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.diffusers.attention import CompressedAttention

from .joint_written_out import merged_layer, pooled_layer, recorded
from .models import (
    flux_inputs,
    image_ids,
    only,
    qwen_inputs,
    run,
    sd3_inputs,
    tiny_flux,
    tiny_qwen,
    tiny_sd3,
)

MODELS = [(tiny_flux, flux_inputs), (tiny_sd3, sd3_inputs), (tiny_qwen, qwen_inputs)]
CONFIGS = [
    IEKVDConfig(),
    IEKVDConfig(pool="hidden"),
    IEKVDConfig(alpha=-0.5, factor=(2, 1)),
    IEKVDConfig(alpha=1.3, factor=(2, 3), pool="hidden"),
    IEKVDConfig(alpha=(0.2, 1.4), factor=3),
    IEKVDConfig(alpha=(0.2, 1.4), pool="hidden"),
    ToDoConfig(),
]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def _kwargs_name(build) -> str:
    """What a model calls the arguments for its processors."""
    return "attention_kwargs" if build is tiny_qwen else "joint_attention_kwargs"


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(6, 10), (7, 5)])
@pytest.mark.parametrize("family", ["flux", "qwen", "qwen with padding", "sd3", "sd3 without norm"])
def test_every_layer_equals_attention_written_out(family, size, config):
    if family == "flux":
        model, inputs, sigma = tiny_flux(), flux_inputs(size=size, timestep=torch.tensor([0.8, 0.1])), [0.8, 0.1]
        window = (5, 5 + size[0] * size[1])
    elif family.startswith("qwen"):
        model, inputs, sigma = tiny_qwen(), qwen_inputs(size=size, timestep=torch.tensor([0.8, 0.1])), [0.8, 0.1]
        window = (5, 5 + size[0] * size[1])
        if family == "qwen with padding":
            inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    else:
        model = tiny_sd3() if family == "sd3" else tiny_sd3(qk_norm=None)
        inputs = sd3_inputs(size=(2 * size[0], 2 * size[1]), timestep=torch.tensor([800.0, 100.0]))
        sigma, window = [0.8, 0.1], (0, size[0] * size[1])
    plain = run(model, inputs)
    apply_token_compression(model, config)
    calls = recorded(model, inputs)
    assert len(calls) == (3 if family.startswith("qwen") else 4)
    alpha = config.alpha
    if isinstance(alpha, tuple):
        alpha = torch.tensor([alpha[0] * s + alpha[1] * (1 - s) for s in sigma])
    with torch.no_grad():
        for attn, call, output in calls:
            wanted = pooled_layer(attn, call, size, window, config, alpha)
            torch.testing.assert_close(output, wanted, **CLOSE)
    assert (run(model, inputs) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        LGTMConfig(),
        LGTMConfig(ratio=0.7, proportional=True),
        LGTMConfig(share_plan=2),
        ToMeConfig(destinations="first"),
    ],
    ids=["own", "weighed", "shared", "tome"],
)
@pytest.mark.parametrize("size", [(6, 10), (7, 5)])
@pytest.mark.parametrize("family", ["flux", "qwen", "qwen with padding", "sd3", "sd3 without norm"])
def test_merged_hidden_states_equal_attention_written_out(family, size, config):
    window = (5, 5 + size[0] * size[1])
    if family == "flux":
        model, inputs = tiny_flux(), flux_inputs(size=size)
    elif family.startswith("qwen"):
        model, inputs = tiny_qwen(), qwen_inputs(size=size)
        if family == "qwen with padding":
            inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    else:
        model = tiny_sd3() if family == "sd3" else tiny_sd3(qk_norm=None)
        inputs, window = sd3_inputs(size=(2 * size[0], 2 * size[1])), (0, size[0] * size[1])
    plain = run(model, inputs)
    with token_compression(model, LGTMConfig(ratio=0.0)):
        assert torch.equal(run(model, inputs), plain)
    report = apply_token_compression(model, config)
    assert all(row.path.startswith("merge tokens") for row in report.patched)
    with torch.no_grad():
        for attn, call, output in recorded(model, inputs):
            torch.testing.assert_close(output, merged_layer(attn, call, size, window, config), **CLOSE)
    assert (run(model, inputs) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("pool", ["keys", "hidden"])
def test_nothing_to_pool_is_the_unpatched_model(build, inputs, pool):
    model = build()
    plain = run(model, inputs())
    with token_compression(model, IEKVDConfig(factor=1, alpha=1.0, pool=pool)):
        torch.testing.assert_close(run(model, inputs()), plain, atol=1e-6, rtol=1e-6)
    with token_compression(model, IEKVDConfig(start=0.9, pool=pool)):
        torch.testing.assert_close(run(model, inputs()), plain, atol=1e-6, rtol=1e-6)
        late = inputs(timestep=50.0 if build is tiny_sd3 else 0.05)
        compressed = run(model, late)
    assert not torch.allclose(compressed, run(model, late), atol=1e-4)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_alpha_one_pools_the_same_in_both_orders(build, inputs):
    model = build()
    with token_compression(model, IEKVDConfig(alpha=(1.0, 1.0), factor=3)) as report:
        assert {row.path for row in report.patched} == {"pool keys and values"}
        late = run(model, inputs())
    with token_compression(model, ToDoConfig(factor=3)) as report:
        assert {row.path for row in report.patched} <= {"pooled projection", "pool, then project"}
        torch.testing.assert_close(run(model, inputs()), late, **CLOSE)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", [IEKVDConfig(alpha=(0.2, 1.4)), IEKVDConfig(pool="hidden")])
def test_a_row_does_not_depend_on_its_batch(build, inputs, config):
    model = build()
    timestep = torch.tensor([0.9, 0.5, 0.1]) * (1000 if build is tiny_sd3 else 1)
    batch = inputs(3, timestep=timestep)
    shared = {k: batch.pop(k) for k in ("img_ids", "txt_ids", "img_shapes") if k in batch}
    with token_compression(model, config):
        together = run(model, {**batch, **shared})
        for row in range(3):
            alone = run(model, {**only(batch, slice(row, row + 1)), **shared})
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_reports():
    report = apply_token_compression(tiny_flux(), IEKVDConfig(blocks=(1, 2)))
    assert [row.name for row in report.patched] == ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
    assert {row.path for row in report.patched} == {"pool keys and values"}
    report = apply_token_compression(tiny_flux(), IEKVDConfig(pool="hidden"))
    assert [row.path for row in report.rows] == ["pooled projection"] * 2 + ["pool, then project"] * 2
    assert "full resolution; pool, then project" in str(report)
    report = apply_token_compression(tiny_sd3(), IEKVDConfig())
    assert [row.name for row in report.patched][:2] == ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"]
    assert {row.path for row in report.patched} == {"pool keys and values"}
    report = apply_token_compression(tiny_qwen(), IEKVDConfig(pool="hidden"))
    assert [(row.name, row.path) for row in report.patched][2:] == [("transformer_blocks.2.attn", "pooled projection")]
    report = apply_token_compression(tiny_sd3(qk_norm=None), IEKVDConfig())
    assert {row.path for row in report.patched} == {"pooled projection"}


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_remove_restores_the_processors_themselves(build, inputs):
    model = build()
    before, plain = model.attn_processors, run(model, inputs())
    state = [dict(vars(processor)) for processor in before.values()]
    apply_token_compression(model, IEKVDConfig())
    apply_token_compression(model, IEKVDConfig(blocks=(0,)))
    assert 1 <= sum(isinstance(p, CompressedAttention) for p in model.attn_processors.values()) <= 2
    run(model, inputs())
    remove_token_compression(model)
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert [dict(vars(processor)) for processor in before.values()] == state
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(model, inputs()), plain)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_nobody_warns_and_the_callers_arguments_stay(build, inputs, caplog, monkeypatch):
    model, given = build(), {}
    apply_token_compression(model, IEKVDConfig(blocks=(1,)))
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"):
        by_name = run(model, {**inputs(), _kwargs_name(build): given})
    assert not caplog.records
    assert given == {}
    assert torch.equal(by_name, run(model, inputs()))


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_masks_raise(build, inputs):
    model = build()
    apply_token_compression(model, IEKVDConfig())
    mask = {_kwargs_name(build): {"attention_mask": torch.ones(2, 65)}}
    with pytest.raises(ValueError, match="attention_mask: got a mask"):
        run(model, {**inputs(), **mask})


@pytest.mark.parametrize("pool", ["keys", "hidden"])
def test_fused_projections_of_flux_give_the_same(pool):
    model, inputs = tiny_flux(), flux_inputs()
    apply_token_compression(model, IEKVDConfig(pool=pool))
    separate = run(model, inputs)
    model.fuse_qkv_projections()
    calls = []
    model.transformer_blocks[0].attn.to_qkv.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, inputs), separate, **CLOSE)
    assert calls
    report = apply_token_compression(model, IEKVDConfig(pool=pool))
    assert {row.path for row in report.rows} == {"pool keys and values" if pool == "keys" else "project, then pool"}
    torch.testing.assert_close(run(model, inputs), separate, **CLOSE)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), separate)


def test_fused_sd3_does_what_it_does_uncompressed():
    model = tiny_sd3()
    apply_token_compression(model, IEKVDConfig())
    compressed = run(model, sd3_inputs())
    # diffusers' own fused processor leaves out the norms, so nothing stands in for it; with dual attention it fails.
    model.set_attn_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(AttributeError, match="to_qkv"):
        run(model, sd3_inputs())
    model.set_attn_processor(JointAttnProcessor2_0())
    assert torch.equal(run(model, sd3_inputs()), compressed)


def test_attention_backend_before_and_after(monkeypatch):
    model, inputs, used = tiny_flux(), flux_inputs(), set()
    dispatch = attention.dispatch_attention_fn

    def record(*args, backend, **kwargs):
        used.add(None if backend is None else backend.value)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", record)
    apply_token_compression(model, IEKVDConfig())
    compressed = run(model, inputs)
    assert used == set()
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(model, inputs), compressed, **CLOSE)
    assert used == {"_native_math"}
    remove_token_compression(model)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert [backend.value for backend in chosen] == ["_native_math"]
    assert {type(processor) for processor in model.attn_processors.values()} == {FluxAttnProcessor}
    apply_token_compression(model, IEKVDConfig())
    assert {p._attention_backend.value for p in model.attn_processors.values()} == {"_native_math"}
    torch.testing.assert_close(run(model, inputs), compressed, **CLOSE)
    fresh = tiny_flux()
    apply_token_compression(fresh, IEKVDConfig())
    used.clear()
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(fresh, inputs), compressed, **CLOSE)
    assert used == {None}


def test_tokens_of_a_reference_picture_stay_whole():
    """Flux Kontext puts a second picture behind the first."""
    model, inputs = tiny_flux(), flux_inputs(size=(6, 10))
    reference_picture = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], reference_picture], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], image_ids(3, 4, picture=1)])
    for config in (IEKVDConfig(), IEKVDConfig(pool="hidden")):
        apply_token_compression(model, config)
        calls = recorded(model, inputs)
        with torch.no_grad():
            for attn, call, output in calls:
                torch.testing.assert_close(
                    output, pooled_layer(attn, call, (6, 10), (5, 65), config, config.alpha), **CLOSE
                )


def test_grid_given_with_the_call(monkeypatch):
    model, inputs = tiny_flux(), flux_inputs(size=(6, 10))
    apply_token_compression(model, IEKVDConfig())
    read = run(model, inputs)
    monkeypatch.setattr(grids, "grid_of_positions", None)
    fresh = {**inputs, "img_ids": image_ids(6, 10)}
    assert torch.equal(run(model, {**fresh, "joint_attention_kwargs": {"bigain_grid": (6, 10)}}), read)
    for wrong, message in (((6, 11), r"that is 66 tokens, expected at most 60"), ((0, 4), "at least 1")):
        with pytest.raises(ValueError, match=rf"bigain_grid: got .*{message}"):
            run(model, {**fresh, "joint_attention_kwargs": {"bigain_grid": wrong}})


def test_shapes_of_qwen():
    model, inputs = tiny_qwen(), qwen_inputs(size=(6, 10))
    apply_token_compression(model, IEKVDConfig())
    together = run(model, inputs)
    for shapes in ([(1, 6, 10)] * 2, (1, 6, 10)):
        assert torch.equal(run(model, {**inputs, "img_shapes": shapes}), together)
    with pytest.raises(ValueError, match=r"img_shapes: got \(3, 4, 5\), expected one frame"):
        run(model, {**inputs, "img_shapes": [[(3, 4, 5)]] * 2})


@pytest.mark.parametrize("padded", [False, True])
def test_pictures_given_to_qwen_stay_whole(padded):
    model, inputs = tiny_qwen(), qwen_inputs(size=(6, 10))
    given = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], given], dim=1)
    inputs["img_shapes"] = [[(1, 6, 10), (1, 3, 4)]] * 2
    if padded:
        inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for config in (IEKVDConfig(), IEKVDConfig(pool="hidden")):
        apply_token_compression(model, config)
        calls = recorded(model, inputs)
        with torch.no_grad():
            for attn, call, output in calls:
                torch.testing.assert_close(
                    output, pooled_layer(attn, call, (6, 10), (5, 65), config, config.alpha), **CLOSE
                )


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1), (4, 4), (3, 5)])
def test_grid_of_positions(size):
    assert grids.grid_of_positions(image_ids(*size)) == size
    assert grids.grid_of_positions(image_ids(*size)[None].repeat(2, 1, 1)) == size
    # Positions in half precision, scaled positions.
    assert grids.grid_of_positions(image_ids(*size).to(torch.bfloat16) * 0.5 + 3) == size


def test_grid_of_large_pictures_in_bfloat16():
    # Above 256 bfloat16 gives two rows one position.
    assert grids.grid_of_positions(image_ids(300, 270).to(torch.bfloat16)) == (300, 270)


@pytest.mark.parametrize(
    "ids",
    [
        image_ids(4, 4)[:-1],
        image_ids(4, 4).roll(1, 0),
        image_ids(4, 4)[:, [0, 2, 1]],
        torch.cat([image_ids(2, 4), image_ids(3, 4)]),
        torch.zeros(0, 3),
    ],
)
def test_positions_that_are_no_raster_raise(ids):
    with pytest.raises(ValueError, match=r"img_ids: got positions of .* tokens that are no grid in raster order"):
        grids.grid_of_positions(ids)


def test_grid_is_read_once_for_a_tensor_and_again_after_a_write(monkeypatch):
    reads, read = [], grids.grid_of_positions
    monkeypatch.setattr(grids, "grid_of_positions", lambda ids: reads.append(1) or read(ids))
    model, inputs = tiny_flux(), flux_inputs(size=(6, 10))
    apply_token_compression(model, IEKVDConfig())
    wide = run(model, inputs)
    assert torch.equal(run(model, inputs), wide)
    assert len(reads) == 1
    inputs["img_ids"].copy_(image_ids(10, 6))
    tall = run(model, inputs)
    assert len(reads) == 2
    assert torch.equal(run(model, {**inputs, "img_ids": image_ids(10, 6)}), tall)
    assert not torch.equal(tall, wide)
    with torch.inference_mode():
        ids = image_ids(6, 10)
        assert [read(ids), grids.GridReader()(ids)] == [(6, 10), (6, 10)]
    reader = grids.GridReader()
    reader(inputs["img_ids"])
    assert pickle.loads(pickle.dumps(copy.deepcopy(reader)))(image_ids(2, 3)) == (2, 3)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("pool", ["keys", "hidden"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, inputs, pool, dtype):
    model = build()
    apply_token_compression(model, IEKVDConfig(pool=pool))
    full = run(model, inputs())
    model.to(dtype)
    output = run(model, inputs(dtype=dtype))
    assert output.dtype == dtype
    assert (output.float() - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("pool", ["keys", "hidden"])
def test_autocast(build, inputs, pool):
    model = build()
    apply_token_compression(model, IEKVDConfig(pool=pool))
    full = run(model, inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, inputs())
    assert (output.float() - full).abs().mean() < 0.1 * full.abs().mean()
