"""Every method in a video: each frame is merged and pooled as a picture is, whatever plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigain_kernels import methods
from bigain_kernels.diffusers import ABMConfig, LGTMConfig, SiToConfig, token_compression
from bigain_kernels.methods import MergeConfig

from .family_models import CASES, build, outputs
from .models import only, recorded_plans
from .test_families import CLOSE, expected

VIDEOS = [name for name, case in CASES.items() if case.frames > 1]
MERGING = [name for name in methods.names() if issubclass(methods.config_class(name), MergeConfig)]


# L-GTM and ToMe are in test_families.py; without noise SiTo draws nothing, which the oracle would not draw.
@pytest.mark.parametrize("config", [ABMConfig(), SiToConfig(noise=0.0)], ids=lambda config: config.method)
@pytest.mark.parametrize("name", VIDEOS)
def test_tiles_stay_inside_a_frame(name, config, monkeypatch):
    model, config = build(name), replace(config, merge="attention")
    for size in ((6, 8), (5, 9)):
        grid = (CASES[name].frames, *size)
        inputs = CASES[name].inputs(2, grid)
        wanted = expected(name, model, inputs, grid, config, monkeypatch)
        with token_compression(model, config):
            found = outputs(model, inputs)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (wanted - outputs(model, inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("name", VIDEOS)
def test_a_frame_is_planned_by_itself(name, method, monkeypatch):
    """With the timestep of its video, where the method draws: as many plans as frames, each that of one frame alone."""
    model, case, config = build(name), CASES[name], methods.config_class(method)(modules=("attn1",))
    calls, make_plan = [], type(config).plan

    def plan(config, x, grid, ratio, timestep=None):
        calls.append((config, x, grid, ratio, timestep))
        return make_plan(config, x, grid, ratio, timestep)

    with monkeypatch.context() as patch:
        patch.setattr(type(config), "plan", plan)
        with token_compression(model, config) as report, recorded_plans(monkeypatch) as records:
            outputs(model, case.inputs(2, (case.frames, 6, 8)))
    assert len(calls) == len(records) == len(report.patched)
    for (used, x, grid, ratio, timestep), (_, found) in zip(calls, records, strict=True):
        assert grid == (6, 8)
        assert found.num_rows == x.shape[0] == 2 * case.frames
        assert (timestep is None) == (not used.is_random)
        for row in range(x.shape[0]):
            rows = slice(row, row + 1)
            alone = make_plan(used, x[rows], grid, ratio, None if timestep is None else timestep[rows])
            assert torch.equal(found.slot[rows], alone.slot)


@pytest.mark.parametrize("order", ["cat", "interleave"])
@pytest.mark.parametrize("name", VIDEOS)
def test_videos_share_plans_and_frames_do_not(name, order, monkeypatch):
    """One video has nobody to share with, however many frames; of four, two and two share, frame by frame."""
    # An even number of frames is what could be taken for pairs; the model of Latte has a number of its own.
    frames = CASES[name].frames if name == "latte" else 4
    model, inputs = build(name), CASES[name].inputs(4, (frames, 4, 4))
    pairs = [0, 2, 1, 3] if order == "interleave" else [0, 1, 2, 3]  # 0 and 2 belong together, and 1 and 3
    with token_compression(model, LGTMConfig(ratio=0.5)):
        alone = outputs(model, one := CASES[name].inputs(1, (frames, 4, 4)))
    with token_compression(model, LGTMConfig(ratio=0.5, share_plan=2)):
        apart = outputs(model, inputs)
    with token_compression(model, LGTMConfig(ratio=0.5, share_plan=2, share_order=order)):
        assert torch.equal(outputs(model, one), alone)
        with recorded_plans(monkeypatch) as records:
            found = outputs(model, only(inputs, pairs))
    assert all(plan.num_rows == x.shape[0] // 2 for x, plan in records)
    torch.testing.assert_close(found, apart[pairs], atol=1e-5, rtol=1e-5)
