"""Qwen-Image-Layered: the layers that it draws are compressed as pictures, the one it takes apart stays whole."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression, token_compression

from .family_inputs import noise
from .models import TEXT_DIM, recorded_plans, run, tiny_qwen
from .test_families import CLOSE, expected

LAYERS, SIZE, GIVEN = 3, (4, 6), (2, 3)


def layered():
    return tiny_qwen(use_layer3d_rope=True, use_additional_t_cond=True)


def layered_inputs(given=GIVEN):
    """As QwenImageLayeredPipeline makes them: the layers, then the picture that is taken apart."""
    shapes = [*[(1, *SIZE)] * LAYERS, (1, *given)]
    return {
        "hidden_states": noise(2, sum(h * w for _, h, w in shapes), 16),
        "encoder_hidden_states": noise(2, 5, TEXT_DIM, seed=2),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [shapes] * 2,
        "additional_t_cond": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    "config",
    [
        IEKVDConfig(alpha=0.8),
        IEKVDConfig(alpha=(0.6, 1.3)),
        LGTMConfig(merge="attention"),
        LGTMConfig(merge="attention", proportional=True),
    ],
    ids=["pool", "schedule", "merge", "proportional"],
)
@pytest.mark.parametrize("given", [GIVEN, SIZE], ids=["smaller", "as large"])
def test_layers_equal_the_oracle(config, given, monkeypatch):
    model, inputs = layered(), layered_inputs(given)
    wanted = expected("qwen", model, inputs, (LAYERS, *SIZE), config, monkeypatch)
    plain = run(model, inputs)
    with token_compression(model, config):
        torch.testing.assert_close(run(model, inputs), wanted, **CLOSE)
    assert (wanted - plain).abs().max() > 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_hidden_states_of_layers_pool_as_keys_do_without_a_norm(fused):
    """Pooling commutes with projections, and nothing else stands between where keys have neither norm nor rotation."""
    found = {}
    for pool in ("keys", "hidden"):
        model, inputs = layered(), layered_inputs()
        for block in model.transformer_blocks:
            block.attn.norm_k = None
        model.pos_embed.forward = still(model.pos_embed.forward)
        if fused:
            model.fuse_qkv_projections()
        apply_token_compression(model, IEKVDConfig(pool=pool))
        found[pool] = run(model, inputs)
    torch.testing.assert_close(found["hidden"], found["keys"], **CLOSE)


def still(forward):
    """Rotations by nothing."""
    return lambda *args, **kwargs: tuple(torch.ones_like(table) for table in forward(*args, **kwargs))


def test_projections_see_what_is_left_of_each_layer(monkeypatch):
    model, inputs = layered(), layered_inputs()
    apply_token_compression(model, LGTMConfig(merge="hidden", ratio=0.5))
    seen = []
    model.transformer_blocks[0].attn.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with recorded_plans(monkeypatch) as records:
        run(model, inputs)
    assert {(plan.grid, plan.num_rows) for _, plan in records} == {(SIZE, 2 * LAYERS)}
    assert seen == [LAYERS * 12 + 6]


def test_layers_of_two_sizes_are_refused():
    model, inputs = layered(), layered_inputs()
    inputs["img_shapes"] = [[(1, *SIZE), (1, 3, 8), (1, *SIZE), (1, *GIVEN)]] * 2
    apply_token_compression(model, LGTMConfig())
    with pytest.raises(ValueError, match=r"img_shapes: got layers of \[\(1, 4, 6\), \(1, 3, 8\)"):
        run(model, inputs)
