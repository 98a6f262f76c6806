"""The demo in a tiny setting, its verdicts, and its pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigain_kernels.evaluation.demo import FULL, METHODS, Demo, DemoConfig
from bigain_kernels.evaluation.demo_files import ORDER_TITLE, order_cells, table_cells, write_all
from bigain_kernels.evaluation.demo_results import Comparison, DemoResult, claim_note, summarise, verdict
from bigain_kernels.evaluation.metrics import holm, mcnemar
from bigain_kernels.evaluation.output import OutputFolder
from bigain_kernels.evaluation.pictures import PictureConfig, draw_photograph, merge_pictures, patch_tokens
from bigain_kernels.evaluation.pooling_order import PoolingOrderConfig, compare_pooling_orders

TINY = DemoConfig(images=6, samples=4, steps=2, threads=1, image_chunk=3, sample_chunk=4, picture_strides=(4,))
QUICK_ORDERS = PoolingOrderConfig(alphas=(0.5, 1.0), sharpness=(3.0,), seeds=(0, 1), grid=(6, 10))


@pytest.fixture(scope="module")
def run() -> tuple[Demo, DemoResult, list[str]]:
    demo, seen = Demo(TINY), []
    demo.run(seen.append)
    return demo, summarise(demo), seen


def test_every_method_does_both_jobs_on_the_same_items(run) -> None:
    demo, result, seen = run
    assert len(seen) == demo.total == (2 + 2) * len(METHODS)
    for outcome in demo.outcomes.values():
        assert len(outcome.correct) == 6
        assert {guidance: len(made) for guidance, made in outcome.samples.items()} == {1.5: 4, 3.0: 4}
        assert [len(times) for times in outcome.seconds.values()] == [2, 2]
    rows = {row.key: row for row in result.rows}
    assert list(rows) == [method.key for method in METHODS]
    assert rows["none"].speed == 1.0
    assert rows["none"].generation[3.0].distance.value == 0.0
    assert rows["lgtm"].generation[3.0].distance.value > 0.0
    assert [rows[key].tokens for key in ("none", "lgtm", "abm", "todo")] == [
        "64 of 64",
        "20 of 64",
        "22 of 64",
        "16 of 64 keys",
    ]


def test_all_files_are_written(run, tmp_path: Path) -> None:
    demo, result, _ = run
    orders = compare_pooling_orders(QUICK_ORDERS)
    with OutputFolder(tmp_path, (), again=False) as output:
        page = write_all(demo, result, output, orders).read_text()
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [method.key for method in METHODS]
    assert float(rows[0]["accuracy"]) == pytest.approx(result.rows[0].accuracy.value)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["images"] == 6
    assert content["notes"] == result.notes
    assert [order["alpha"] for order in content["pooling_orders"]] == [0.5, 1.0]
    assert ORDER_TITLE in page
    with OutputFolder(tmp_path, (), again=True) as output:
        assert ORDER_TITLE not in write_all(demo, result, output, pictures=False).read_text()
    pictures = sorted(tmp_path.rglob("*.png"))
    assert len(pictures) == 2 * len(METHODS) + 2
    for path in pictures:
        assert f"({path.relative_to(tmp_path).as_posix()})" in page
        with Image.open(path) as picture:
            assert min(picture.size) > 50
    for note in result.notes:
        assert note in page


def test_table_states_errors_and_rivals(run) -> None:
    heading, rows = table_cells(run[1])
    assert {len(row) for row in rows} == {len(heading)}
    assert rows[0][3] == "-"
    assert rows[2][0] == "L-GTM"
    assert rows[2][3].endswith("\nto ToMe")
    assert all(" to " in row[2] for row in rows)
    assert all(", p " in row[3] for row in rows[1:])


def test_proportional_rows_differ_from_those_without(run) -> None:
    demo, result, _ = run
    rows = {row.key: row for row in result.rows}
    for key in ("tome", "lgtm"):
        assert rows[f"{key}_proportional"].tokens == rows[key].tokens
        assert demo.compressions[f"{key}_proportional"].proportional
        made, without = (demo.outcomes[name].samples[3.0] for name in (f"{key}_proportional", key))
        assert not torch.allclose(made, without, atol=1e-3)


def test_pooling_orders_agree_at_alpha_one_alone() -> None:
    half, one = compare_pooling_orders(QUICK_ORDERS)
    assert (half.alpha, one.alpha, half.sharpness) == (0.5, 1.0, 3.0)
    assert one.apart.value < 1e-5 < 1e-3 < half.apart.value
    assert abs(one.difference.value) < 1e-5
    assert half.difference.value == pytest.approx(half.hidden.value - half.keys.value, rel=1e-6)
    assert min(half.keys.value, half.hidden.value, one.keys.value) > 1e-3
    again = compare_pooling_orders(QUICK_ORDERS)
    assert again[0].keys.value == pytest.approx(half.keys.value, rel=1e-4)
    heading, rows = order_cells([half, one])
    assert {len(row) for row in rows} == {len(heading)}
    assert rows[1][:2] == ["3", "1"]


def test_interrupted_demo_counts_what_all_methods_have_done() -> None:
    demo = Demo(TINY)

    def stop(text: str, seen: list[str]) -> None:
        seen.append(text)
        if len(seen) == len(METHODS) + 2:
            raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        demo.run(lambda text: stop(text, seen))
    result = summarise(demo)
    assert {row.images for row in result.rows} == {3}
    assert result.samples == 0
    assert all(row.generation == {} for row in result.rows)
    assert all(cell for row in table_cells(result)[1] for cell in row)


def test_demo_keeps_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    Demo(DemoConfig(images=1, samples=3, steps=1, threads=3)).run()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["images", "samples", "steps", "threads"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 0"):
        DemoConfig(**{name: 0})
    assert FULL.images == 400


def test_verdicts() -> None:
    assert verdict(Comparison("accuracy", 3.0, 0.01, True, 1)) == "better"
    assert verdict(Comparison("distance", 3.0, 0.01, False, 1)) == "worse"
    for p in (0.05, 1.0, float("nan")):
        assert verdict(Comparison("accuracy", 3.0, p, True, 1)) == "no clear difference"


def test_notes_say_when_a_claim_does_not_come_out() -> None:
    up, down, flat = (Comparison("accuracy", value, p, True, 1) for value, p in ((3.0, 1e-5), (-3.0, 0.02), (0.5, 0.7)))
    assert claim_note("A", "the paper", [up, flat]) == (
        "A. As the paper says: better in accuracy (+3.0, p < 0.001); no clear difference in accuracy (+0.5, p 0.7)."
    )
    assert claim_note("A", "the paper", [down]) == "A. NOT as the paper says: worse in accuracy (-3.0, p 0.02)."
    assert claim_note("A", "the paper", [up, down]).startswith("A. Not all as the paper says: better in")
    assert claim_note("A", None, [up, down]) == (
        "A. Measured, without a claim: better in accuracy (+3.0, p < 0.001); worse in accuracy (-3.0, p 0.02)."
    )
    assert claim_note("A", "the paper", [flat]).startswith("A. NOT shown here, though the paper says better: no clear")


def test_all_comparisons_are_corrected_together(run) -> None:
    demo, result, _ = run
    tests = len([method for method in METHODS if method.rival])
    assert any(f"for all {6 * 7} comparisons" in note for note in result.notes)
    plain = {key: outcome.correct for key, outcome in demo.outcomes.items()}
    p = [mcnemar(plain[method.key], plain[method.rival]) for method in METHODS if method.rival]
    assert [row.difference.p for row in result.rows if row.rival] == holm(p)
    assert len(p) == tests


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
