"""Single-stream blocks of Flux merged as a whole, against the block written out in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from bigain_kernels.diffusers import LGTMConfig, SiToConfig, ToMeConfig, apply_token_compression, token_compression
from bigain_kernels.diffusers.current import in_block

from .family_models import TEXT
from .models import flux_inputs, image_ids, run, tiny_flux
from .test_rebound_hidden import Merged, turned

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
SINGLE = (2, 3)  # behind two blocks of two streams
BOTH = ("attn1", "ff")
CONFIGS = [
    LGTMConfig(modules=BOTH, blocks=SINGLE),
    LGTMConfig(modules=BOTH, blocks=SINGLE, ratio=0.7, proportional=True, share_plan=2),
    ToMeConfig(modules=BOTH, blocks=SINGLE, destinations="first", mode="mlerp"),
]


def written_out(block, config, size):
    """The forward method of a single-stream block, of whose image tokens the first `size` are merged."""
    attn, count = block.attn, size[0] * size[1]

    def forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs=None):
        text, image, behind = encoder_hidden_states, hidden_states[:, :count], hidden_states[:, count:]
        merged = Merged(config, image, (1, *size), TEXT)
        few = merged.down(image)
        x = torch.cat([text, few, behind], dim=1)
        norm, gate = block.norm(x, emb=temb)
        query, key, value = (layer(norm).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        tables = [merged.left(table) for table in image_rotary_emb]
        out = merged.attend(turned(attn.norm_q(query), *tables), turned(attn.norm_k(key), *tables), value)
        mlp = block.act_mlp(block.proj_mlp(norm))
        added = gate[:, None] * block.proj_out(torch.cat([out, mlp], dim=2))
        slots = few.shape[1]
        change = merged.up(added[:, TEXT : TEXT + slots])
        rest = behind + added[:, TEXT + slots :]
        return text + added[:, :TEXT], torch.cat([image + change, rest], dim=1)

    return forward


def expected(config, size, inputs):
    model = tiny_flux()
    for block in model.single_transformer_blocks:
        block.forward = written_out(block, config, size)
    return run(model, inputs)


def with_reference(inputs, tokens=12):
    """A second picture behind the first, as Flux Kontext has it."""
    more = torch.randn(inputs["hidden_states"].shape[0], tokens, 16, generator=torch.Generator().manual_seed(5))
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], more], dim=1)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], image_ids(3, tokens // 3, 1)])
    return inputs


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method}-{config.ratio}")
def test_whole_blocks_equal_blocks_written_out(config):
    model = tiny_flux()
    for batch, size in ((2, (6, 10)), (4, (5, 7))):
        for inputs in (flux_inputs(batch, size), with_reference(flux_inputs(batch, size))):
            wanted = expected(config, size, inputs)
            with token_compression(model, config) as report:
                assert len(report.patched) == 4
                found = run(model, inputs)
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert (wanted - run(model, inputs)).abs().max() > 1e-4
    assert in_block() is None


def test_nothing_to_merge_is_the_unpatched_model():
    model, inputs = tiny_flux(), flux_inputs(1)
    plain = run(model, inputs)
    for config in (LGTMConfig(ratio=0.0, modules=BOTH), SiToConfig(end=0.0, modules=BOTH)):
        with token_compression(model, config):
            assert torch.equal(run(model, inputs), plain)


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
