"""A ratio or factor for each resolution level of a U-Net."""

from __future__ import annotations

import pytest
import torch

from bigain_kernels.diffusers import ABMConfig, IEKVDConfig, LGTMConfig, ToDoConfig, apply_token_compression

from .models import recorded_plans, run, tiny_dit, tiny_unet, unet_inputs


def compressed(config):
    model = tiny_unet()
    return model, apply_token_compression(model, config)


@pytest.mark.parametrize("modules", [("attn1",), ("attn1", "ff"), ("ff",)])
def test_each_level_merges_by_its_ratio(modules, monkeypatch):
    model, report = compressed(LGTMConfig(ratio={1: 0.7, 2: 0.25}, modules=modules))
    assert len(report.patched) == 7 * len(modules)
    with recorded_plans(monkeypatch) as records:
        run(model, unet_inputs(size=(12, 16)))
    counts = {plan.grid: plan.num_slots for _, plan in records}
    assert counts == {(12, 16): 192 - int(192 * 0.7), (6, 8): 48 - 12}
    assert len(records) == 7


def test_what_is_said_by_level_is_what_is_said_otherwise():
    inputs = unet_inputs()
    pairs = [
        (LGTMConfig(ratio={1: 0.5}), LGTMConfig(ratio=0.5)),
        (LGTMConfig(ratio={1: 0.5, 2: 0.5}), LGTMConfig(ratio=0.5, max_downsample=2)),
        (ABMConfig(ratio={2: 0.4}), ABMConfig(ratio=0.4, max_downsample=2, blocks=(1, 2, 3, 6))),
        (ABMConfig(ratio={1: 0.4, 2: 0.0}), ABMConfig(ratio=0.4)),
        (LGTMConfig(ratio={1: (0.6, 0.2)}), LGTMConfig(ratio=(0.6, 0.2))),
        (IEKVDConfig(factor={1: 4, 2: 1}), IEKVDConfig(factor=4)),
        (ToDoConfig(factor={2: (1, 2)}), ToDoConfig(factor=(1, 2), max_downsample=2, blocks=(1, 2, 3, 6))),
    ]
    for first, second in pairs:
        outputs = [run(compressed(config)[0], inputs) for config in (first, second)]
        assert torch.equal(*outputs), first
    assert not torch.equal(
        run(compressed(IEKVDConfig(factor={1: 4, 2: 2}))[0], inputs),
        run(compressed(IEKVDConfig(factor={1: 2, 2: 2}))[0], inputs),
    )


def test_levels_that_a_model_has_not_are_refused_and_others_reported():
    _, report = compressed(LGTMConfig(ratio={2: 0.5}))
    assert {row.reason for row in report.rows if row.kind == "attn1"} == {
        "1/2 resolution",
        "full resolution, levels=[2]",
    }
    with pytest.raises(ValueError, match=r"ratio: got .* with the levels \[4\], expected those of the model, \[1, 2\]"):
        compressed(LGTMConfig(ratio={1: 0.5, 4: 0.5}))
    with pytest.raises(ValueError, match=r"factor: got .* with the levels \[2\], expected those of the model, \[1\]"):
        apply_token_compression(tiny_dit(), IEKVDConfig(factor={1: 2, 2: 2}))


def test_blocks_of_all_levels_compile():
    torch._dynamo.reset()
    model, _ = compressed(LGTMConfig(ratio={1: 0.7, 2: 0.25}))
    calls = [unet_inputs(size=size) for size in ((16, 16), (12, 20))]
    wanted = [run(model, call) for call in calls]
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(fullgraph=True, backend="eager")
    for call, each in zip(calls, wanted, strict=True):
        torch.testing.assert_close(run(model, call), each, atol=3e-5, rtol=3e-5)
