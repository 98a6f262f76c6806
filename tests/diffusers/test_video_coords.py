"""LTX and LTX-2 told the position of every token: the video is found as the pipelines of diffusers lay it out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import LTXConditionPipeline
from diffusers.modular_pipelines.echo.before_denoise import _video_memory_coords
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import build_video_coords_for_window
from diffusers.pipelines.ltx2.dfr_layout import epilogue_tiles, video_tile_plan
from diffusers.pipelines.ltx2.pipeline_ltx2_dfr import LTX2DFRPipeline

from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, apply_token_compression, grids, token_compression

from . import test_families
from .family_inputs import noise
from .family_models import build, case_of, outputs
from .test_families import CLOSE, expected

FRAMES, SIZE = 3, (4, 6)
TOKENS = FRAMES * SIZE[0] * SIZE[1]
FPS = 25.0
ONE = {"num_frames": 1, "height": 1, "width": 1}
OF_VIDEO = {"num_frames": FRAMES, "height": SIZE[0], "width": SIZE[1]}


def condition_pipeline(*conditions):
    """Of LTXConditionPipeline: (frame index, latent frames) of what stands in front of the video."""

    def ids(frames, index):
        found = LTXConditionPipeline._prepare_video_ids(1, frames, *SIZE)
        return LTXConditionPipeline._scale_video_ids(found, frame_index=index)

    coords = torch.cat([*(ids(frames, index) for index, frames in conditions), ids(FRAMES, 0)], dim=2).float()
    coords[:, 0] = coords[:, 0] * (1.0 / FPS)
    return coords


def long_pipeline(overlap, guiding, negative):
    """Of LTXI2VLongMultiPromptPipeline: frames that stand behind the window."""
    latents = torch.zeros(1, 4, FRAMES + overlap + guiding + negative, *SIZE)
    return build_video_coords_for_window(latents, overlap, guiding, negative, (8, 32, 32), FPS)


ROPE = build("ltx2").rope


def dfr_pipeline(keyframes=(), reference=0):
    """Of the DFR pipelines: pixel frames of keyframes, and how much coarser a reference video is."""
    pipe = SimpleNamespace(
        transformer_spatial_patch_size=1,
        transformer_temporal_patch_size=1,
        vae_temporal_compression_ratio=ROPE.scale_factors[0],
        vae_spatial_compression_ratio=ROPE.scale_factors[1],
    )
    coords = [ROPE.prepare_video_coords(1, FRAMES, *SIZE, "cpu", fps=FPS)]
    for index in keyframes:
        coords.append(LTX2DFRPipeline._prepare_keyframe_coords(pipe, 1, *SIZE, index, 1, FPS, "cpu"))
    if reference:
        height, width = (n // reference for n in SIZE)
        coords.append(ROPE.prepare_video_coords(1, FRAMES, height, width, "cpu", fps=FPS))
        coords[-1][:, 1:] *= reference
    return torch.cat(coords, dim=2)


def echo_pipeline(slots):
    """Of Echo: pictures it remembers, in front of the video."""
    memory = _video_memory_coords(SimpleNamespace(rope=ROPE), slots, *SIZE, FPS, 500.0, 50.0, "cpu")
    return torch.cat([memory, dfr_pipeline()], dim=2)


def tiles():
    """Those in which the DFR pipelines compute a large video, 4 frames of 5 x 7 tokens, with a keyframe behind."""
    coords = torch.cat(
        [ROPE.prepare_video_coords(1, 4, 5, 7, "cpu", fps=FPS), dfr_pipeline((9,))[:, :, TOKENS:]], dim=2
    )
    return [tile.coords for tile in video_tile_plan(epilogue_tiles((4, 5, 7), 2, ()), coords, 4, 5, 7)]


def by_columns(coords):
    return coords.unflatten(2, (FRAMES, *SIZE)).transpose(3, 4).flatten(2)


# The model, positions, sizes that come with them, and where the video begins.
LAYOUTS = {
    "ltx": ("ltx", condition_pipeline(), {}, 0),
    "ltx behind a picture and a clip": ("ltx", condition_pipeline((16, 1), (24, 2)), {}, 3 * SIZE[0] * SIZE[1]),
    "ltx behind a clip from before": ("ltx", condition_pipeline((-1, 2)), {}, 2 * SIZE[0] * SIZE[1]),
    "long": ("ltx", long_pipeline(0, 0, 0), ONE, 0),
    "long in front of what came before": ("ltx", long_pipeline(1, 0, 1), ONE, 0),
    "long in front of guidance": ("ltx", long_pipeline(1, 2, 1), ONE, 0),
    "ltx2": ("ltx2", dfr_pipeline(), {}, 0),
    "ltx2 in front of keyframes": ("ltx2", dfr_pipeline((0, 5, 16)), {}, 0),
    "ltx2 in front of a reference as large": ("ltx2", dfr_pipeline(reference=1), {}, 0),
    "ltx2 in front of a coarser reference": ("ltx2", dfr_pipeline((16,), reference=2), OF_VIDEO, 0),
    "echo": ("ltx2", echo_pipeline(2), OF_VIDEO, 2 * SIZE[0] * SIZE[1]),
}


def inputs_of(name, coords, sizes):
    inputs = case_of(name).inputs(2, (FRAMES, *SIZE))
    for key in OF_VIDEO:
        del inputs[key]
    hidden = noise(2, coords.shape[2], 4)
    return {**inputs, **sizes, "hidden_states": hidden, "video_coords": coords.expand(2, *coords.shape[1:])}


@pytest.mark.parametrize("config", [IEKVDConfig(alpha=0.8), LGTMConfig(proportional=True)], ids=["pool", "merge"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_video_is_compressed_and_nothing_else(layout, config, monkeypatch):
    name, coords, sizes, start = LAYOUTS[layout]
    model, inputs = build(name), inputs_of(name, coords, sizes)
    monkeypatch.setattr(test_families, "case_of", lambda name: case_of(name)._replace(start=start))
    wanted = expected(name, model, inputs, (FRAMES, *SIZE), config, monkeypatch)
    plain = outputs(model, inputs)
    with token_compression(model, config):
        torch.testing.assert_close(outputs(model, inputs), wanted, **CLOSE)
    assert (wanted - plain).abs().max() > 1e-4


def test_tiles_of_a_video():
    assert [grids.video_of_positions(coords) for coords in tiles()] == [((4, 6), 0, 2)] * 8


def test_positions_and_sizes_of_all_tokens_are_one():
    model, inputs = build("ltx2"), inputs_of("ltx2", dfr_pipeline(), {})
    apply_token_compression(model, LGTMConfig())
    read = outputs(model, inputs)
    # What is told is not read.
    model._bigain.grid_reader = None
    assert torch.equal(outputs(model, {**inputs, **OF_VIDEO}), read)


def test_positions_are_read_once_for_each_tensor(monkeypatch):
    reads, read = [], grids.video_of_positions
    monkeypatch.setattr(grids, "video_of_positions", lambda coords: reads.append(coords) or read(coords))
    model = build("ltx2")
    apply_token_compression(model, IEKVDConfig())
    calls = [inputs_of("ltx2", coords, {}) for coords in (dfr_pipeline(), dfr_pipeline((5,)))]
    for call in (*calls, *calls):
        outputs(model, call)
    assert len(reads) == 2
    calls[0]["video_coords"] = calls[0]["video_coords"].clone()
    for _ in range(2):
        calls[0]["video_coords"].mul_(1.0)
        outputs(model, calls[0])
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("coords", "sizes", "message"),
    [
        (condition_pipeline().flip(2), {}, "positions of 72 tokens among which no video of frames"),
        (by_columns(condition_pipeline()), {}, "positions of 72 tokens among which no video of frames"),
        (condition_pipeline()[:, :, :-1], {}, "positions of 71 tokens among which no video of frames"),
        (condition_pipeline((16, 1))[:, :, :-1], {}, "positions of 95 tokens among which no video of frames"),
        (condition_pipeline() + 1, {}, "positions of 72 tokens among which no video of frames"),
        (condition_pipeline((16, 1)), {**OF_VIDEO, "width": 5}, r"a video of \(3, 4, 6\) tokens, expected the sizes"),
        (None, {}, "None, expected positions, or num_frames, height and width"),
    ],
)
def test_what_holds_no_video_is_refused_by_name(coords, sizes, message):
    model = build("ltx")
    inputs = inputs_of("ltx", condition_pipeline() if coords is None else coords, sizes)
    for config in (IEKVDConfig(), LGTMConfig()):
        with token_compression(model, config), pytest.raises(ValueError, match=f"video_coords: got {message}"):
            outputs(model, {**inputs, "video_coords": None} if coords is None else inputs)
