"""Plans of videos against their definition: tiles inside a frame, a window in tiles and frames, one ranking."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk
from bigain_kernels import reference
from bigain_kernels.methods import ABMConfig, LGTMConfig, ToMeConfig
from bigain_kernels.methods.options import Window
from tests.shapes import tokens

VIDEO, STRIDE = (4, 5, 7), (2, 3)
FRAME = VIDEO[1] * VIDEO[2]
WINDOWS = [None, 1, (0, 1), (1, 1), (1, 2), (None, 1), (None, 9), (9, 9)]


def destinations_of(x, over_time):
    score = reference.laplacian_score(x, VIDEO[1:], "l1", VIDEO[0]) if over_time else None
    chosen = []
    for t in range(VIDEO[0]):
        frame = slice(t * FRAME, (t + 1) * FRAME)
        own = reference.laplacian_score(x[:, frame], VIDEO[1:]) if score is None else score[:, frame]
        chosen.append(reference.select_destinations(own, VIDEO[1:], STRIDE) + t * FRAME)
    return torch.cat(chosen, dim=1)


def place(n):
    """Frame, row and column of tiles of a token."""
    t, rest = divmod(n, FRAME)
    row, column = divmod(rest, VIDEO[2])
    return t, min(row // STRIDE[0], VIDEO[1] // STRIDE[0] - 1), min(column // STRIDE[1], VIDEO[2] // STRIDE[1] - 1)


def written_out(x, destinations, window):
    """The most similar destination of each token among those that the window holds, ties to the lowest."""
    tiles, frames = window if isinstance(window, tuple) else (window, 0)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    similarity = torch.full(x.shape[:2], -torch.inf, dtype=torch.float64)
    match = torch.arange(x.shape[1]).repeat(x.shape[0], 1)
    for b in range(x.shape[0]):
        chosen = destinations[b].tolist()
        for n in set(range(x.shape[1])) - set(chosen):
            own = place(n)
            for d in chosen:
                other = place(d)
                far = max(abs(own[1] - other[1]), abs(own[2] - other[2]))
                if abs(own[0] - other[0]) > frames or (tiles is not None and far > tiles):
                    continue
                cosine = unit[b, n].dot(unit[b, d])
                if cosine > similarity[b, n]:
                    similarity[b, n], match[b, n] = cosine, d
    return similarity.float(), match.int()


@pytest.mark.parametrize("over_time", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_plan_of_a_video_is_the_one_written_out(window, over_time):
    x = tokens(2, VIDEO[0] * FRAME, 16, strided=True)
    destinations = destinations_of(x, over_time)
    plan = bk.lgtm_plan(x, VIDEO, 0.6, STRIDE, window=window, over_time=over_time)
    similarity, match = written_out(x, destinations, window)
    r = int(x.shape[1] * 0.6)
    expected = reference.merge_plan(similarity, match, destinations, r, (VIDEO[0] * VIDEO[1], VIDEO[2]))
    assert torch.equal(plan.assign(), expected.assign())
    assert (plan.grid, plan.num_slots) == ((20, 7), 140 - r)


def test_equal_tokens_go_to_the_first_destination_of_the_window():
    plan = bk.lgtm_plan(torch.ones(1, 140, 4), VIDEO, 0.7, STRIDE, window=(None, 1))
    near = bk.lgtm_plan(torch.ones(1, 140, 4), VIDEO, 0.7, STRIDE, window=(5, 1))
    assert torch.equal(plan.assign(), near.assign())
    merged = plan.assign()[0].view(VIDEO[0], FRAME)
    assert all(int(frame.min()) // FRAME == max(t - 1, 0) for t, frame in enumerate(merged))


def test_a_frame_that_moves_less_is_merged_more():
    still, moving = torch.ones(1, FRAME, 8), tokens(1, FRAME, 8)
    plan = bk.lgtm_plan(torch.cat([moving, still], dim=1), (2, *VIDEO[1:]), 0.4, STRIDE)
    left = plan.anchor[0] // FRAME
    assert int((left == 0).sum()) > 2 * int((left == 1).sum())


def test_random_destinations_stay_in_their_tiles_and_frames():
    x, timestep = tokens(2, VIDEO[0] * FRAME, 8), torch.tensor([5, 5])
    plan = bk.tome_plan(x, VIDEO, bk.max_ratio(VIDEO[1:], STRIDE), STRIDE, timestep=timestep, window=(1, 1))
    assert torch.equal(plan.anchor[0], plan.anchor[1])
    places = [place(int(n)) for n in plan.anchor[0]]
    assert sorted(places) == [(t, y, x) for t in range(4) for y in range(2) for x in range(2)]
    inside = [int(n) % FRAME for n in plan.anchor[0]]
    assert len({tuple(inside[t * 4 : t * 4 + 4]) for t in range(4)}) > 1


def test_rows_that_share_a_plan():
    x = tokens(4, VIDEO[0] * FRAME, 8)
    plan = bk.lgtm_plan(x, VIDEO, 0.5, STRIDE, window=(1, 1), share_plan=2)
    mean = (x[:2] + x[2:]) / 2
    assert torch.equal(plan.assign(), bk.lgtm_plan(mean, VIDEO, 0.5, STRIDE, window=(1, 1)).assign())


def test_nothing_to_merge_and_wrong_arguments():
    x = tokens(1, 140, 4)
    assert torch.equal(bk.lgtm_plan(x, VIDEO, 0.0, STRIDE, window=(1, 1)).assign()[0], torch.arange(140))
    assert torch.equal(bk.lgtm_plan(x, VIDEO, 0.0, (9, 9), window=(1, 1)).assign()[0], torch.arange(140))
    for grid, message in (((4, 5, 8), "that is 160 tokens, expected 140"), ((0, 5, 7), "grid, frames: got 0")):
        with pytest.raises(ValueError, match=message):
            bk.lgtm_plan(x, grid, 0.5, STRIDE)
    with pytest.raises(ValueError, match="window, frames: got -1, expected at least 0"):
        LGTMConfig(window=(1, -1))
    with pytest.raises(TypeError, match=r"window: got \(1, 2, 3\), expected an integer"):
        LGTMConfig(window=(1, 2, 3))
    with pytest.raises(TypeError, match=r"grid: got \(4, 5, 7\), expected two integers"):
        ABMConfig().plan(x, VIDEO, 0.5)


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("2,1", (2, 1)), (",1", (None, 1))])
def test_a_window_as_text(text, value):
    assert Window().read("window", text) == value
    assert Window().show(value) == text
    assert LGTMConfig(window=value).window == value


def test_configs_say_whether_frames_are_planned_together():
    assert not LGTMConfig(window=3).spans_frames
    assert not ToMeConfig(window=(3, 0)).spans_frames
    for config in (LGTMConfig(over_time=True), LGTMConfig(window=(None, 1)), ToMeConfig(window=(2, 1))):
        assert config.spans_frames
        assert config.plan(tokens(1, 140, 4), VIDEO, 0.5).num_slots == 70


def test_a_hundred_thousand_tokens_hold_no_matrix():
    """The largest tensor is as wide as the tokens: (N, D) would be 100,000 x 25,000."""
    video, shapes = (25, 50, 80), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for each in torch.utils._pytree.tree_leaves(result):
                if isinstance(each, torch.Tensor):
                    shapes.append(each.numel())
            return result

    x = tokens(1, 100_000, 4)
    with Watch():
        plan = bk.lgtm_plan(x, video, 0.5, window=(1, 1), over_time=True)
    assert plan.num_slots == 50_000
    assert max(shapes) <= 2 * x.numel()
    frames = plan.assign()[0] // 4000 - torch.arange(100_000) // 4000
    assert set(frames.tolist()) == {-1, 0, 1}
