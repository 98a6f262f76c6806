"""Whole models against recorded results of the published code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from bigain_kernels.diffusers import (
    ABMConfig,
    IEKVDConfig,
    LGTMConfig,
    ToDoConfig,
    ToMeConfig,
    apply_token_compression,
)

from ..golden_files import golden_models, golden_path, load_golden_model
from .models import recorded_plans, run

DIT_BLOCKS = (1, 2, 3, 5)
UNET_CASES = {
    "baseline": ("sq2", None),
    "baseline_rect": ("rect", None),
    "baseline_odd": ("odd", None),
    "lgtm_r50": ("sq2", LGTMConfig(ratio=0.5)),
    "lgtm_r70_md2": ("sq2", LGTMConfig(ratio=0.7, max_downsample=2)),
    "lgtm_r50_rect": ("rect", LGTMConfig(ratio=0.5, max_downsample=2)),
    "abm_max_r70": ("sq2", ABMConfig(ratio=0.7)),
    "tome_norand_r50": ("sq2", ToMeConfig(ratio=0.5, destinations="first")),
    "iekvd_a90_f2": ("sq2", IEKVDConfig(factor=2, alpha=0.9)),
    "iekvd_schedule_01_09": ("sq2", IEKVDConfig(factor=2, alpha=(0.1, 0.9))),
    "todo_f2": ("sq2", ToDoConfig(factor=2)),
}
DIT_CASES = {
    "baseline": ("b2", None),
    "lgtm_r50": ("b2", LGTMConfig(ratio=0.5, blocks=DIT_BLOCKS)),
    "abm_max_r50": ("b2", ABMConfig(ratio=0.5, blocks=DIT_BLOCKS)),
    "tome_norand_r50": ("b2", ToMeConfig(ratio=0.5, destinations="first", blocks=DIT_BLOCKS)),
    "iekvd_a90_f2": ("b2", IEKVDConfig(factor=2, alpha=0.9, blocks=DIT_BLOCKS)),
    "todo_f2": ("b2", ToDoConfig(factor=2, blocks=DIT_BLOCKS)),
}
MODELS = {"unet_tiny": (UNet2DConditionModel, UNET_CASES), "dit_tiny": (DiTTransformer2DModel, DIT_CASES)}


@pytest.fixture(scope="module")
def goldens():
    """The recorded tensors and decisions by model name; the small copy of the golden set has the DiT alone."""
    return {
        name: (load_golden_model(name), np.load(golden_path(f"e2e/{name}_decisions.npz"))) for name in golden_models()
    }


def _model(name, state):
    model = MODELS[name][0](**json.loads(golden_path(f"e2e/{name}_config.json").read_text())).eval()
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


def _merged_tiles(plan, row):
    """Indices of the 2 x 2 tiles that a block merge made one token of."""
    width = plan.grid[1]
    tokens = plan.anchor[row][plan.sizes()[row] > 1]
    return sorted((tokens // width // 2 * (width // 2) + tokens % width // 2).tolist())


@pytest.mark.parametrize(("model_name", "case"), [(name, case) for name in golden_models() for case in MODELS[name][1]])
def test_model_reproduces_published_outputs_and_decisions(goldens, monkeypatch, model_name, case):
    tensors, decisions = goldens[model_name]
    inputs, config = MODELS[model_name][1][case]
    model = _model(model_name, tensors["state_dict"])
    if config is not None:
        apply_token_compression(model, config)
    with recorded_plans(monkeypatch) as records:
        output = run(model, tensors["inputs"][inputs])
    torch.testing.assert_close(output, tensors["outputs"][case], atol=2e-5, rtol=0)

    wanted = [key for key in decisions.files if key.split("/")[0] == case and key.endswith(("assign", "tiles"))]
    assert len(records) == len(wanted)
    for key in wanted:
        plan = records[int(key.split("/")[1])][1]
        if key.endswith("assign"):
            assert np.array_equal(plan.assign().numpy(), decisions[key])
        else:
            assert [_merged_tiles(plan, b) for b in range(2)] == [sorted(row) for row in decisions[key].tolist()]
