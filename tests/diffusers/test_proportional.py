"""proportional=True: attention over merged tokens equals attention over all tokens, each merged one a copy."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels import token_merge, token_unmerge
from bigain_kernels.diffusers import (
    ABMConfig,
    LGTMConfig,
    SiToConfig,
    ToMeConfig,
    apply_token_compression,
    remove_token_compression,
    token_compression,
)
from bigain_kernels.testing import assert_close

from .models import dit_inputs, recorded_plans, run, tiny_dit, tiny_unet, unet_inputs

MODELS = [(tiny_unet, unet_inputs), (tiny_dit, dit_inputs)]
CONFIGS = [
    LGTMConfig(ratio=0.7, proportional=True),
    LGTMConfig(ratio=0.6, proportional=True, mode="mlerp", share_plan=2),
    LGTMConfig(ratio=0.6, proportional=True, mode="prune", stride=(4, 2)),
    ABMConfig(ratio=0.7, proportional=True),
    ToMeConfig(ratio=0.7, proportional=True, share_plan=2),
    SiToConfig(ratio=0.5, proportional=True),
]


def _float64(inputs: dict) -> dict:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


# diffusers itself fuses no projections of a DiT.
@pytest.mark.parametrize(("build", "inputs", "fused"), [(*MODELS[0], False), (*MODELS[0], True), (*MODELS[1], False)])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_plain_attention_over_unmerged_copies(build, inputs, fused, config, monkeypatch):
    model = build().double()
    if fused:
        model.fuse_qkv_projections()
    report = apply_token_compression(model, config)
    calls, handles = [], []
    for row in report.patched:
        attn = model.get_submodule(row.name)
        # Large queries and keys: far from uniform attention, where the weights matter.
        with torch.no_grad():
            (attn.to_qkv if fused else attn.to_q).weight.mul_(4.0)
        handles.append(attn.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out))))
    with recorded_plans(monkeypatch) as records:
        run(model, _float64(inputs(4)))
    for handle in handles:
        handle.remove()
    remove_token_compression(model)
    assert len(calls) == len(records) == len(report.patched)
    for (attn, x, output), (_, plan) in zip(calls, records, strict=True):
        assert plan.num_rows == (2 if config.share_plan else 4)
        assert plan.sizes().max() > 1
        copies = token_unmerge(token_merge(x, plan, config.mode), plan)
        with torch.no_grad():
            assert_close(output, attn(copies))


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_changes_the_result_and_nothing_where_nothing_merges(build, inputs):
    model = build()
    plain = run(model, inputs())
    with token_compression(model, LGTMConfig(ratio=0.7)):
        unweighted = run(model, inputs())
    with token_compression(model, LGTMConfig(ratio=0.7, proportional=True)):
        assert not torch.allclose(run(model, inputs()), unweighted, atol=1e-6)
    with token_compression(model, LGTMConfig(ratio=0.0, proportional=True)):
        torch.testing.assert_close(run(model, inputs()), plain, atol=1e-6, rtol=1e-6)


def test_cross_attention_has_no_weights():
    """Its keys are text; only its queries are merged."""
    model, inputs = tiny_unet(), unet_inputs()
    outputs = []
    for proportional in (False, True):
        with token_compression(model, LGTMConfig(modules=("attn2",), proportional=proportional)):
            outputs.append(run(model, inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("build", "inputs"), MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build, inputs, dtype):
    model = build()
    apply_token_compression(model, ABMConfig(proportional=True))
    full = run(model, inputs())
    model.to(dtype)
    low = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs().items()}
    output = run(model, low)
    assert output.dtype == dtype
    assert (output.float() - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize(("build", "inputs"), MODELS)
def test_autocast_rounds_no_weights_where_gradients_are_recorded(build, inputs):
    model, call = build(), inputs()
    apply_token_compression(model, LGTMConfig(ratio=0.7, proportional=True))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = run(model, call)
        with torch.enable_grad():
            found = model(**call).sample
    assert found.requires_grad
    assert torch.equal(found, wanted)


def test_report_says_so():
    model = tiny_dit()
    assert {row.path for row in apply_token_compression(model, LGTMConfig()).rows} == {"merge tokens"}
    report = apply_token_compression(model, LGTMConfig(proportional=True))
    assert {row.path for row in report.rows} == {"merge tokens, weigh keys by size"}
    assert "patched  full resolution; merge tokens, weigh keys by size" in str(report)
