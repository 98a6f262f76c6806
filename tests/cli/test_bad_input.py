"""Bad input ends with one line on stderr that names the argument, exit code 2, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bigain_kernels import env as environment
from bigain_kernels.backends import BackendUnavailable
from bigain_kernels.cli.main import BAD_INPUT, main

WRONG = [
    (["bogus"], "bogus"),
    (["classify", "--nonsense"], "--nonsense"),
    (["classify", "--limit"], "--limit"),
    (["classify", "--limit", "many"], "--limit"),
    (["classify", "--limit", "0"], "limit: got 0"),
    (["classify", "--method", "magic"], "method: got 'magic'"),
    (["classify", "--method", "lgtm", "--ratio", "0.9"], "ratio: got 0.9"),
    (["classify", "--method", "lgtm", "--ratio", "-0.1"], "ratio: got -0.1"),
    (["classify", "--method", "tome", "--ratio", "half"], "ratio: got 'half'"),
    (["classify", "--method", "abm", "--ratio", "0.1,0.2,0.3"], "ratio: got '0.1,0.2,0.3'"),
    (["classify", "--method", "lgtm", "--stride", "0"], "stride: got"),
    (["classify", "--method", "lgtm", "--stride", "2x2x2"], "stride: got '2x2x2'"),
    (["classify", "--method", "lgtm", "--blocks", "first"], "blocks: got 'first'"),
    (["classify", "--method", "lgtm", "--blocks", "99", "--limit", "1"], "blocks: got"),
    (["classify", "--method", "todo", "--factor", "0"], "factor: got (0, 0)"),
    (["classify", "--method", "iekvd", "--alpha", "x"], "alpha: got 'x'"),
    (["classify", "--method", "iekvd", "--alpha", "nan"], "alpha: got nan"),
    (["classify", "--method", "iekvd", "--share-plan"], "share_plan: got method iekvd"),
    (["classify", "--method", "iekvd", "--proportional"], "proportional: got True with method iekvd"),
    (["generate", "--proportional"], "proportional: got True with method none"),
    (["classify", "--timesteps", "noon"], "timesteps: got 'noon'"),
    (["classify", "--timesteps", "1000"], "timesteps: got 1000"),
    (["classify", "--stages", "2"], "stages: got '2'"),
    (["classify", "--stages", "2:4"], "stages: got"),
    (["classify", "--stages", "999999999:1"], "stages: got 999999999 samples"),
    (["classify", "--stages", "2:11,3:1"], "stages: got keep 11"),
    (["classify", "--score", "median"], "score: got 'median'"),
    (["classify", "--seed", "-1"], "seed: got -1"),
    (["classify", "--batch-size", "0"], "batch_size: got 0"),
    (["classify", "--method", "lgtm", "--share-plan", "--batch-size", "9"], "batch_size: got 9"),
    (["classify", "--method", "none", "--share-plan"], "share_plan: got method none"),
    (["classify", "--plans", "null"], "plans: got method none"),
    (["classify", "--resume", "--overwrite"], "resume: got --overwrite"),
    (["classify", "--device", "abacus"], "device: got 'abacus'"),
    *(
        (["classify", "--device", name], f"device: got '{name}'")
        for name in ("xpu", "meta", "vulkan", "hpu", "cuda:77")
    ),
    (["classify", "--dtype", "int8"], "dtype: got 'int8'"),
    (["classify", "--threads", "0"], "threads: got 0"),
    (
        ["classify", "--checkpoint", "nowhere"],
        "nowhere, expected tiny-dit, mnist-unet, mnist-dit, a folder or a hub id",
    ),
    (["classify", "--images", "nowhere"], "images: got nowhere"),
    (["generate", "--images", "0"], "images: got 0"),
    (["generate", "--guidance", "0.5"], "guidance: got 0.5"),
    (["generate", "--steps", "0"], "steps: got 0"),
    (["generate", "--steps", "2000"], "steps: got 2000"),
    (["generate", "--method", "none", "--share-plan"], "share_plan: got method none"),
    (["generate", "--device", "meta"], "device: got 'meta'"),
    (["generate", "--label", "cat"], "label: got class 'cat'"),
    (["generate", "--label", "10"], "label: got class '10'"),
    (["generate", "--label", "²"], "label: got class '²'"),
    (["generate", "--label", "a\x1b[2J\nb$"], "label: got class 'a\\x1b[2J\\nb$'"),
    (["classify", "--skip-damaged"], "skip_damaged: got it without --images"),
    (["generate", "--batch-size", "0"], "batch_size: got 0"),
    (["generate", "--method", "todo", "--share-plan"], "share_plan: got method todo"),
    (["generate", "--checkpoint", "nowhere"], "checkpoint: got nowhere"),
    (["classify", "--config", "nowhere", "--method", "lgtm"], "config: got nowhere with --method lgtm"),
    (["generate", "--config", "nowhere", "--max-downsample", "2"], "config: got nowhere with --max-downsample"),
    (["generate", "--config", "nowhere"], "config: got nowhere, expected a file of save_config or bigain search"),
    (["bench", "--turns", "0"], "turns: got 0, expected at least 1"),
    (["bench", "--batch-size", "0"], "bigain: batch_size: got 0, expected at least 1"),
    (["search"], "speed: got None with error None"),
    (["search", "--speed", "2", "--error", "0.1"], "speed: got 2.0 with error 0.1"),
    (["search", "--speed", "1"], "speed: got 1.0, expected more than 1"),
    (["search", "--speed", "nan"], "speed: got nan"),
    (["search", "--error", "0"], "error: got 0.0"),
    (["search", "--speed", "1.3", "--per", "layer"], "per: got 'layer'"),
    (["search", "--speed", "1.3", "--methods", "magic"], "bigain: methods: got 'magic', expected some of ['"),
    (["search", "--speed", "1.3", "--methods", "none"], "methods: got 'none', expected some of ['"),
    (["search", "--speed", "1.3", "--ratios", "half"], "ratios: got 'half'"),
    (["search", "--speed", "1.3", "--ratios", "0.9"], "ratio: got 0.9"),
    (["search", "--speed", "1.3", "--factors", "2.5"], "factors: got '2.5'"),
    (["search", "--speed", "1.3", "--factors", "2,1x"], "factors: got '1x', expected a whole number or ROWSxCOLUMNS"),
    (["search", "--speed", "1.3", "--factors", "1x2x2"], "factors: got '1x2x2', expected a whole number"),
    (["search", "--speed", "1.3", "--alphas", "nan"], "alpha: got nan"),
    (["search", "--speed", "1.3", "--calibration", "1"], "calibration: got 1"),
    (["search", "--speed", "1.3", "--held-out", "999"], "held_out: got 999, expected at most 400"),
    (["search", "--speed", "1.3", "--timesteps", "1000"], "timesteps: got [1000]"),
    (["search", "--speed", "1.3", "--timesteps", "5,5"], "timesteps: got [5, 5]"),
    (["search", "--speed", "1.3", "--batch-size", "1"], "batch_size: got 1"),
    (["search", "--speed", "1.3", "--seed", "-1"], "seed: got -1"),
    (["search", "--speed", "1.3", "--resume", "--overwrite"], "resume: got --overwrite"),
    (["search", "--speed", "1.3", "--images", "nowhere"], "images: got nowhere"),
    (["demo", "--images", "0"], "images: got 0"),
    (["demo", "--images", "401"], "images: got 401"),
    (["demo", "--minutes", "-1"], "minutes: got -1.0"),
    (["demo", "--samples", "1"], "samples: got 1"),
    (["demo", "--threads", "0"], "threads: got 0"),
    (["demo", "--frontier-images", "1"], "frontier_images: got 1"),
    (["demo", "--model", "vae"], "bigain: model: got 'vae', expected one of"),
    (["demo", "--model", "dit", "--checkpoint", "nowhere"], "checkpoint: got nowhere"),
    (["demo", "--checkpoint", "nowhere"], "checkpoint: got one for ['unet', 'dit']"),
    (["reproduce", "sd2-pets"], "bigain: data: got none, expected the folder of the data set: --data"),
    (["train-tiny", "--steps", "0"], "steps: got 0"),
    (["train-tiny", "--batch-size", "0"], "batch_size: got 0"),
    (["train-tiny", "--log-every", "0"], "log_every: got 0"),
    (["train-tiny", "--epochs", "-1"], "epochs: got -1"),
    (["train-tiny", "--threads", "-1"], "threads: got -1"),
    (["train-tiny", "--model", "vae"], "model: got 'vae'"),
    (["train-tiny", "--model", "unet", "--steps", "3"], "steps: got 3"),
    (["train-tiny", "--model", "unet", "--log-every", "0"], "log_every: got 0"),
    (["train-tiny", "--model", "dit", "--resume", "--overwrite"], "resume: got --overwrite"),
    (["train-tiny", "--stages", "8:1:2"], "stages: got 8:1:2"),
    (["train-tiny", "--resume"], "resume: got True"),
    (["train-tiny", "--model", "dit", "--resume", "--state", "x"], "resume: got --state"),
    (["train-tiny", "--model", "dit", "--state", "nowhere"], "state: got no nowhere"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_one_line_names_the_argument(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == BAD_INPUT == 2
    captured = capsys.readouterr()
    last = captured.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("bigain: ")
    assert named in last
    assert "Traceback" not in captured.err
    # A progress bar may stand above the line; results may not.
    assert captured.out == ""
    # Nothing is left that the next call would take for results.
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "training" not in path.name]


REFUSED = ["--share-plan --batch-size 5", "--blocks 9", "--timesteps 5000", "--stages 2:11,3:1"]


@pytest.mark.parametrize("options", [*(f"--method lgtm {part}" for part in REFUSED), "--method todo --factor 100"])
def test_a_refused_call_leaves_the_folder_free(options: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["classify", "--limit", "1", *out, *options.split()]) == 2
    again = ["--method", "lgtm", "--share-plan", "--batch-size", "50"]
    assert main(["classify", "--limit", "1", *out, *again]) == 0
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert main(["classify", "--limit", "1", "--overwrite", *out, *options.split()]) == 2
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_package_is_named_in_one_line(package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; import bigain_kernels.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'bigain: needs typer and rich: pip install "bigain-kernels[evaluation]"\n'


def test_a_backend_that_lacks_an_op_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> str:
        raise BackendUnavailable("BIGAIN_BACKEND='cpp': has no implementation of merge for cpu tensors")

    monkeypatch.setattr(environment, "report", fail)
    assert main(["env"]) == 2
    assert capsys.readouterr().err == "bigain: BIGAIN_BACKEND='cpp': has no implementation of merge for cpu tensors\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGAIN_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"^limit: got 0"):
        main(["classify", "--limit", "0"])


def test_wrong_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    (broken / "transformer").mkdir(parents=True)
    (broken / "scheduler").mkdir()
    (broken / "transformer" / "config.json").write_text("{")
    (broken / "scheduler" / "scheduler_config.json").write_text("{}")
    assert main(["generate", "--checkpoint", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("bigain: checkpoint: got")
    folder = tmp_path / "images" / "3"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"no image")
    assert main(["classify", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 2
    assert "a.png, expected an image in PNG" in capsys.readouterr().err
