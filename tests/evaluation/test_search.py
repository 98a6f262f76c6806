"""The search on the small model of digits; where speeds matter, with a clock that configs alone decide."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from PIL import Image

from bigain_kernels.cli.main import BAD_INPUT, INTERRUPTED, main
from bigain_kernels.diffusers import IEKVDConfig, LGTMConfig, ToDoConfig, apply_token_compression, token_compression
from bigain_kernels.evaluation.denoisers import diffuse
from bigain_kernels.evaluation.noise import seeded_noise
from bigain_kernels.evaluation.search import measuring
from bigain_kernels.evaluation.search.images import digit_samples
from bigain_kernels.evaluation.search.measuring import NONE, Measurements, Meter
from bigain_kernels.evaluation.search.report import confirmed, markdown, notes, numbers
from bigain_kernels.evaluation.search.search import FOUND, Goal, Search, ratio_at
from bigain_kernels.evaluation.search.space import candidates_of, everywhere, groups_of, put_together
from bigain_kernels.evaluation.search.turns import TurnFile
from bigain_kernels.methods import load_config
from bigain_kernels.methods.mixed import parts_of

from ..diffusers.models import tiny_dit, tiny_flux, tiny_unet
from .toys import save_latent_dit

CANDIDATES = [LGTMConfig(ratio=0.3), LGTMConfig(ratio=0.6), IEKVDConfig(alpha=0.0), IEKVDConfig(alpha=1.0)]
# What a block saves under each, and what any compression costs a pass on top.
SAVED = dict(zip([each.brief() for each in CANDIDATES], (0.02, 0.08, 0.06, 0.06), strict=True))


def saved_by(config):
    """Of a ratio between those in proportion."""
    brief = config.brief()
    if brief in SAVED:
        return SAVED[brief]
    low, high = (SAVED[each.brief()] for each in CANDIDATES[:2])
    return low + (config.ratio - 0.3) / 0.3 * (high - low)


@pytest.fixture
def clock(monkeypatch):
    """A pass takes a second less what its blocks save; `slower` is added to passes with compression."""

    class Clock:
        slower = 0.0
        calls = 0

    ask = Meter.ask

    def asked(self, turn, compression):
        errors, _ = ask(self, turn, compression)
        Clock.calls += 1
        if compression is None:
            return errors, 1.0
        return errors, 1.0 + Clock.slower - sum(saved_by(p) * len(p.blocks) for p in parts_of(compression))

    monkeypatch.setattr(Meter, "ask", asked)
    return Clock


def search_of(tiny, goal, **changes):
    few, more = digit_samples(tiny, 4, 5)
    groups = groups_of(tiny.denoiser.model)
    arguments = {"candidates": CANDIDATES, "timesteps": (200, 500), "batch_size": 4} | changes
    return Search(tiny.denoiser, few, more, goal, groups, **arguments)


def choices_of(result):
    """All choices by the sum, as (rise, saved)."""
    table = [[(0.0, 0.0)] for _ in result.groups]
    for choice in result.measured:
        table[result.groups.index(choice.group)].append((choice.rise.value, choice.saved))
    for combination in itertools.product(*table):
        yield tuple(map(sum, zip(*combination, strict=True)))


def test_the_least_error_at_a_speed(tiny, clock, tmp_path):
    job = search_of(tiny, Goal(speed=1.25))
    passes = []
    result = job.run(TurnFile(tmp_path / "turns", {}), lambda stage, count: passes.append((stage, count)))
    rise, speed = result.predicted
    assert speed >= 1.25 - 1e-9
    assert rise == pytest.approx(min(r for r, s in choices_of(result) if s >= 0.2 - 1e-9))
    assert speed == pytest.approx(result.verified[1]) == pytest.approx(result.found.speed)
    assert confirmed(result)
    assert [stage for stage, _ in itertools.groupby(passes, lambda each: each[0])] == [
        "each alone",
        "together",
        "held out",
    ]
    assert sum(count for _, count in passes) == job.total - len(job._more.turns) * 1
    # The config is what the choices say, in the model itself.
    with token_compression(tiny.denoiser.model, result.config) as report:
        given = {row.block: row.config.brief() for row in report.patched}
    assert given == {choice.group.blocks[0]: choice.candidate.brief() for choice in result.chosen}


def test_the_most_speed_within_a_budget(tiny, clock, tmp_path):
    result = search_of(tiny, Goal(error=0.3)).run(TurnFile(tmp_path / "turns", {}))
    rise, speed = result.predicted
    assert rise <= 30
    assert 1 - 1 / speed == pytest.approx(max(s for r, s in choices_of(result) if r <= 30))


def test_held_out_images_are_others_and_compared_at_equal_time(tiny, clock, tmp_path):
    job = search_of(tiny, Goal(speed=1.1))
    result = job.run(TurnFile(tmp_path / "turns", {}))
    merging = next(row for row in result.others if row.config.method == "lgtm")
    assert merging.speed == pytest.approx(result.found.speed, rel=0.01)
    assert {row.name for row in result.others} == {merging.name, CANDIDATES[2].brief(), CANDIDATES[3].brief()}
    assert all(row.config.blocks == (0, 1, 2, 3) for row in result.others)
    # The rise of each on the held-out images, asked for by hand.
    meter = job._more
    for row in (result.found, *result.others):
        rises = []
        for timestep in (200, 500):
            turns = [turn for turn, (own, _) in enumerate(meter.turns) if own == timestep]
            mine, plain = ([e for turn in turns for e in meter.ask(turn, c)[0]] for c in (row.config, None))
            rises.append(100 * (sum(mine) / sum(plain) - 1))
        assert row.rise.value == pytest.approx(sum(rises) / 2)
        assert row.more.value == pytest.approx(row.rise.value - result.found.rise.value)


def test_what_is_not_confirmed_is_said(tiny, clock, tmp_path, monkeypatch):
    job = search_of(tiny, Goal(speed=1.25))
    assert notes(job.run(TurnFile(tmp_path / "one", {})))[0].startswith("Held-out images confirm it: 1.25x was asked")
    measure, slow = Meter.measure, "held out"

    def measured(self, stage, *rest):
        clock.slower = 0.1 if stage.startswith(slow) else 0.0
        return measure(self, stage, *rest)

    monkeypatch.setattr(Meter, "measure", measured)
    result = job.run(TurnFile(tmp_path / "two", {}))
    assert not confirmed(result)
    assert notes(result)[0].startswith("Held-out images do not confirm it: 1.25x was asked for, and they give 1.1")
    assert numbers(result)["confirmed"] is False
    assert "do not confirm" in markdown(result, "Search")
    assert not any("promised" in note for note in notes(result))
    slow = "together"
    result = job.run(TurnFile(tmp_path / "three", {}))
    assert confirmed(result)
    assert any("promised 1.2" in note and "together they give 1.1" in note for note in notes(result))


def test_a_goal_out_of_reach_names_what_is_in_reach(tiny, clock, tmp_path):
    with pytest.raises(ValueError, match=r"speed: got 2, expected at most 1.471, the fastest that there is"):
        search_of(tiny, Goal(speed=2)).run(TurnFile(tmp_path / "a", {}))
    with pytest.raises(ValueError, match=r"error: got 1e-09, expected at least 0.\d+, the least rise"):
        search_of(tiny, Goal(error=1e-9), candidates=CANDIDATES[1:2]).run(TurnFile(tmp_path / "b", {}))
    clock.slower = 1.0
    with pytest.raises(
        ValueError, match=r"methods: got none that saves time \(the best, lgtm .* makes a pass 92 % slower"
    ):
        search_of(tiny, Goal(error=5)).run(TurnFile(tmp_path / "c", {}))


def test_what_a_model_refuses_is_left_out(tiny, clock, tmp_path):
    result = search_of(tiny, Goal(speed=1.05), candidates=[*CANDIDATES[:2], ToDoConfig(factor=64)]).run(
        TurnFile(tmp_path / "turns", {})
    )
    assert [row[:2] for row in result.left_out] == [(f"block {i}", "todo factor=64x64") for i in range(4)]
    assert "factor: got" in result.left_out[0][2]
    assert "* block 3, todo factor=64x64: factor: got" in markdown(result, "Search")
    with pytest.raises(ValueError, match="methods: got todo factor=64x64 and others, expected one that fits"):
        search_of(tiny, Goal(speed=1.05), candidates=[ToDoConfig(factor=64)]).run(TurnFile(tmp_path / "no", {}))


def test_a_search_goes_on_where_it_was_stopped(tiny, clock, tmp_path):
    whole = search_of(tiny, Goal(speed=1.25)).run(TurnFile(tmp_path / "whole", {"seed": 0}))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in (1, 3, len(lines) - 1):
        path = tmp_path / f"cut {kept}"
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        again = search_of(tiny, Goal(speed=1.25)).run(TurnFile(path, {"seed": 0}, resume=True))
        assert numbers(again) == numbers(whole)
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    # Another goal measures no block again.
    before = clock.calls
    job = search_of(tiny, Goal(error=0.5))
    job.run(TurnFile(tmp_path / "whole", {"seed": 0}, resume=True))
    assert clock.calls - before <= job.total - len(job._few.turns) * 4 * 5 + len(CANDIDATES)


def test_turns_of_other_settings_or_of_strangers_are_refused(tmp_path):
    path = tmp_path / "turns"
    file = TurnFile(path, {"seed": 0})
    file.add("alone", 0, {"errors": {NONE: [1.0]}, "times": {"a": 0.5}, "seconds": 2.0})
    assert TurnFile(path, {"seed": 0}, True).get("alone", 0, {"a"})["seconds"] == 2.0
    assert TurnFile(path, {"seed": 0}, True).get("alone", 0, {"a", "b"}) is None
    assert TurnFile(path, {"seed": 0}).get("alone", 0, {"a"}) is None
    with pytest.raises(ValueError, match=r"resume: got .*turns with line 1 .*seed 0 there and 1 now"):
        TurnFile(path, {"seed": 1}, True)
    for line in ("[]", "{}", '{"stage": "x"}', "x"):
        path.write_text(path.read_text().split("\n")[0] + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"resume: got .*turns with line 2 that `bigain search` did not write"):
            TurnFile(path, {"seed": 0}, True)


def test_measurements_by_hand():
    found = Measurements()
    for timestep, errors, ratio in ((5, ([1.0, 3.0], [2.0, 4.0]), 0.5), (7, ([10.0, 10.0], [10.0, 20.0]), 0.7)):
        plain, mine = errors
        found.add(timestep, {"errors": {NONE: plain, "a": mine}, "times": {"a": ratio}, "seconds": 1.0})
    # At 5 the means are 2 and 3, at 7 they are 10 and 15: +50 % of each, image by image (50, 0) and (50, 100).
    assert found.percent("a").tolist() == pytest.approx([(100 + 100) / 2, (200 + 200) / 2])
    assert found.rise("a").value == pytest.approx(50)
    assert found.rise("a").error == pytest.approx(25)
    # The first turn is not timed.
    assert found.saved("a") == pytest.approx(0.3)
    assert found.speed("a") == pytest.approx(1 / 0.7)


def test_errors_are_those_of_the_model(tiny):
    few, _ = digit_samples(tiny, 3, 2)
    meter = Meter(tiny.denoiser, few, (300,), 16, 7)
    noise = seeded_noise([(7, i, 300) for i in range(3)], tuple(few.clean.shape[1:]))
    t = torch.full((3,), 300)
    noisy, target = diffuse(tiny.denoiser.scheduler, few.clean, noise, t)
    errors = [
        (tiny.denoiser(noisy, t, labels) - target).square().mean(dim=(1, 2, 3))
        for labels in (few.labels, torch.full((3,), 10))
    ]
    assert meter.ask(0, None)[0] == pytest.approx(torch.stack(errors).mean(dim=0).tolist(), rel=1e-4)
    assert meter.ask(0, LGTMConfig())[0] != meter.ask(0, None)[0]
    assert not hasattr(tiny.denoiser.model, "_bigain")


def test_groups_are_what_can_be_compressed():
    assert [group.blocks for group in groups_of(tiny_unet())] == [(i,) for i in range(7)]
    by_level = groups_of(tiny_unet(), "level")
    assert [(group.name, group.blocks, group.level) for group in by_level] == [
        ("level 1", (0, 4, 5), 1),
        ("level 2", (1, 2, 3, 6), 2),
    ]
    model = tiny_unet()
    for group in (*groups_of(model), *by_level):
        report = apply_token_compression(model, group.config(LGTMConfig()))
        assert tuple(row.block for row in report.patched) == group.blocks
    shapes = [group.shape for group in groups_of(tiny_unet())]
    assert shapes[0] == shapes[4] == shapes[5] != shapes[1] == shapes[6]
    assert len({group.shape for group in groups_of(tiny_dit())}) == 1
    assert len({group.shape for group in groups_of(tiny_flux())}) == 2
    with pytest.raises(ValueError, match="per: got 'layer', expected one of"):
        groups_of(tiny_unet(), "layer")


def test_candidates():
    briefs = [each.brief() for each in candidates_of(["lgtm", "tome", "iekvd", "todo"], [0.5], [2, (1, 2)], [0, 1], 3)]
    assert briefs == [
        "lgtm ratio=0.5 proportional",
        "tome ratio=0.5 proportional seed=3",
        "iekvd factor=2x2 alpha=0",
        "iekvd factor=2x2 alpha=1",
        "iekvd factor=1x2 alpha=0",
        "iekvd factor=1x2 alpha=1",
        "todo factor=2x2",
        "todo factor=1x2",
    ]
    for wrong, message in (
        (["magic"], "methods: got 'magic'"),
        (["none"], "methods: got 'none'"),
        ([], "methods: got"),
    ):
        with pytest.raises(ValueError, match=message):
            candidates_of(wrong)


def test_groups_that_are_given_the_same_share_a_config():
    one, two, *_, last = groups_of(tiny_unet())
    first, second = LGTMConfig(ratio=0.7), IEKVDConfig()
    mixed = put_together([(one, first), (two, second), (last, first)])
    assert [(part.method, part.blocks, part.max_downsample) for part in parts_of(mixed)] == [
        ("lgtm", (0, 6), 2),
        ("iekvd", (1,), 2),
    ]
    assert everywhere(groups_of(tiny_unet()), second).blocks == tuple(range(7))


@pytest.mark.parametrize(
    ("points", "saved", "ratio"),
    [
        ([(0.3, 0.1), (0.5, 0.3)], 0.2, 0.4),
        ([(0.5, 0.3), (0.3, 0.1)], 0.05, 0.15),
        ([(0.3, -0.1), (0.5, 0.2), (0.7, 0.3)], 0.1, 0.25),
        ([(0.3, 0.1), (0.5, 0.2)], 0.3, 0.7),
        ([(0.3, 0.1), (0.5, 0.05), (0.7, 0.3)], 0.2, 0.5),
        ([(0.3, -0.1), (0.5, -0.2)], 0.1, 0.5),
        ([(0.5, 0.2)], 0.1, 0.25),
    ],
)
def test_the_ratio_that_takes_a_time(points, saved, ratio):
    assert ratio_at(points, saved) == pytest.approx(ratio)


SMALL = ["search", "--calibration", "3", "--held-out", "2", "--timesteps", "300", "--ratios", "0.5", "--factors", "2",
         "--alphas", "0,1", "--threads", "1"]  # fmt: skip


def bigain(*arguments):
    return main([*map(str, arguments)])


def test_the_command(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setitem(SAVED, "lgtm ratio=0.5 proportional", 0.05)
    monkeypatch.setattr("tests.evaluation.test_search.saved_by", lambda config: 0.05)
    out = ("--out", tmp_path / "out")
    assert bigain(*SMALL, *out, "--speed", 1.1) == 0
    shown = capsys.readouterr().out
    assert "Held-out images confirm it: 1.1x was asked for" in shown
    config = load_config(tmp_path / "out" / "config.json")
    assert (
        bigain("classify", "--limit", 2, "--out", tmp_path / "used", "--config", tmp_path / "out" / "config.json") == 0
    )
    written = json.loads((tmp_path / "used" / "summary.json").read_text())["settings"]["compression"]
    assert written == json.loads(json.dumps(config.settings()))
    assert "## All that was measured" in (tmp_path / "out" / "report.md").read_text()
    # Results are kept; the same again needs no turn, and JSON is all there is on stdout.
    assert bigain(*SMALL, *out, "--speed", 1.1) == BAD_INPUT
    before = (tmp_path / "out" / "turns.jsonl").read_bytes()
    capsys.readouterr()
    assert bigain(*SMALL, *out, "--speed", 1.1, "--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["confirmed"] is True
    assert (tmp_path / "out" / "turns.jsonl").read_bytes() == before
    assert bigain(*SMALL, *out, "--speed", 1.1, "--seed", 1, "--resume") == BAD_INPUT
    assert "seed 0 there and 1 now" in capsys.readouterr().err
    assert bigain(*SMALL, *out, "--speed", 1.1, "--seed", 1, "--overwrite") == 0
    assert (tmp_path / "out" / "turns.jsonl").read_bytes() != before
    # A goal that cannot be reached leaves what was measured.
    assert bigain(*SMALL, "--out", tmp_path / "far", "--speed", 9) == BAD_INPUT
    assert "speed: got 9, expected at most 1.25" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "far").iterdir() if path.name[0] != "."] == ["turns.jsonl"]
    assert bigain(*SMALL, "--out", tmp_path / "far", "--speed", 1.2, "--resume") == 0


def test_ctrl_c_leaves_whole_turns_and_no_config(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("tests.evaluation.test_search.saved_by", lambda config: 0.05)
    add, left = TurnFile.add, 2

    def stop(self, *arguments):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        add(self, *arguments)

    call = (*SMALL, "--batch-size", 2, "--out", tmp_path / "out", "--speed", 1.1)
    monkeypatch.setattr(TurnFile, "add", stop)
    assert bigain(*call) == INTERRUPTED
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == ["turns.jsonl"]
    assert len((tmp_path / "out" / "turns.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(TurnFile, "add", add)
    assert bigain(*call, "--resume") == 0
    assert bigain(*call[:-3], tmp_path / "whole", *call[-2:]) == 0
    found, whole = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("out", "whole"))
    assert found == whole


def test_a_pipeline_and_a_folder(tmp_path, clock, monkeypatch, capsys):
    """A DiT over a VAE; images of its classes, of which the first in the order of the folder are searched with."""
    monkeypatch.setattr("tests.evaluation.test_search.saved_by", lambda config: 0.05)
    save_latent_dit(tmp_path / "pipeline", layers=2)
    for label, name in itertools.product("012", "ab"):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (80 * int(label), 90, ord(name))).save(tmp_path / "images" / label / f"{name}.png")
    call = (*SMALL, "--checkpoint", tmp_path / "pipeline", "--images", tmp_path / "images", "--speed", 1.05)
    assert bigain(*call, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").exists()
    shutil.rmtree(tmp_path / "images" / "2")
    capsys.readouterr()
    assert bigain(*call, "--out", tmp_path / "few") == BAD_INPUT
    assert "images: got 4 in " in capsys.readouterr().err
    assert not (tmp_path / "few").exists()


def test_time_is_taken_without_a_fixture(tiny):
    few, _ = digit_samples(tiny, 2, 2)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert Meter(tiny.denoiser, few, (300,), 4, 0).ask(0, None)[1] > 0
    torch.set_num_threads(threads)
    assert measuring.ROWS == 2
    assert FOUND != NONE
