"""The demo in a tiny setting: frontier, choice, both jobs, verdicts, and its pictures."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigain_kernels.evaluation.checkpoints import SHIPPED
from bigain_kernels.evaluation.compression import compressed, tokens_kept
from bigain_kernels.evaluation.demo import FULL, Demo, DemoConfig
from bigain_kernels.evaluation.demo_files import frontier_cells, job_cells, jobs_caption, write_all
from bigain_kernels.evaluation.demo_results import (
    Comparison,
    DemoResult,
    _compared,
    _Judged,
    shown_p,
    summarise,
    verdict,
)
from bigain_kernels.evaluation.denoisers import diffuse
from bigain_kernels.evaluation.frontier import Frontier, FrontierRow, choose
from bigain_kernels.evaluation.metrics import Measured, holm, psnr
from bigain_kernels.evaluation.noise import seeded_noise
from bigain_kernels.evaluation.output import OutputFolder
from bigain_kernels.evaluation.pictures import PictureConfig, draw_photograph, merge_pictures, patch_tokens
from bigain_kernels.evaluation.points import BY_KEY, NONE, SEARCHED, points_of
from bigain_kernels.evaluation.real_size import RealSize
from bigain_kernels.evaluation.subjects import SEARCHED_FILE, Subject, load_subject
from bigain_kernels.methods import IEKVDConfig, LGTMConfig
from bigain_kernels.methods.files import save_config
from bigain_kernels.methods.mixed import MixedConfig

TINY = DemoConfig(
    models=("digits",),
    frontier_images=2,
    images=6,
    minutes=None,
    samples=4,
    steps=2,
    threads=1,
    image_chunk=3,
    sample_chunk=4,
    real_size=False,
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject("digits")


@pytest.fixture(scope="module")
def run() -> tuple[Demo, DemoResult, list[str]]:
    demo, seen = Demo(TINY), []
    demo.run(seen.append)
    return demo, summarise(demo), seen


def test_every_point_does_both_jobs_on_the_same_items(run) -> None:
    demo, result, seen = run
    (part,), (model,) = demo.parts, result.models
    assert part.jobs is not None
    frontier = 3 * len(points_of())
    assert len(seen) == frontier + len(part.jobs.points) * (2 + 1) <= demo.total
    for outcome in part.jobs.outcomes.values():
        assert len(outcome.correct) == 6
        assert [len(made) for made in outcome.samples] == [4]
        assert [len(times) for times in outcome.seconds.values()] == [2, 1]
    assert [row.point for row in model.frontier] == list(points_of())
    assert model.frontier[0].rise.value == model.frontier[0].moved == 0.0
    assert model.frontier[0].speed == 1.0
    roles = [row.role for row in model.jobs]
    assert roles[:3] == ["none", "chosen", "rival"]
    assert {"stress"} == set(roles[3:])
    rows = {row.point.key: row for row in model.jobs}
    assert rows["lgtm_0.7"].tokens == "20 of 64"
    assert rows["none"].speed == 1.0
    assert math.isnan(rows["none"].psnr.value)
    assert 0 < rows["lgtm_0.7"].psnr.value < 60
    assert model.jobs[1].point.ours is not model.jobs[2].point.ours


def test_the_speeds_of_two_jobs_are_not_mixed(run, monkeypatch) -> None:
    """The median of each job, so that the job with more chunks does not decide alone."""
    jobs = run[0].parts[0].jobs
    monkeypatch.setattr(jobs.outcomes["none"], "seconds", {"classify": [4.0, 4.0, 4.0], "generate": [9.0]})
    monkeypatch.setattr(jobs.outcomes["lgtm_0.7"], "seconds", {"classify": [2.0, 2.0, 8.0], "generate": [1.0]})
    assert _Judged(jobs)._speed("lgtm_0.7") == pytest.approx(math.sqrt(2 * 9))


def test_every_seed_has_images_and_noise_of_its_own(run, tmp_path: Path) -> None:
    demo = Demo(replace(TINY, seeds=2, images=3, frontier_images=2))
    demo.run()
    (model,) = summarise(demo).models
    first = {row.point.key: row for row in run[1].models[0].jobs}
    for row in model.jobs:
        assert row.images == 6
        assert [each.seed for each in row.seeds] == [0, 1]
        assert np.mean([each.accuracy for each in row.seeds]) == pytest.approx(row.accuracy.value)
        assert np.mean([each.consistency for each in row.seeds]) == pytest.approx(row.consistency.value)
        if row.point.key in first and row.role != "none":
            # The first seed's samples are those of a run with this seed alone; the second's are others.
            assert row.seeds[0].psnr == pytest.approx(first[row.point.key].psnr.value, abs=1e-3)
            assert row.seeds[1].psnr != row.seeds[0].psnr
    samples = demo.parts[0].jobs.outcomes["none"].samples
    assert not torch.equal(samples[0], samples[1])
    with OutputFolder(tmp_path, (), again=False) as output:
        page = write_all(demo, summarise(demo), output, pictures=False).read_text()
    assert "accuracy % by seed" in page
    with open(tmp_path / "results.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "seeds"]
    assert len(rows) == 2 * len(model.jobs)


def test_frontier_is_what_the_models_give(subject: Subject) -> None:
    """The rise of one point, computed by hand from single predictions."""
    point = BY_KEY["tome_0.5_proportional"]
    frontier = Frontier(subject, images=3, chunk=2, points=(NONE, point))
    frontier.run(lambda _: None)
    row = frontier.rows()[1]
    rises = []
    for timestep in subject.settings.frontier:
        errors: dict[str, list[float]] = {"none": [], point.key: []}
        for i in range(3):
            clean = subject.validation.images[i : i + 1]
            noise = seeded_noise([(0, i, timestep)], tuple(clean.shape[1:]))
            denoiser = subject.checkpoint.denoiser
            noisy, target = diffuse(denoiser.scheduler, clean, noise, torch.tensor([timestep]))
            both = torch.stack([subject.validation.labels[i], torch.tensor(10)])
            for key, used in (("none", NONE), (point.key, point)):
                with compressed(denoiser, used.compression(2)):
                    predicted = denoiser(noisy.repeat(2, 1, 1, 1), torch.tensor([timestep] * 2), both)
                errors[key].append((predicted - target).double().square().mean().item())
        rises.append([100 * (b - a) / np.mean(errors["none"]) for a, b in zip(*errors.values(), strict=True)])
    # An image is one observation, at however many timesteps it is looked at.
    of_images = np.mean(rises, axis=0)
    assert row.rise.value == pytest.approx(np.mean(of_images), rel=1e-3)
    assert row.rise.error == pytest.approx(np.std(of_images, ddof=1) / math.sqrt(3), rel=1e-3)


def _row(key: str, rise: float, speed: float) -> FrontierRow:
    return FrontierRow(BY_KEY[key], Measured(rise, 0.1), 0.0, speed)


def test_the_fastest_within_the_budget_is_chosen() -> None:
    rows = [
        _row("none", 0.0, 1.0),
        _row("lgtm_0.3", 1.0, 1.1),
        _row("lgtm_0.5", 1.9, 1.3),
        _row("lgtm_0.7", 2.1, 1.6),
        _row("tome_0.5", 5.0, 1.4),
        _row("todo_2", 3.0, 1.2),
    ]
    assert choose(rows, ours=True) == BY_KEY["lgtm_0.5"]
    assert choose(rows, ours=True, budget=3.0) == BY_KEY["lgtm_0.7"]
    # Hardly slower and nearer.
    assert choose([*rows, _row("lgtm_0.3_proportional", 0.5, 1.25)], ours=True) == BY_KEY["lgtm_0.3_proportional"]
    # None of them is within it: the one that costs least.
    assert choose(rows, ours=False) == BY_KEY["todo_2"]


def test_points_have_names_and_apply() -> None:
    found = points_of((0, 3))
    assert len({point.key for point in found}) == len({point.title for point in found}) == len(found)
    assert found[0] == NONE
    some = {point.key: point for point in found}["lgtm_0.5_proportional_blocks03_shared"]
    config = some.compression(2)
    assert (config.blocks, config.proportional, config.share_plan, config.ratio) == ((0, 3), True, 2, 0.5)
    assert BY_KEY["lgtm_0.5"].compression(2).share_plan is None
    assert NONE.compression() is None


def test_what_a_search_found_is_a_point_of_its_own(tmp_path: Path) -> None:
    """From the file beside the checkpoint, first to last: frontier, both jobs, tables and pictures."""
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED["tiny-dit"], folder)
    found = MixedConfig((IEKVDConfig(factor=2, alpha=0.0, blocks=(0,)), LGTMConfig(ratio=0.5, blocks=(1, 2))))
    save_config(folder / SEARCHED_FILE, found)
    demo = Demo(TINY, folder)
    demo.run()
    (part,), (model,) = demo.parts, summarise(demo).models
    point = model.frontier[-1].point
    assert (point.title, point.config, point.ours) == (SEARCHED, found, True)
    assert part.jobs is not None
    assert model.frontier[-1].rise.value != 0.0
    assert tokens_kept(point.compression(2), part.subject.grid) == "16 of 64 keys, 32 of 64"
    with OutputFolder(tmp_path / "out", (), again=False) as output:
        page = write_all(demo, summarise(demo), output).read_text()
    assert f"| {SEARCHED} |" in page
    assert "`iekvd factor=2x2 alpha=0` in block 0; `lgtm ratio=0.5` in blocks 1 and 2." in page


def test_all_files_are_written(run, tmp_path: Path) -> None:
    demo, result, _ = run
    with OutputFolder(tmp_path, (), again=False) as output:
        page = write_all(demo, result, output).read_text()
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    jobs = [row for row in rows if row["table"] == "jobs"]
    assert [row["method"] for row in rows if row["table"] == "frontier"] == [point.key for point in points_of()]
    assert float(jobs[0]["accuracy"]) == pytest.approx(result.models[0].jobs[0].accuracy.value)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["images"] == 6
    assert content["notes"] == result.notes
    assert content["weights"]["digits"] == demo.parts[0].subject.checkpoint.fingerprint()
    pictures = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert pictures == [
        "accuracy_digits.png",
        "frontier_digits.png",
        "merge_maps_digits.png",
        "photographs/china.png",
        "photographs/flower.png",
        "samples_digits.png",
    ]
    for name in pictures:
        assert f"({name})" in page
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 10
    for note in result.notes:
        assert note in page


def test_tables_state_errors_and_roles(run) -> None:
    heading, rows = frontier_cells(run[1])
    assert {len(row) for row in rows} == {len(heading)} == {3}
    assert rows[0] == ["none", "0", "1.00x"]
    assert all(" ± " in row[1] for row in rows[1:])
    heading, rows = job_cells(run[1].models[0])
    assert {len(row) for row in rows} == {len(heading)}
    assert [row[1] for row in rows[:3]] == ["", "chosen", "rival"]
    assert all(" to " in row[3] for row in rows)


def test_interrupted_demo_counts_what_all_points_have_done(run, tmp_path: Path) -> None:
    first, points = 3 * len(points_of()), len(run[0].parts[0].jobs.points)
    stops = {
        5: None,
        first + points - 1: None,
        first + 2 * points - 1: (0, 4),
        first + 2 * points + 1: (3, 4),
        first + 3 * points - 1: (3, 4),
    }
    for stop_at, done in stops.items():
        demo, seen = Demo(TINY), []

        def stop(text: str, seen: list[str] = seen, stop_at: int = stop_at) -> None:
            seen.append(text)
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            demo.run(stop)
        result = summarise(demo)
        (model,) = result.models
        assert {(row.images, model.samples) for row in model.jobs} == (set() if done is None else {done})
        assert all(cell for row in job_cells(model)[1] for cell in (row[0], *row[2:]))
        with OutputFolder(tmp_path / str(stop_at), (), again=False) as output:
            write_all(demo, result, output)
        drawn = {path.name for path in (tmp_path / str(stop_at)).glob("*.png")}
        assert ("accuracy_digits.png" in drawn) == (done is not None and done[0] > 0)
        assert ("samples_digits.png" in drawn) == (done is not None)


def test_the_time_of_an_image_is_that_of_chunks_that_all_have_done(run, monkeypatch) -> None:
    """Chunks of unequal size, and a point that was ahead when the run was stopped."""
    jobs = run[0].parts[0].jobs
    for key, outcome in jobs.outcomes.items():
        ahead = key == "lgtm_0.7"
        monkeypatch.setattr(outcome, "sizes", [5, 5, 2, 5] if ahead else [5, 5, 2])
        monkeypatch.setattr(outcome, "correct", torch.ones(17 if ahead else 12, dtype=torch.bool))
        seconds = {"classify": [5.0, 5.0, 2.0, 50.0] if ahead else [10.0, 10.0, 4.0], "generate": [1.0]}
        monkeypatch.setattr(outcome, "seconds", seconds)
    judged = _Judged(jobs)
    assert judged._seconds("lgtm_0.7") == pytest.approx(12.0)
    assert judged._seconds("none") == pytest.approx(24.0)


def test_classifying_ends_when_time_is_over(run) -> None:
    """After whole rounds, the first of which is always done; the other jobs are complete."""
    demo, seen = Demo(replace(TINY, minutes=0.0)), []
    demo.run(seen.append)
    (model,) = summarise(demo).models
    assert {row.images for row in model.jobs} == {3}
    assert model.samples == 4
    assert len(seen) < demo.total
    assert jobs_caption(demo, summarise(demo)).startswith("3 of 6 test images (then --minutes were over")
    assert jobs_caption(*run[:2]).startswith("6 test images")
    for minutes in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^minutes: got {minutes}, expected "):
            DemoConfig(minutes=minutes)


def test_demo_keeps_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    Demo(replace(TINY, images=1, samples=3, steps=1, threads=3)).run()
    assert torch.get_num_threads() == before


def test_the_models_of_mnist_have_all_that_the_demo_asks_for() -> None:
    for model, tokens in (("unet", 1024), ("dit", 1024)):
        subject = load_subject(model)
        assert subject.grid[0] * subject.grid[1] == tokens
        assert subject.validation.images.shape[1:] == subject.checkpoint.denoiser.sample_shape
        with torch.no_grad():
            right = subject.classifier(subject.judged(subject.test.images)).argmax(dim=1) == subject.test.labels
        assert right.float().mean() > 0.95


@pytest.mark.parametrize("name", ["images", "samples", "steps", "threads", "frontier_images"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 0"):
        DemoConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"^models: got \['vae'\]"):
        DemoConfig(models=("vae",))
    assert FULL.seeds * FULL.images == 400


def test_verdicts() -> None:
    assert verdict(Comparison("accuracy", 3.0, 0.01, True, 1)) == "better"
    assert verdict(Comparison("KID", 3.0, 0.01, False, 1)) == "worse"
    for p in (0.05, 1.0, float("nan")):
        assert verdict(Comparison("accuracy", 3.0, p, True, 1)) == "no clear difference"


def test_all_comparisons_are_corrected_together(run) -> None:
    demo, result, _ = run
    jobs = demo.parts[0].jobs
    assert len(result.notes) == 5 + 1
    assert "for all 8 comparisons" in result.notes[-1]
    assert result.notes[0].startswith(f"DiT of 64 tokens, {jobs.chosen.title} against no compression (chosen): ")
    alone = [each.p for pair in _compared(jobs) for each in _Judged(jobs).compare(*pair)]
    shown = re.findall(r"p [<\d][^),]*", " ".join(result.notes[:-1]))
    assert sorted(shown) == sorted(shown_p(p) for p in holm(alone))
    assert sorted(shown) != sorted(shown_p(p) for p in alone)


def test_psnr_is_that_of_images_of_range_two() -> None:
    plain = torch.zeros(2, 1, 4, 4)
    other = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 3.0)])
    # 10 log10(4 / 0.04), and for what is out of range 10 log10(4 / 1).
    assert psnr(other, plain).tolist() == pytest.approx([20.0, 10 * math.log10(4.0)])


def test_real_size_times_every_model_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigain_kernels.evaluation import real_size

    def small():
        from diffusers import DiTTransformer2DModel

        model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
        x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
        return model, lambda: model(x, t, class_labels=torch.tensor([1]))

    monkeypatch.setattr(real_size, "MODELS", {"small": small})
    timed, seen = RealSize(), []
    assert timed.rows() == []
    timed.run(seen.append)
    assert len(seen) == timed.total == 4 * 4
    assert [row.title for row in timed.rows()] == ["none", "L-GTM 0.5", "L-GTM 0.7", "IE-KVD 2"]
    assert timed.rows()[0].speed == 1.0


def test_photograph_tokens_and_what_stays(tmp_path: Path) -> None:
    config = PictureConfig(stride=(4, 4))
    photograph = torch.zeros(3, 384, 576)
    photograph[:, :, 280:] = 1.0
    image, tokens = patch_tokens(photograph, config)
    assert tokens.shape == (1, 48 * 72, 3 * 64)
    assert torch.equal(image, photograph)
    assert tokens.mean(dim=(0, 1)).abs().max() < 1e-4
    for picture in merge_pictures(image, tokens, config):
        assert picture.painted.shape == (384, 576, 3)
        assert picture.plan.num_tokens - picture.plan.num_slots <= int(48 * 72 * 0.7)
    shares = draw_photograph("china.jpg", tmp_path / "china.png", config)
    # A random choice of unmerged tokens would hold about a quarter of the sharpest ones.
    assert shares["L-GTM"] > 0.5
    with Image.open(tmp_path / "china.png") as drawn:
        assert np.asarray(drawn).std() > 20
