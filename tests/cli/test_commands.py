"""The commands: help, results on disk, going on after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import bigain_kernels
from bigain_kernels.cli import generate as generate_command
from bigain_kernels.cli.main import BAD_INPUT, INTERRUPTED, main, make_app
from bigain_kernels.evaluation import demo
from bigain_kernels.evaluation import generate as generation
from bigain_kernels.evaluation import train_tiny as training
from bigain_kernels.evaluation.checkpoints import TINY_DIT
from bigain_kernels.evaluation.classify import ImageResult
from bigain_kernels.evaluation.data import load_digits
from bigain_kernels.evaluation.folders import find_images
from bigain_kernels.evaluation.points import points_of
from bigain_kernels.evaluation.records import ResultsFile
from bigain_kernels.methods import IEKVDConfig, LGTMConfig, MixedConfig, save_config

COMMANDS = ["demo", "classify", "generate", "bench", "search", "reproduce", "train-tiny", "env", "tune"]


def _bigain(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def _images(path: Path) -> list[dict]:
    """The results without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return sorted(({**line, "seconds": 0.0} for line in lines), key=lambda line: line["index"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    # Wide enough that no text is wrapped.
    result = CliRunner().invoke(make_app(), [command, "--help"], env={"COLUMNS": "600"})
    assert result.exit_code == 0
    assert "Usage: " in result.output
    shown = " ".join(result.output.split())
    for parameter in typer.main.get_group(make_app()).commands[command].params:
        help_text = getattr(parameter, "help", None)
        assert help_text
        assert parameter.opts[0] in shown
        assert " ".join(help_text.split()) in shown


def test_overview_names_every_command() -> None:
    result = CliRunner().invoke(make_app(), ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


def test_env_shows_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert _bigain("env") == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "bipartite_match" in shown


def test_classify_writes_results_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--method", "lgtm", "--share-plan", "--proportional")
    assert _bigain("classify", "--limit", 5, "--out", out, *options) == 0
    assert [image["index"] for image in _images(out / "results.jsonl")] == list(range(5))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == 5
    assert summary["settings"]["plans"] == "mean"
    assert summary["settings"]["compression"]["method"] == "lgtm"
    assert summary["settings"]["compression"]["proportional"] is True
    low, high = summary["accuracy_interval"]
    assert low <= summary["accuracy"] <= high
    assert f"accuracy {summary['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f})" in capsys.readouterr().out


def test_a_file_of_configs_stands_for_the_options(tmp_path: Path) -> None:
    one, two = IEKVDConfig(alpha=1.1), MixedConfig((IEKVDConfig(alpha=1.1, blocks=(0, 1, 2)), LGTMConfig(blocks=(3,))))
    for name, config in (("one", one), ("two", two)):
        save_config(tmp_path / f"{name}.json", config)
        file = ("--config", tmp_path / f"{name}.json")
        assert _bigain("classify", "--limit", 3, "--out", tmp_path / name, *file) == 0
        assert _bigain("generate", "--images", 2, "--steps", 2, "--out", tmp_path / f"{name} images", *file) == 0
    assert _bigain("classify", "--limit", 3, "--out", tmp_path / "given", "--method", "iekvd", "--alpha", 1.1) == 0
    found = {name: _images(tmp_path / name / "results.jsonl") for name in ("one", "two", "given")}
    assert found["one"] == found["given"] != found["two"]
    for folder in ("two", "two images"):
        written = next(tmp_path.glob(f"{folder}/s*y.json"), tmp_path / folder / "settings.json")
        settings = json.loads(written.read_text())
        settings = settings.get("settings", settings)
        assert settings["compression"] == json.loads(json.dumps(two.settings()))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    given = [part for name in files for part in ("--config", name)]
    assert _bigain("bench", "--batch-size", 1, "--turns", 1, "--out", tmp_path / "bench", *given) == 0
    assert [row["method"] for row in json.loads((tmp_path / "bench" / "rows.json").read_text())][-2:] == files
    # Both jobs share plans where there are some.
    for command in (("classify", "--limit", 3, "--plans", "null"), ("generate", "--images", 2, "--share-plan")):
        out = ("--out", tmp_path / command[0])
        assert _bigain(*command, *out, "--config", tmp_path / "two.json") == 0
        assert _bigain(*command, *out, "--overwrite", "--config", tmp_path / "one.json") == BAD_INPUT


def test_resume_gives_the_results_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _bigain("classify", "--limit", 6, "--out", whole) == 0
    assert _bigain("classify", "--limit", 2, "--out", parts) == 0
    assert _bigain("classify", "--limit", 6, "--out", parts, "--resume") == 0
    assert "2 images classified before" in capsys.readouterr().out
    first, second = _images(whole / "results.jsonl"), _images(parts / "results.jsonl")
    assert [i["prediction"] for i in first] == [i["prediction"] for i in second]
    for a, b in zip(first, second, strict=True):
        assert a["errors"] == pytest.approx(b["errors"], rel=1e-4)


def test_finished_results_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bigain("classify", "--limit", 1, "--out", tmp_path) == 0
    assert _bigain("classify", "--limit", 1, "--out", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bigain: out: got")
    assert _bigain("classify", "--limit", 2, "--out", tmp_path, "--resume", "--seed", 1) == 2
    assert "resume: got" in capsys.readouterr().err.splitlines()[-1]
    assert _bigain("classify", "--limit", 2, "--out", tmp_path, "--overwrite", "--seed", 1) == 0


def _digit_folder(root: Path, n: int) -> Path:
    digits = load_digits("test")
    for i in range(n):
        folder = root / str(int(digits.labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generation.to_pixels(digits.images[i : i + 1])[0]).save(folder / f"{i}.png")
    return root


def test_resume_with_a_smaller_limit_reports_that_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bigain("classify", "--limit", 8, "--out", tmp_path) == 0
    capsys.readouterr()
    assert _bigain("classify", "--limit", 4, "--out", tmp_path, "--resume") == 0
    shown = capsys.readouterr().out
    assert "4 images classified before" in shown
    assert "on 4 images; 112 forward evaluations" in shown
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 4
    assert len(_images(tmp_path / "results.jsonl")) == 8


def test_resume_keeps_results_when_files_come_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out, fresh = _digit_folder(tmp_path / "images", 5), tmp_path / "out", tmp_path / "fresh"
    assert _bigain("classify", "--images", images, "--limit", 3, "--out", out) == 0
    _digit_folder(images, 8)
    find_images(images).paths[0].unlink()
    assert _bigain("classify", "--images", images, "--out", out, "--resume") == 0
    assert _bigain("classify", "--images", images, "--out", fresh) == 0
    there = {image["index"] for image in _images(fresh / "results.jsonl")}
    kept = [image for image in _images(out / "results.jsonl") if image["index"] in there]
    for a, b in zip(kept, _images(fresh / "results.jsonl"), strict=True):
        assert a["errors"] == pytest.approx(b["errors"], rel=1e-4)
    assert json.loads((out / "summary.json").read_text())["images"] == 7


def test_resume_takes_a_file_with_other_pixels_for_another_image(tmp_path: Path) -> None:
    images, out = _digit_folder(tmp_path / "images", 3), tmp_path / "out"
    assert _bigain("classify", "--images", images, "--out", out) == 0
    before = _images(out / "results.jsonl")
    changed, other = find_images(images).paths[:2]
    changed.write_bytes(other.read_bytes())
    assert _bigain("classify", "--images", images, "--out", out, "--resume") == 0
    after = _images(out / "results.jsonl")
    assert len(after) == 4
    assert all(image in after for image in before)
    assert json.loads((out / "summary.json").read_text())["images"] == 3


def test_resume_refuses_another_set_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The shipped model has its own classes; here it stands for one that is asked about the folder's.
    images, out = _digit_folder(tmp_path / "images", 3), tmp_path / "out"
    assert _bigain("classify", "--images", images, "--out", out) == 0
    content = (out / "results.jsonl").read_text()
    found = json.loads(content.splitlines()[0])["settings"]["class_names"]
    (out / "results.jsonl").write_text(content.replace(found, "0" * 16))
    assert _bigain("classify", "--images", images, "--out", out, "--resume") == 2
    assert "class_names" in capsys.readouterr().err.splitlines()[-1]


def test_interrupted_classification_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = ResultsFile.add

    def stop_after_three(self: ResultsFile, image: ImageResult) -> None:
        add(self, image)
        if len(self.images) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultsFile, "add", stop_after_three)
    assert _bigain("classify", "--limit", 6, "--out", tmp_path) == INTERRUPTED == 130
    assert len(_images(tmp_path / "results.jsonl")) == 3
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 3
    monkeypatch.undo()
    assert _bigain("classify", "--limit", 6, "--out", tmp_path, "--resume") == 0
    assert [image["index"] for image in _images(tmp_path / "results.jsonl")] == list(range(6))
    assert "Traceback" not in capsys.readouterr().err


def test_classify_an_image_folder(tmp_path: Path) -> None:
    _digit_folder(tmp_path / "images", 6)
    assert _bigain("classify", "--images", tmp_path / "images", "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["images"] == 6
    assert summary["accuracy"] >= 4 / 6


def test_generate_writes_images(tmp_path: Path) -> None:
    options = ["--label", "3", "--label", "7", "--images", 5, "--steps", 2, "--guidance", 3, "--method", "tome"]
    assert _bigain("generate", *options, "--share-plan", "--out", tmp_path) == 0
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"{i:05d}_{label}.png" for i, label in enumerate((3, 7, 3, 7, 3))]
    assert (tmp_path / "grid.png").exists()
    assert json.loads((tmp_path / "settings.json").read_text())["labels"] == ["3", "7", "3", "7", "3"]


def test_generated_images_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["generate", "--steps", 1, "--out", tmp_path]
    # A call that is refused leaves nothing behind, and nothing that was there is lost to it.
    assert _bigain(*few, "--method", "todo", "--factor", 100) == 2
    assert _bigain(*few, "--images", 3) == 0
    assert _bigain(*few, "--images", 2) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bigain: out: got")
    assert _bigain(*few, "--overwrite", "--method", "todo", "--factor", 100) == 2
    assert len(list((tmp_path / "samples").iterdir())) == 3
    assert _bigain(*few, "--images", 2, "--overwrite") == 0
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_interrupted_generation_keeps_finished_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, calls = generation.seeded_noise, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noise(*arguments)

    monkeypatch.setattr(generation, "seeded_noise", stop_at_the_third)
    assert _bigain("generate", "--images", 6, "--batch-size", 2, "--steps", 1, "--out", tmp_path) == 130
    assert len(list((tmp_path / "samples").iterdir())) == 4
    assert (tmp_path / "grid.png").exists()


def test_generation_holds_one_batch_and_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_command, "_MOST_IN_GRID", 3)
    grids = []
    monkeypatch.setattr(generation, "save_grid", lambda images, *_: grids.append(len(images)))
    monkeypatch.setattr(generation, "generate", None)  # which returns all
    assert _bigain("generate", "--images", 6, "--batch-size", 2, "--steps", 1, "--out", tmp_path) == 0
    assert grids == [3]
    assert len(list((tmp_path / "samples").iterdir())) == 6


def test_prompts_of_a_file_are_drawn_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image depends on its name and the seed, not on its place; a killed run goes on; others' files are left."""
    file = tmp_path / "prompts.csv"
    file.write_text("path,prompt\n" + "".join(f"val/{i}.jpg,{i % 10}\n" for i in range(4)))
    options = ["generate", "--prompts", file, "--steps", 2, "--batch-size", 2, "--scheduler", "EulerDiscreteScheduler"]
    assert _bigain(*options, "--out", tmp_path / "a") == 0

    def images(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((tmp_path / out / "images" / "val").iterdir())}

    assert list(images("a")) == ["0.png", "1.png", "2.png", "3.png"]
    noise, calls = generation.seeded_noise, []

    def stop_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return noise(*arguments)

    monkeypatch.setattr(generation, "seeded_noise", stop_at_the_second)
    assert _bigain(*options, "--out", tmp_path / "b") == 130
    assert list(images("b")) == ["0.png", "1.png"]
    assert _bigain(*options, "--out", tmp_path / "b") == 0
    assert images("b") == images("a")
    assert len(calls) == 3
    assert _bigain(*options, "--out", tmp_path / "b", "--seed", 1) == 2
    assert "seed 0 there and 1 now" in capsys.readouterr().err
    assert _bigain(*options, "--out", tmp_path) == 2
    assert "with files in it" in capsys.readouterr().err
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[3], lines[4]]))
    assert _bigain(*options, "--out", tmp_path / "c") == 0
    assert images("c") == {name: images("a")[name] for name in ("2.png", "3.png")}


def test_train_tiny_writes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_VALIDATION_TIMESTEPS", (250,))  # logged errors take longer than the training
    options = ["--steps", 2, "--batch-size", 4, "--log-every", 1, "--epochs", 1, "--seed", 5, "--out", tmp_path]
    with torch.enable_grad():
        assert _bigain("train-tiny", *options) == 0
    settings = json.loads((tmp_path / "training.json").read_text())
    assert settings["seed"] == 5
    assert settings["command"].startswith("bigain train-tiny --steps 2 --batch-size 4")
    for name in ("classifier.safetensors", "training_log.csv", "scheduler", "transformer"):
        assert (tmp_path / name).exists()
    assert "test accuracy" in capsys.readouterr().out
    # The recorded command runs, and makes the same model.
    again = tmp_path / "again"
    with torch.enable_grad():
        assert _bigain(*settings["command"].split()[1:], "--out", again) == 0
    assert json.loads((again / "training.json").read_text()) == settings
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_shipped_training_settings_are_what_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(training, "train_classifier", lambda *_: {"test_accuracy": 1.0, "seconds": 0.0})
    monkeypatch.setattr(training, "train_tiny_dit", lambda *_: {"validation_error": 0.0, "seconds": 0.0})
    try:
        assert _bigain("train-tiny", "--out", tmp_path, "--steps", 12000, "--seed", 0, "--threads", 1) == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / "training.json").read_text())
    shipped = json.loads((TINY_DIT / "training.json").read_text())
    versions = {name: shipped[name] for name in ("torch", "diffusers")}
    assert list((written | versions).items()) == list(shipped.items())


def test_version_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert _bigain("--version") == 0
    assert capsys.readouterr().out == f"bigain_kernels {bigain_kernels.__version__}\n"
    found = CliRunner().invoke(
        make_app(), env={"_BIGAIN_COMPLETE": "complete_bash", "COMP_WORDS": "bigain cl", "COMP_CWORD": "1"}
    )
    assert found.output.split() == ["classify"]
    assert _bigain("--help") == 0
    assert "fewer tokens" in capsys.readouterr().out


SMALL_DEMO = ["demo", "--model", "digits", "--frontier-images", 2, "--threads", 1, "--no-real-size"]


def test_demo_shows_its_tables_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", 4, "--samples", 3, "--steps", 1, "--no-pictures", "--out", tmp_path]
    assert _bigain(*SMALL_DEMO, *small) == 0
    shown = capsys.readouterr().out
    for point in points_of():
        assert point.title in shown
    assert "…" not in shown
    assert shown.count("±") > len(points_of())
    assert "Both jobs: DiT of 64 tokens" in shown
    for name in ("results.csv", "results.json", "README.md"):
        assert (tmp_path / name).exists()


def test_interrupted_demo_shows_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Jobs, "_classify", stop)
    few = ["--images", 2, "--samples", 3, "--no-pictures"]
    assert _bigain(*SMALL_DEMO, *few, "--out", tmp_path) == 130
    assert "Both jobs" in capsys.readouterr().out
    assert (tmp_path / "results.csv").exists()
    monkeypatch.setattr(demo.Jobs, "generate", stop)
    early = tmp_path / "early"
    assert _bigain(*SMALL_DEMO, *few, "--out", early) == 130
    assert "L-GTM 0.5" in (early / "README.md").read_text()
    assert "Both jobs" not in (early / "README.md").read_text()
    monkeypatch.setattr(demo.Demo, "run", stop)
    empty = tmp_path / "empty"
    assert _bigain(*SMALL_DEMO, *few, "--out", empty) == 130
    assert not empty.exists()


def _started(command: list[str]) -> subprocess.Popen[str]:
    """A command as a terminal starts it: a shell that runs tests in the background lets them ignore Ctrl-C."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_what_an_interrupted_import_raises_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries that Ctrl-C hits while they are imported end in errors of their own."""
    import bigain_command
    from bigain_kernels.cli import main as module

    def broken() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RecursionError("half an import") from None
        return 0

    monkeypatch.setattr(module, "main", broken)
    # A shell has its background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert bigain_command.main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "bigain: interrupted\n"


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.2])
def test_ctrl_c_while_it_starts(seconds: float, tmp_path: Path) -> None:
    """The first seconds go into imports."""
    started = (
        "import sys, bigain_command; print('started', flush=True); sys.argv[1:] = ['classify', '--out', sys.argv[1]]; "
        "sys.exit(bigain_command.main())"
    )
    process = _started([sys.executable, "-c", started, str(tmp_path / "out")])
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigain_kernels.cli.main", "classify", "--threads", "1", "--batch-size", "40"]
    process = _started([*command, "--out", str(tmp_path)])
    results, deadline = tmp_path / "results.jsonl", time.monotonic() + 60
    while not (results.exists() and len(results.read_bytes().splitlines()) > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "results in" in out
    assert 2 <= len(_images(results)) < 400
