"""What commands write: one writer, whole files, nothing of anybody else's, and no result that nobody measured."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bigain_kernels.cli.main import BAD_INPUT, main
from bigain_kernels.evaluation.checkpoints import TINY_DIT, load_checkpoint
from bigain_kernels.evaluation.output import LIST, OutputFolder, replacing

FEW = ["--limit", "3", "--stages", "1:1"]


def bigain(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three images."""
    out = tmp_path_factory.mktemp("finished")
    assert bigain("classify", *FEW, "--out", out) == 0
    return out


Change = Callable[[list[Any]], Any]


def put(name: str, value: Any, line: int = 1) -> Change:
    return lambda lines: lines[line].update({name: value})


def drop(name: str) -> Change:
    return lambda lines: lines[1].pop(name)


def errors(change: Callable[[list[float]], Any]) -> Change:
    return lambda lines: change(lines[1]["errors"])


# What was done to the lines (the settings first), and what the message says of it.
TAMPERED: dict[str, tuple[Change, str]] = {
    "a line twice": (lambda lines: lines.append(lines[1]), "a second time"),
    "a line contradicted": (lambda lines: lines.append({**lines[1], "prediction": 3}), "a second time"),
    "another image's index": (put("index", 1), "a second time"),
    "index below 0": (put("index", -1), "index is -1"),
    "index a fraction": (put("index", 0.5), "index is 0.5"),
    "index a truth": (put("index", True), "index is True"),
    "index in words": (put("index", "0"), "index is '0'"),
    "index none": (put("index", None), "index is None"),
    "label beyond": (put("label", 10), "label is 10"),
    "label below 0": (put("label", -1), "label is -1"),
    "label a fraction": (put("label", 2.0), "label is 2.0"),
    "label a list": (put("label", [1]), "label is [1]"),
    "label of another class": (lambda lines: lines[1].update(label=(lines[1]["label"] + 1) % 10), "its class"),
    "prediction beyond": (put("prediction", 10), "prediction is 10"),
    "prediction below 0": (put("prediction", -3), "prediction is -3"),
    "prediction huge": (put("prediction", 10**30), "prediction is 1"),
    "prediction a truth": (put("prediction", False), "prediction is False"),
    "evaluations below 0": (put("evaluations", -36), "evaluations is -36"),
    "evaluations a fraction": (put("evaluations", 1.5), "evaluations is 1.5"),
    "seconds below 0": (put("seconds", -1.0), "seconds is -1.0"),
    "seconds NaN": (put("seconds", float("nan")), "seconds is nan"),
    "seconds infinite": (put("seconds", float("inf")), "seconds is inf"),
    "seconds in words": (put("seconds", "fast"), "seconds is 'fast'"),
    "errors NaN": (errors(lambda e: e.__setitem__(0, float("nan"))), "errors is nan"),
    "errors infinite": (errors(lambda e: e.__setitem__(0, float("inf"))), "errors is inf"),
    "errors below 0": (errors(lambda e: e.__setitem__(0, -0.1)), "errors is -0.1"),
    "errors in words": (errors(lambda e: e.__setitem__(0, "small")), "errors is 'small'"),
    "errors nested": (errors(lambda e: e.__setitem__(0, [0.1])), "errors is [0.1]"),
    "errors too few": (errors(lambda e: e.pop()), "errors has 9 values"),
    "errors too many": (errors(lambda e: e.append(0.1)), "errors has 11 values"),
    "errors none": (put("errors", []), "errors has 0 values"),
    "errors a number": (put("errors", 0.1), "errors is no list"),
    "errors a table": (put("errors", {}), "errors is no list"),
    "no index": (drop("index"), "its names"),
    "no errors": (drop("errors"), "its names"),
    "no seconds": (drop("seconds"), "its names"),
    "one name more": (put("note", "mine"), "its names"),
    "a line of a list": (lambda lines: lines.insert(1, [1, 2]), "its names"),
    "a line of a number": (lambda lines: lines.insert(2, 7), "its names"),
    "a line of null": (lambda lines: lines.append(None), "its names"),
    "settings twice": (lambda lines: lines.insert(1, lines[0]), "its names"),
    "settings gone": (lambda lines: lines.pop(0), "line 1"),
    "settings a list": (lambda lines: lines[0].update(settings=[]), "no settings"),
    "settings and more": (lambda lines: lines[0].update(index=1), "no settings"),
    "other seed": (lambda lines: lines[0]["settings"].update(seed=1), "seed 1 there and 0 now"),
    "other weights": (lambda lines: lines[0]["settings"].update(weights="0"), "weights '0' there"),
    "no weights": (lambda lines: lines[0]["settings"].pop("weights"), "weights None there"),
    "one setting more": (lambda lines: lines[0]["settings"].update(mode=1), "mode 1 there and None now"),
}
# The same of the bytes.
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a name twice": (lambda b: b.replace(b'"label"', b'"index": 0, "label"', 1), "a name stands twice"),
    "half a line within": (lambda b: b.replace(b'"seconds"', b"\n", 1), "line 2"),
    "an empty line": (lambda b: b.replace(b"\n", b"\n\n", 1), "line 2"),
    "no UTF-8": (lambda b: b.replace(b'"label"', b'"\xff"', 1), "line 2"),
    "zeros": (lambda b: b[:300] + bytes(200) + b[500:], "line"),
    "nested": (lambda b: b + b"[" * 100_000 + b"\n", "line 5"),
    "another file": (lambda b: b"GIF89a\n", "line 1"),
}


def test_the_tables_are_long_enough() -> None:
    assert len(TAMPERED) + len(BYTES) >= 40


def tamper(path: Path, change: Change) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", [*TAMPERED, *BYTES])
def test_tampered_results_are_refused(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    path = out / "results.jsonl"
    if name in TAMPERED:
        tamper(path, TAMPERED[name][0])
    else:
        path.write_bytes(BYTES[name][0](path.read_bytes()))
    before, summary = path.read_bytes(), (out / "summary.json").read_bytes()
    assert bigain("classify", *FEW, "--out", out, "--resume") == BAD_INPUT
    line = last_line(capsys)
    assert line.startswith("bigain: resume: got ")
    assert str(path) in line
    assert {**TAMPERED, **BYTES}[name][1] in line
    assert path.read_bytes() == before
    assert (out / "summary.json").read_bytes() == summary


def test_half_a_line_at_the_end_is_what_a_kill_leaves(finished: Path, tmp_path: Path) -> None:
    def read(path: Path) -> list[tuple[int, ...]]:
        lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()[1:]]
        return [(line["index"], line["label"], line["prediction"]) for line in lines]

    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes()[:-30])
    assert bigain("classify", *FEW, "--out", out, "--resume") == 0
    assert read(out) == read(finished)


@pytest.mark.parametrize("command", ["classify", "generate"])
def test_two_writers(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another process holds the folder; when it is killed, the folder is free."""
    code = (
        "import sys, time; from pathlib import Path; from bigain_kernels.evaluation.output import OutputFolder\n"
        "with OutputFolder(Path(sys.argv[1]), (), again=True): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    few = FEW if command == "classify" else ["--images", "1", "--steps", "1"]
    assert bigain(command, *few, "--out", tmp_path) == BAD_INPUT
    assert last_line(capsys) == (f"bigain: out: got {tmp_path}, which another run writes to, expected another folder")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert bigain(command, *few, "--out", tmp_path) == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_DIT, tmp_path / "model"))


def test_other_weights_under_the_same_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["classify", "--checkpoint", model, "--out", tmp_path / "out"]
    assert bigain(*call, "--limit", 1, "--stages", "1:1") == 0
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["proj_out_2.bias"] += 1e-3
    save_file(state, path)
    assert bigain(*call, *FEW, "--resume") == BAD_INPUT
    assert "weights '" in last_line(capsys)


def test_the_hash_sees_weights_dtype_and_schedule(model: Path) -> None:
    first = load_checkpoint(model).fingerprint()
    assert load_checkpoint(model).fingerprint() == first
    assert load_checkpoint(model, dtype=torch.bfloat16).fingerprint() != first
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"num_train_timesteps": 1000', '"num_train_timesteps": 999'))
    assert load_checkpoint(model).fingerprint() != first


def test_overwriting_leaves_no_summary_of_what_is_gone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed after its first image has no summary, least of all the old one."""
    from bigain_kernels.evaluation.records import ResultsFile

    out, add = Path(shutil.copytree(finished, tmp_path / "out")), ResultsFile.add

    def killed(self: ResultsFile, image: Any) -> None:
        add(self, image)
        assert not (out / "summary.json").exists()

    monkeypatch.setattr(ResultsFile, "add", killed)
    assert bigain("classify", *FEW, "--out", out, "--overwrite", "--seed", 1) == 0
    assert json.loads((out / "summary.json").read_text())["settings"]["seed"] == 1


FOREIGN = [
    (["generate", "--images", "1", "--steps", "1"], "grid.png"),
    (["generate", "--images", "1", "--steps", "1"], "settings.json"),
    (["generate", "--images", "1", "--steps", "1"], "samples/00000_0.png"),
    (["generate", "--images", "1", "--steps", "1"], "samples/holiday.png"),
    (["classify", *FEW], "summary.json"),
    (["classify", *FEW], "results.jsonl"),
    (["train-tiny", "--steps", "1", "--epochs", "0"], "training.json"),
    (["train-tiny", "--steps", "1", "--epochs", "0"], "transformer/config.json"),
    (["train-tiny", "--steps", "1", "--epochs", "0"], "transformer/diffusion_pytorch_model.safetensors"),
    (["demo", "--model", "digits", "--images", "10", "--steps", "1"], "README.md"),
    (["demo", "--model", "digits", "--images", "10", "--steps", "1"], "results.csv"),
    (["demo", "--model", "digits", "--images", "10", "--steps", "1"], "photographs/cat.png"),
]


@pytest.mark.parametrize(("command", "name"), FOREIGN, ids=lambda value: value if isinstance(value, str) else value[0])
@pytest.mark.parametrize("asked", [False, True])
def test_files_of_others_are_left_alone(
    command: list[str], name: str, asked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("somebody's")
    assert bigain(*command, "--out", tmp_path, *(["--overwrite"] if asked else [])) == BAD_INPUT
    assert f"with {name}, which bigain did not write there" in last_line(capsys)
    assert path.read_text() == "somebody's"


def test_a_command_leaves_the_results_of_another_in_the_same_folder(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {name: (out / name).read_bytes() for name in ("results.jsonl", "summary.json")}
    assert bigain("generate", "--out", out, "--images", 1, "--steps", 1) == 0
    assert bigain("generate", "--out", out, "--images", 1, "--steps", 1, "--overwrite") == 0
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("listed", ["../mine.txt", "samples/../../mine.txt", "notes.txt", "{}/mine.txt"])
def test_a_list_that_came_with_the_folder_removes_nothing_else(listed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    kept = [tmp_path / "mine.txt", out / "notes.txt"]
    for path in kept:
        path.write_text("mine")
    (out / LIST).write_text(listed.format(tmp_path) + "\n")
    with OutputFolder(out, ("settings.json", "samples/*"), again=True) as output:
        output.clear()
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_list_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / LIST
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^out: got {tmp_path} with {LIST} that cannot be read"):
        OutputFolder(tmp_path, ("settings.json",), again=True).__enter__()
    assert path.exists()


def test_a_folder_in_the_place_of_a_file_of_ours_is_not_ours(tmp_path: Path) -> None:
    names = ("settings.json", "grid.png")
    with OutputFolder(tmp_path, names, again=False) as output:
        output.write_text("settings.json", "{}")
        output.claim("grid.png").mkdir()
    with (
        pytest.raises(ValueError, match=r"with grid\.png, which bigain did not write there"),
        OutputFolder(tmp_path, names, again=True) as output,
    ):
        output.clear()
    assert (tmp_path / "settings.json").exists()


def test_overwriting_removes_what_is_ours_alone(tmp_path: Path) -> None:
    few = ["generate", "--steps", "1", "--out", tmp_path]
    assert bigain(*few, "--images", 3) == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert bigain(*few, "--images", 1) == BAD_INPUT
    assert bigain(*few, "--images", 1, "--overwrite") == 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["00000_0.png"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", [["classify", *FEW], ["generate", "--images", "1"], ["train-tiny"], ["demo"]])
def test_a_folder_that_cannot_be_written_to(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert bigain(*command, "--out", out) == BAD_INPUT
        assert last_line(capsys).startswith(f"bigain: out: got {out}")


def test_a_full_disk_shows_at_the_start(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; the probe is larger than it."""
    run = subprocess.run(
        [sys.executable, "-m", "bigain_kernels.cli.main", "classify", *FEW, "--out", str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == BAD_INPUT
    assert run.stderr.startswith(f"bigain: out: got {tmp_path}, expected a folder that can be written to")
    assert not list(tmp_path.glob("*.json*"))


def test_a_reader_that_goes_away_ends_no_work(tmp_path: Path) -> None:
    assert bigain("classify", "--limit", 1, "--stages", "1:1", "--out", tmp_path) == 0
    run = subprocess.Popen(
        [sys.executable, "-m", "bigain_kernels.cli.main", "classify", *FEW, "--resume", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    stderr = run.stderr.read()
    assert run.wait() == 0, stderr
    assert "Traceback" not in stderr
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--guidance", "inf"], "guidance: got inf"),
        (["--guidance", "nan"], "guidance: got nan"),
        (["--guidance", "1e38"], "guidance: got 1e+38"),
        (["--method", "iekvd", "--alpha", "1e38"], "samples: got values that are not finite"),
        (["--method", "iekvd", "--alpha", "inf"], "alpha: got inf"),
        (["--steps", str(10**12)], "steps: got"),
        (["--images", str(10**12)], "images: got"),
        (["--batch-size", str(10**12)], "batch_size: got"),
        (["--threads", str(10**12)], "threads: got"),
        (["--label", "dog"], "label: got class 'dog'"),
    ],
)
def test_generation_that_makes_no_picture_says_so(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--images", "2", "--steps", "2"]
    assert bigain("generate", *few, *options, "--out", tmp_path) == BAD_INPUT
    assert named in last_line(capsys)
    assert not (tmp_path / "grid.png").exists()


def test_weights_that_overflow_make_no_black_pictures(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["proj_out_2.weight"] *= 1e38
    save_file(state, path)
    out = tmp_path / "out"
    assert bigain("generate", "--checkpoint", model, "--images", 1, "--steps", 2, "--out", out) == BAD_INPUT
    assert "samples: got values that are not finite" in last_line(capsys)
    assert bigain("classify", "--checkpoint", model, *FEW, "--out", out) == BAD_INPUT
    assert "denoising error: got" in last_line(capsys)


def test_training_that_diverges_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["train-tiny", "--steps", "40", "--epochs", "0", "--warmup", "1", "--batch-size", "2"]
    assert bigain(*few, "--learning-rate", "1e30", "--out", tmp_path) == BAD_INPUT
    assert "learning_rate: got 1e+30" in last_line(capsys)
    with torch.enable_grad():
        assert bigain(*few, "--learning-rate", "1000", "--weight-decay", "1000", "--out", tmp_path) == BAD_INPUT
    assert "loss: got" in last_line(capsys)


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as part:
        part.write_text("old")

    def stopped() -> None:
        with replacing(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_the_list_of_ours_survives_a_kill(tmp_path: Path) -> None:
    """A file is listed before it is written, so that one that is there is known."""
    with OutputFolder(tmp_path, ("*.txt",), again=False) as output:
        path = output.claim("a.txt")
        assert (tmp_path / LIST).read_text() == "a.txt\n"
        path.write_text("")
    with OutputFolder(tmp_path, ("*.txt",), again=True) as output:
        output.clear()
    assert not path.exists()


def test_out_of_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigain_kernels.evaluation import generate as module

    def starve(*arguments: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(module, "_generate_batch", starve)
    assert bigain("generate", "--images", 1, "--steps", 1, "--out", tmp_path) == BAD_INPUT
    assert last_line(capsys).startswith("bigain: batch_size: got out of memory")


@pytest.mark.parametrize("command", ["classify", "generate"])
def test_kills_at_any_moment_leave_something_to_go_on_with(command: str, tmp_path: Path) -> None:
    few = ["--limit", "40", "--stages", "1:1"] if command == "classify" else ["--images", "40", "--batch-size", "1"]
    call = [sys.executable, "-m", "bigain_kernels.cli.main", command, *few, "--out", str(tmp_path)]
    again = "--resume" if command == "classify" else "--overwrite"
    for moment in (2.0, 2.6):
        run = subprocess.Popen([*call, again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        run.kill()
        run.wait()
        for path in tmp_path.rglob("*.png"):
            with Image.open(path) as image:
                image.load()
    if command == "classify":
        assert bigain(command, *few, "--out", tmp_path, again) == 0
        assert json.loads((tmp_path / "summary.json").read_text())["images"] == 40
    else:
        assert bigain(command, "--images", 1, "--steps", 1, "--out", tmp_path, again) == 0
        assert len(list((tmp_path / "samples").iterdir())) == 1
