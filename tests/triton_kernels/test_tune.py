"""What can be said of tuning without a GPU and without the interpreter; check_tune.py runs the kernels."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels.triton_kernels import configs, tune


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_files_are_written_as_they_are_shipped(architecture):
    text = configs.path_of(architecture).read_text()
    assert tune.dump(json.loads(text)) == text


def test_the_geometric_mean_decides():
    assert tune.best([[1.0, 4.0, 2.0], [100.0, 20.0, 45.0]]) == 1
    assert tune.best([[1.0, 1.0]]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path / "new.json")]) == 2
    assert "found no GPU" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_json_is_alone_on_stdout(monkeypatch, capsys, tmp_path):
    """With what asks for a GPU in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")

    def measured(table, device, note, log):
        log("token_merge: 1.0, 2.0 us")
        return {**table, "note": note}

    monkeypatch.setattr(tune, "tune", measured)
    for arguments in (["--json"], []):
        assert tune.main(["--out", str(tmp_path / "new.json"), *arguments]) == 0
        shown = capsys.readouterr()
        times, found = (shown.err, shown.out) if arguments else (shown.out, shown.err)
        assert times == f"token_merge: 1.0, 2.0 us\nwrote {tmp_path / 'new.json'}\n"
        assert found == ((tmp_path / "new.json").read_text() if arguments else "")
    assert json.loads((tmp_path / "new.json").read_text())["note"].startswith("measured on a GPU")


@pytest.mark.parametrize("name", ["aot", "tune"])
def test_the_commands_say_what_is_missing(name, monkeypatch, capsys):
    command = importlib.import_module(f"bigain_kernels.{name}")
    monkeypatch.setattr(command, "TRITON", command.TRITON._replace(missing="Triton is not installed"))
    assert command.main([]) == 2
    assert capsys.readouterr().err == f"{name}: Triton is not installed\n"


def test_a_chooser_decides_inside_its_block_alone():
    class First(configs.Chooser):
        def pick(self, op, device, size):
            return {"BLOCK": 1}

    device, before = torch.device("cpu"), configs.pick("token_merge", torch.device("cpu"), 0)
    with configs.use_chooser(First()):
        assert configs.pick("token_merge", device, 0) == {"BLOCK": 1}
        assert configs.route("kv_downsample_attention", device, 0) in tune.ROUTES
    assert configs.pick("token_merge", device, 0) == before
