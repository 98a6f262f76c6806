"""Whole experiments on the shipped model and on random pipelines: killed, shared, and through every preset."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from bigain_kernels.cli.main import main
from bigain_kernels.evaluation.harness import report as report_module
from bigain_kernels.evaluation.harness.engine import Engine
from bigain_kernels.evaluation.harness.experiment import load_experiment, presets
from bigain_kernels.evaluation.harness.report import write_report
from bigain_kernels.evaluation.harness.reproduce import Reproduction
from bigain_kernels.evaluation.harness.rows import read_all

from ...compat.test_clients import folder_of_a_pipeline
from ..toys import save_latent_dit
from . import trees
from .test_run import contents

SMALL = {
    "name": "small",
    "checkpoint": "tiny-dit",
    "data": {"kind": "digits", "limit": 10},
    "classify": {"protocol": "ours", "stages": [[1, 3], [2, 1]], "shard": 4},
    "generate": {"steps": 2, "guidance": 1.5, "limit": 6, "batch_size": 3},
    "methods": [{"title": "none"}, {"title": "L-GTM", "method": "lgtm", "options": {"ratio": 0.5}}],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """One process, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    threads = torch.get_num_threads()
    assert main(["reproduce", str(config), "--out", str(out), "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    return out


def numbers(out: Path) -> dict[str, Any]:
    """All that decides a report, to the bit: rows, drawings, and numbers without times."""
    found: dict[str, Any] = {run.name: contents(run) for run in sorted((out / "classify").iterdir())}
    for image in sorted(out.glob("generate/*/images/[!.]*")):
        found[str(image.relative_to(out))] = image.read_bytes()
    written = json.loads((out / "numbers.json").read_text())
    for points in written["Classification"].values():
        del points["ms"]
    return {**found, "numbers": written}


def test_json_of_a_finished_run(config, whole, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert main(["reproduce", str(config), "--out", str(out), "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"report": str(out / "report.md"), **json.loads((out / "numbers.json").read_text())}
    assert set(found["Classification"]) == {"none", "L-GTM"}


def test_a_report_has_what_is_promised(whole) -> None:
    text, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    for expected in ("| L-GTM |", "minus none", "Holm", "## Not run", "## Settings", "bigain_kernels:", "weights:"):
        assert expected in text
    assert "<td>L-GTM</td>" in page
    assert {path.name for path in whole.glob("*.png")} == {
        f"{what}-{cost}.png" for what in ("accuracy", "kid") for cost in ("ms", "gflop")
    }
    found = json.loads((whole / "numbers.json").read_text())
    assert found["Classification"]["L-GTM"]["GFLOP"] < found["Classification"]["none"]["GFLOP"]
    assert found["Not run"] == ["CLIP score: no model (--clip)"]
    drawn = found["Generation"]
    # Drawn from the same noise; the uncompressed ones are what others are compared with.
    assert {"KID", "FID", "IS", "precision", "recall", "PSNR", "SSIM"} == set(drawn["L-GTM"])
    assert {"PSNR", "SSIM"} == set(drawn["L-GTM"]) - set(drawn["none"])
    assert "| FID of 6 |" in text
    assert len(list(whole.glob("generate/none-0/images/*.png"))) == 6
    assert (whole / "per_class.csv").read_text().startswith("method,class,accuracy")


def test_an_interrupted_experiment_goes_on_to_the_same_numbers(config, whole, tmp_path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seen: list[int] = []

    def stop(what: str, done: int) -> None:
        seen.append(done)
        if len(seen) in (2, 4):
            raise KeyboardInterrupt

    for _ in range(2):
        job = Reproduction(load_experiment(str(config)), tmp_path, torch.device("cpu"))
        with pytest.raises(KeyboardInterrupt):
            job.run(stop)
    assert job.done() == 10 + 4 < job.total
    assert "shards are left" in write_report(job).read_text()
    job.run(stop)
    assert job.done() == job.total == 2 * 10 + 2 * 6
    write_report(job)
    torch.set_num_threads(threads)
    assert numbers(tmp_path) == numbers(whole)


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "racing", "most": 8, "error": 0.2},
        {"kind": "halving", "budget": 160},
        {
            **{"kind": "groups", "groups": [["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]]},
            **{"representatives": 2, "samples": 1, "keep": 1, "stages": [[2, 1]]},
        },
    ],
    ids=lambda rule: rule["kind"],
)
def test_experiments_follow_their_rule(tmp_path, rule: dict[str, Any]) -> None:
    """The rule decides what is asked, and again from the rows on disk."""
    data = SMALL | {"data": {"kind": "digits", "limit": 4}, "methods": [{"title": "none"}], "generate": None}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(data | {"classify": {"protocol": "ours", "rule": rule}}))
    job = Reproduction(load_experiment(str(tmp_path / "x.yaml")), tmp_path / "out", torch.device("cpu"))
    job.run()
    assert f"kind: {type(job.rule).__name__}" in write_report(job).read_text()
    # Whoever is behind is asked no more: fewer rows than all classes at the most samples that anyone got.
    asked = most = 0
    for _, _, errors, _ in read_all([job.classified[0].folder.path]):
        assert job.rule.standing(errors).question is None
        asked, most = asked + int(errors.asked.sum()), most + errors.samples * 10
    assert 0 < asked < most


def test_speed_is_that_of_turns_and_not_of_the_rows_on_disk(config, tmp_path, monkeypatch) -> None:
    """A machine that is ten times slower in every other turn slows all methods of that turn alike."""
    job = Reproduction(load_experiment(str(config)), tmp_path / "out", torch.device("cpu"))
    took = {"none": [0.8, 8.0, 0.8, 8.0], "L-GTM": [0.4, 4.0, 0.4, 4.0]}
    monkeypatch.setattr(report_module, "times_in_turns", lambda *arguments: took)
    found = report_module.row_times(job, job.experiment.methods)
    assert found["L-GTM"] == pytest.approx((1000 * 2.2 / 8, 2.0))
    assert found["none"] == pytest.approx((1000 * 4.4 / 8, 1.0))


def test_ctrl_c_reports_on_what_is_finished(config, tmp_path, monkeypatch, capsys) -> None:
    """In the second method: of the first there is a report. In the first: there is none, and nothing breaks."""
    engine_ask, left = Engine.ask, [4]

    def ask(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return engine_ask(self, *arguments)

    monkeypatch.setattr(Engine, "ask", ask)
    threads = torch.get_num_threads()
    command = ["reproduce", str(config), "--threads", "1", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 130
    assert "Report: " in capsys.readouterr().out
    assert "classify/l-gtm-0: 2 of 3 shards are left" in (tmp_path / "a" / "report.md").read_text()
    left[0] = 1
    assert main([*command, str(tmp_path / "b")]) == 130
    assert not (tmp_path / "b" / "report.md").exists()
    torch.set_num_threads(threads)


def test_clip_and_inception_are_looked_for_before_the_work(config, tmp_path, capsys) -> None:
    for option in ("--clip", "--inception"):
        assert main(["reproduce", str(config), "--out", str(tmp_path / "out"), option, str(tmp_path / "no")]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"bigain: {option[2:]}: got ")
    assert not list((tmp_path / "out").glob("classify/*/rows/*"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_member(rank: int, port: int, config: Path | str, out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, "-m", "bigain_kernels.cli.main", "reproduce", str(config), "--out", str(out)]
    return subprocess.Popen([*command, "--threads", "1", "--device", "cpu"], env=environment, stderr=subprocess.PIPE)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_have_the_numbers_of_one(config, whole, tmp_path, killed: bool) -> None:
    port = free_port()
    out = tmp_path / "out"
    workers = [start_member(rank, port, config, out) for rank in range(2)]
    try:
        if killed:
            deadline = time.monotonic() + 200
            while not list(out.glob("classify/*/rows/*.parquet")) and time.monotonic() < deadline:
                time.sleep(0.02)
            workers[1].send_signal(signal.SIGKILL)
        _, error = workers[0].communicate(timeout=240)
        assert workers[0].returncode == 0, error.decode()[-2000:]
        if not killed:
            assert workers[1].wait(timeout=120) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert numbers(out) == numbers(whole)


def test_another_experiment_is_refused(config, whole, tmp_path, capsys) -> None:
    other = tmp_path / "small.yaml"
    other.write_text(yaml.safe_dump(SMALL | {"dtype": "bfloat16"}))
    assert main(["reproduce", str(other), "--out", str(whole)]) == 2
    assert "with another experiment" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main(["reproduce", str(config), "--out", str(tmp_path / "mine")]) == 2
    assert "with files in it" in capsys.readouterr().err


def test_a_command_that_failed_leaves_the_folder_to_the_corrected_one(config, tmp_path) -> None:
    out, device = tmp_path / "out", torch.device("cpu")
    with pytest.raises(ValueError, match=r"^data: got none"):
        Reproduction(load_experiment("sd2-pets"), out, device)
    with pytest.raises(FileNotFoundError, match=r"^checkpoint: got nowhere"):
        Reproduction(load_experiment(str(config), {"checkpoint": "nowhere"}), out, device)
    (out / "prompts").mkdir()
    Reproduction(load_experiment(str(config)), out, device)
    with pytest.raises(ValueError, match=r"with another experiment \(data\.limit 10 there and 5 now\)"):
        Reproduction(load_experiment(str(config), {"data.limit": 5}), out, device)


def test_other_images_in_the_same_folder_are_refused(config, tmp_path) -> None:
    """Shards are numbers over a list of images: over another list some would count twice and some not at all."""
    root, out, device = tmp_path / "data", tmp_path / "out", torch.device("cpu")
    for name in ("3/b", "7/c", "7/e"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16)).save(root / f"{name}.png")
    changed = {"data.kind": "folder", "data.root": str(root), "data.limit": None, "classify.stages": [[1, 1]]}
    experiment = load_experiment(str(config), changed)
    Reproduction(experiment, out, device)
    Reproduction(experiment, out, device)
    shutil.copy(root / "7" / "c.png", root / "3" / "a.png")
    with pytest.raises(ValueError, match=r"^data: got 4 images, not the 3 that .*out was begun with"):
        Reproduction(experiment, out, device)
    (root / "7" / "e.png").unlink()
    with pytest.raises(ValueError, match=r"^data: got 3 images, .*of other names"):
        Reproduction(experiment, out, device)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> dict[str, Path]:
    """Random ones, of the kinds that the presets ask for."""
    root = tmp_path_factory.mktemp("pipelines")
    folder_of_a_pipeline(root / "sd")
    save_latent_dit(root / "dit", layers=12, classes=1000)
    return {"sd": root / "sd", "dit": root / "dit"}


def _tree(preset: str, root: Path) -> Path:
    if "imagenet" not in preset:
        return trees.pets(root) if "pets" in preset else trees.coco(root)
    wnids = {f"n{10 * i:08d}": f"name {i}" for i in range(1000)}
    trees.imagenet(root, {wnid: wnids[wnid] for wnid in list(wnids)[5::400]})
    (root / "LOC_synset_mapping.txt").write_text("\n".join(f"{w} {n}" for w, n in wnids.items()))
    return root


# Those that differ in more than data and methods; make test-slow has the others.
_AT_ONCE = ("dit-xl2-imagenet100", "sd2-coco")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in _AT_ONCE else pytest.mark.slow) for name in presets() if name != "tiny"],
)
def test_random_pipelines_go_through_every_preset(name: str, pipelines, tmp_path) -> None:
    changes = {
        "data.root": str(_tree(name, tmp_path / "data")),
        "checkpoint": str(pipelines[name.split("-")[0].rstrip("2")]),
        **{"data.limit": 2, "generate.steps": 2, "generate.limit": 1, "dtype": "float32"},
    }
    job = Reproduction(load_experiment(name, changes), tmp_path / "out", torch.device("cpu"))
    job.run()
    text = write_report(job).read_text()
    assert job.rule.stages == ((5, 3), (20, 1))  # of three classes no more stay
    for method in job.experiment.methods:
        assert f"| {method.title} |" in text
        for value in method.paper.values():
            assert f"| {value:.2f} |" in text
    assert ("mAP" in text) == (name == "sd2-coco")
    if name == "sd2-coco":
        # Drawn from the caption, and classified by the names of the classes.
        assert job.texts() == ["A dog."]
        assert job.drawer.class_names == ("A dog.",)
        assert job.checkpoint.denoiser.num_classes == 3
        assert "caption" not in text
    # Encoded once for all methods.
    assert len(list((tmp_path / "out" / "latents").rglob("*.safetensors"))) == 1
