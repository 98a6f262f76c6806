"""What compression does inside a forward pass: grids, batches, schedules, shared and cached plans."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigain_kernels import lgtm_plan, tome_plan
from bigain_kernels.diffusers import (
    ABMConfig,
    IEKVDConfig,
    LGTMConfig,
    SiToConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
    context,
    token_compression,
)

from .models import dit_inputs, layer_context, only, recorded_plans, run, tiny_dit, tiny_unet, unet_inputs

MODELS = [(tiny_unet, unet_inputs), (tiny_dit, dit_inputs)]
EVERY = [
    LGTMConfig(max_downsample=2),
    LGTMConfig(max_downsample=2, window=1, mode="mlerp"),
    ABMConfig(max_downsample=2),
    ToMeConfig(max_downsample=2),
    ToMeConfig(max_downsample=2, destinations="first"),
    SiToConfig(max_downsample=2),
    IEKVDConfig(max_downsample=2),
    IEKVDConfig(max_downsample=2, alpha=(0.8, 1.2)),
    ToDoConfig(max_downsample=2),
]


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize(
    "config",
    [LGTMConfig(ratio=0), ABMConfig(ratio=0), ToMeConfig(ratio=0), LGTMConfig(ratio=0.001), IEKVDConfig(factor=1)],
)
def test_nothing_to_remove_is_the_unpatched_model(build, inputs, config):
    model = build()
    plain = run(model, inputs())
    with token_compression(model, config):
        torch.testing.assert_close(run(model, inputs()), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", EVERY)
def test_a_row_does_not_depend_on_its_batch(build, inputs, config):
    model = build()
    batch = inputs(3, timestep=torch.tensor([500, 500, 20]))
    with token_compression(model, config):
        together = run(model, batch)
        for row in range(3):
            rows = slice(row, row + 1)
            alone = run(model, {**only(batch, rows), "timestep": batch["timestep"][rows]})
            torch.testing.assert_close(together[rows], alone, atol=1e-5, rtol=1e-5)


def test_guidance_pair_merges_the_same_tokens_when_it_sees_the_same(monkeypatch):
    model, inputs = tiny_unet(), unet_inputs(1)
    pair = {**inputs, "sample": inputs["sample"].repeat(2, 1, 1, 1)}
    pair["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(2, 1, 1)
    with token_compression(model, ToMeConfig(blocks=(0,))), recorded_plans(monkeypatch) as records:
        run(model, inputs)
        run(model, pair)
    assert torch.equal(records[1][1].slot, records[0][1].slot.repeat(2, 1))


@pytest.mark.parametrize("size", [(18, 18), (12, 20), (17, 9), (16, 16)])
@pytest.mark.parametrize("config", EVERY)
def test_odd_and_oblong_grids(size, config, monkeypatch):
    model = tiny_unet()
    apply_token_compression(model, config)
    with recorded_plans(monkeypatch) as records:
        assert run(model, unet_inputs(size=size)).shape[-2:] == size
    half = tuple((n + 1) // 2 for n in size)
    grids = [plan.grid for _, plan in records]
    assert grids == ([size, half, half, half, half, size, size] if records else [])


@pytest.mark.parametrize("config", [LGTMConfig(max_downsample=2), IEKVDConfig(max_downsample=2)])
def test_small_grids_are_left_alone(config):
    model, small, large = tiny_unet(), unet_inputs(), unet_inputs(size=(24, 24))
    plain = [run(model, inputs) for inputs in (small, large)]
    with token_compression(model, replace(config, min_tokens=257)):
        assert torch.equal(run(model, small), plain[0])
        found = run(model, large)
        assert not torch.equal(found, plain[1])
    # 24 x 24 tokens are compressed, and the 12 x 12 of the level below are not.
    with token_compression(model, replace(config, max_downsample=1)):
        assert torch.equal(run(model, large), found)


def test_resolution_may_change_between_calls():
    changing, inputs = tiny_dit(), [dit_inputs(size=size) for size in (16, 24, 8, 16)]
    apply_token_compression(changing, LGTMConfig())
    outputs = [run(changing, given) for given in inputs]
    for given, output in zip(inputs, outputs, strict=True):
        fresh = tiny_dit()
        apply_token_compression(fresh, LGTMConfig())
        assert torch.equal(run(fresh, given), output)


def test_unet_matches_on_the_residual_stream_and_dit_on_its_modulated_input(monkeypatch):
    seen = {}
    for name, model, block, inputs in (
        ("unet", (unet := tiny_unet()), unet.down_blocks[0].attentions[0].transformer_blocks[0], unet_inputs()),
        ("dit", (dit := tiny_dit()), dit.transformer_blocks[0], dit_inputs()),
    ):
        block.register_forward_pre_hook(lambda _, args, key=name: seen.update({key: args[0]}))
        block.norm1.register_forward_hook(
            lambda _, args, output, key=name: seen.update({key + " norm1": output[0] if key == "dit" else output})
        )
        apply_token_compression(model, LGTMConfig(blocks=(0,)))
        with recorded_plans(monkeypatch) as records:
            run(model, inputs)
        assert torch.equal(records[0][0], seen["unet" if name == "unet" else "dit norm1"])


@pytest.mark.parametrize("config", EVERY)
def test_nobody_warns_and_other_kwargs_arrive(config, caplog):
    model, got = tiny_unet(), []
    attn2 = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    processor = attn2.processor

    class Listening:
        def __call__(self, attn, hidden_states, *args, flavour=None, **kwargs):
            got.append(flavour)
            return processor(attn, hidden_states, *args, **kwargs)

    attn2.set_processor(Listening())
    apply_token_compression(model, config)
    given = {"flavour": "sweet"}
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        run(model, {**unet_inputs(), "cross_attention_kwargs": given})
        assert all("bigain" not in record.getMessage() for record in caplog.records)
        caplog.clear()
        run(model, unet_inputs())
        assert not caplog.records
    logging.getLogger("diffusers").propagate = False
    assert got == ["sweet", None]
    assert given == {"flavour": "sweet"}


def test_arguments_by_position():
    model, inputs = tiny_dit(), dit_inputs()
    apply_token_compression(model, IEKVDConfig(alpha=(0.1, 0.9)))
    by_name = run(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values()).sample, by_name)
        assert torch.equal(model(*inputs.values(), {}).sample, by_name)


@pytest.mark.parametrize("config", [LGTMConfig(), IEKVDConfig()])
def test_attention_mask_raises(config):
    unet, dit = tiny_unet(), tiny_dit()
    apply_token_compression(unet, config)
    apply_token_compression(dit, config)
    with pytest.raises(ValueError, match="attention_mask: got a mask"):
        run(unet, {**unet_inputs(), "attention_mask": torch.ones(2, 256)})
    # DiT itself never passes a mask on; its layers refuse one all the same.
    call = {"hidden_states": torch.zeros(1, 64, 32), "bigain": layer_context(config)}
    with pytest.raises(ValueError, match="attention_mask: got a mask"):
        dit.transformer_blocks[0].attn1(**call, attention_mask=torch.ones(1, 64))


def test_calling_around_the_hooks_raises():
    model = tiny_unet()
    apply_token_compression(model, LGTMConfig())
    with pytest.raises(RuntimeError, match="called without the hooks of its model"), torch.no_grad():
        model.forward(**unet_inputs())


def test_grid_too_small_for_the_factor_raises():
    model = tiny_dit()
    apply_token_compression(model, ToDoConfig(factor=9))
    with pytest.raises(ValueError, match=r"factor: got \(9, 9\), expected at most the grid"):
        run(model, dit_inputs())


def test_alpha_schedule_is_per_row(monkeypatch):
    model = tiny_dit()
    timestep = torch.tensor([999, 0, 499])
    inputs = dit_inputs(3, timestep=timestep)
    with token_compression(model, IEKVDConfig(alpha=(0.2, 1.4))):
        scheduled = run(model, inputs)
    for row, alpha in enumerate([0.2, 1.4, 0.2 * 499 / 999 + 1.4 * 500 / 999]):
        with token_compression(model, IEKVDConfig(alpha=alpha)):
            torch.testing.assert_close(scheduled[row], run(model, inputs)[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_window_of_the_noise_schedule(build, inputs, monkeypatch):
    model = build()
    plain = {t: run(model, inputs(timestep=t)) for t in (999, 900, 500, 100, 0)}
    with token_compression(model, LGTMConfig(start=0.05, end=0.6)), recorded_plans(monkeypatch) as records:
        for timestep, wanted in ((999, 0), (900, 1), (500, 1), (100, 0), (0, 0)):
            records.clear()
            output = run(model, inputs(timestep=timestep))
            assert bool(records) == bool(wanted), timestep
            assert torch.allclose(output, plain[timestep], atol=1e-6) == (not wanted)


def test_scheduled_ratio(monkeypatch):
    model = tiny_dit()
    config = LGTMConfig(ratio=(0.75, 0.0), num_train_timesteps=101)
    with token_compression(model, config), recorded_plans(monkeypatch) as records:
        for timestep in (100, 50, 0):
            run(model, dit_inputs(timestep=timestep))
    assert [plan.r for _, plan in records] == [48] * 4 + [24] * 4  # and at t = 0 nothing is planned


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", [LGTMConfig(start=0.1), LGTMConfig(end=0.9), LGTMConfig(ratio=(0.2, 0.5))])
def test_host_timestep_is_read_once_and_must_be_one(build, inputs, config, monkeypatch):
    reads = []
    read = context.host_timestep
    monkeypatch.setattr(context, "host_timestep", lambda timestep: reads.append(timestep) or read(timestep))
    model = build()
    apply_token_compression(model, config)
    run(model, inputs(timestep=torch.tensor([500, 500])))
    assert len(reads) == 1
    with pytest.raises(ValueError, match=r"timestep: got \[500, 400\], expected one timestep for all rows"):
        run(model, inputs(timestep=torch.tensor([500, 400])))


def test_of_a_timestep_for_each_token_the_noisiest_counts():
    tokens = torch.tensor([[0.0, 500.0, 499.0], [500.0, 0.0, 0.0]])
    assert context.host_timestep(tokens) == 500.0
    with pytest.raises(ValueError, match=r"timestep: got \[500.0, 400.0\], expected one timestep for all rows"):
        context.host_timestep(torch.tensor([[0.0, 500.0], [400.0, 0.0]]))


def test_rows_of_a_part_of_the_batch_and_of_frames():
    values = torch.arange(4)
    assert context.for_rows(values, 4).tolist() == [0, 1, 2, 3]
    assert context.for_rows(values, 2).tolist() == [2, 3]
    assert context.for_rows(values, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert context.for_rows(values, 8, frames=4).tolist() == [2, 2, 2, 2, 3, 3, 3, 3]


def test_missing_timestep_raises():
    for config in (LGTMConfig(start=0.5), IEKVDConfig(alpha=(0.1, 0.9))):
        with pytest.raises(ValueError, match="timestep: got None"):
            context.make_forward(config, torch.zeros(1, 4, 8, 8), None)


@pytest.mark.parametrize("config", EVERY)
def test_no_sync_and_no_host_timestep_without_need(config, monkeypatch):
    monkeypatch.setattr(context, "host_timestep", None)

    class Syncs(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    model, inputs = tiny_unet(), unet_inputs(timestep=torch.tensor([7, 400]))
    apply_token_compression(model, config)
    with Syncs() as syncs:
        run(model, inputs)
    assert syncs.count == 0


def test_random_destinations_vary_over_blocks_and_timesteps_and_are_reproducible(monkeypatch):
    model = tiny_dit()
    apply_token_compression(model, ToMeConfig(seed=3))
    state = torch.random.get_rng_state()
    with recorded_plans(monkeypatch) as records:
        first = run(model, dit_inputs(timestep=torch.tensor([500, 400])))
        assert torch.equal(run(model, dit_inputs(timestep=torch.tensor([500, 400]))), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    for block, (x, plan) in enumerate(records[:4]):
        timestep = torch.tensor([500, 400]) + 1000 * block
        assert torch.equal(plan.slot, tome_plan(x, (8, 8), 0.5, seed=3, timestep=timestep).slot)
    same_input = [tome_plan(x, (8, 8), 0.5, seed=3, timestep=torch.tensor([500, 400])).slot for x, _ in records[1:2]]
    assert not torch.equal(same_input[0], records[1][1].slot)


@pytest.mark.parametrize(("build", "inputs", "resolutions"), [(*MODELS[0], 2), (*MODELS[1], 1)])
def test_cached_assignment_plans_once_per_resolution_and_forward(build, inputs, resolutions, monkeypatch):
    model = build()
    apply_token_compression(model, LGTMConfig(max_downsample=2, cached_assignment=True))
    with recorded_plans(monkeypatch) as records:
        first = run(model, inputs())
        assert len(records) == resolutions
        other = run(model, inputs(seed=2))
        assert len(records) == 2 * resolutions
        handle = (
            model.mid_block if hasattr(model, "mid_block") else model.transformer_blocks[2]
        ).register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, inputs())
        handle.remove()
        assert torch.equal(run(model, inputs(seed=2)), other)
        assert torch.equal(run(model, inputs()), first)


def test_shared_plan_is_the_plan_of_the_mean_and_row_b_uses_plan_row_b_mod_p(monkeypatch):
    model, inputs = tiny_dit(), dit_inputs(6)  # 3 classes of 2 images, class-major
    config = LGTMConfig(ratio=0.7, share_plan=3)
    with token_compression(model, config), recorded_plans(monkeypatch) as records:
        shared = run(model, inputs)
    assert len(records) == 4
    for x, plan in records:
        assert plan.num_rows == 2
        mean = x.unflatten(0, (3, 2)).mean(0)
        assert torch.equal(plan.slot, lgtm_plan(mean, (8, 8), 0.7).slot)
    # Rows of one image are the only ones its plan depends on.
    image = {key: value[[1, 3, 5]] for key, value in inputs.items()}
    with token_compression(model, config):
        torch.testing.assert_close(run(model, image), shared[[1, 3, 5]], atol=1e-5, rtol=1e-5)
        # Where the batch is no multiple, sharing lapses.
        four = run(model, dit_inputs(4))
    with token_compression(model, replace(config, share_plan=None)):
        assert torch.equal(run(model, dit_inputs(4)), four)


@pytest.mark.parametrize("modules", [("attn1", "attn2"), ("attn2",)])
def test_cross_attention_merges_queries_with_the_plan_of_its_block(modules, monkeypatch):
    model, lengths = tiny_unet(), []
    attn2 = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn2.to_q.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    attn2.to_k.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    report = apply_token_compression(model, LGTMConfig(ratio=0.5, modules=modules))
    assert len(report.patched) == 3 * len(modules)
    with recorded_plans(monkeypatch) as records:
        run(model, unet_inputs())
    assert len(records) == 3
    assert lengths == [128, 5]


@pytest.mark.parametrize("config", EVERY)
def test_nothing_is_kept_between_forward_passes(config):
    model, inputs = tiny_unet(), unet_inputs(timestep=torch.tensor([7, 7]))
    apply_token_compression(model, config)
    made = []
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.register_forward_hook(
        lambda module, args, output: made.append(weakref.ref(output))
    )
    references = [weakref.ref(tensor) for tensor in inputs.values()]
    run(model, inputs)
    del inputs
    gc.collect()
    assert all(reference() is None for reference in references + made)


def test_key_norm_pools_after_the_norm():
    model, inputs = tiny_dit(), dit_inputs()
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn1.norm_k = torch.nn.RMSNorm(16)
        torch.nn.init.normal_(block.attn1.norm_k.weight)
    plain = run(model, inputs)
    seen = []
    model.transformer_blocks[0].attn1.norm_k.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with token_compression(model, IEKVDConfig(factor=1)):
        torch.testing.assert_close(run(model, inputs), plain, atol=1e-6, rtol=1e-6)
    with token_compression(model, IEKVDConfig()):
        assert not torch.allclose(run(model, inputs), plain, atol=1e-4)
    assert seen == [64, 64]


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("config", [LGTMConfig(max_downsample=2), IEKVDConfig(max_downsample=2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, inputs, config, dtype):
    model = build()
    apply_token_compression(model, config)
    full = run(model, inputs())
    model.to(dtype)
    low = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs().items()}
    output = run(model, low)
    assert output.dtype == dtype
    assert (output.float() - full).abs().mean() < 0.1 * full.abs().mean()
