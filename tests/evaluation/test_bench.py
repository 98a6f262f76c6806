"""`bigain bench`: a table, rows and a picture of a model against the methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bigain_kernels.cli.main import main
from bigain_kernels.evaluation.bench import bench
from bigain_kernels.evaluation.checkpoints import load_checkpoint
from bigain_kernels.methods import LGTMConfig

from ..compat.test_clients import folder_of_a_pipeline


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    assert main(["bench", "--turns", "1", "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((out / "rows.json").read_text())
    assert [row["method"] for row in rows][:3] == ["none", "ToMe", "L-GTM"]
    assert rows[0]["speed"] == 1.0
    assert rows[0]["distance"] == 0.0
    assert all(row["milliseconds"] > 0 and row["memory"] > 0 and row["distance"] > 0 for row in rows[1:])
    assert (out / "table.md").read_text().splitlines()[0].endswith(", 1 turn")
    assert (out / "table.md").read_text().count("\n| ") == len(rows) + 2
    assert Image.open(out / "picture.png").size[0] > 400
    assert main(["bench", "--size", "2", "--out", str(tmp_path / "other")]) == 2
    assert "size: got 2" in capsys.readouterr().err


def test_a_pipeline_that_diffusers_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_a_pipeline(tmp_path / "pipeline")
    out = tmp_path / "bench"
    assert (
        main(["bench", "--checkpoint", str(tmp_path / "pipeline"), "--size", "64", "--turns", "1", "--out", str(out)])
        == 0
    )
    table = (out / "table.md").read_text()
    # What diffusers says of loading goes to the other stream.
    assert capsys.readouterr().out == table
    assert f"{tmp_path / 'pipeline'}, 2 images of 64 x 64, cpu, float32, ratio 0.5" in table.splitlines()[0]
    assert "| method | ms | least to most | speed | memory MiB | denoising error | distance to none |" in table
    rows = json.loads((out / "rows.json").read_text())
    assert {"none", "ToMe", "L-GTM", "L-GTM, proportional", "ABM", "ToDo", "IE-KVD"} == {row["method"] for row in rows}
    assert all(row["memory"] > 0 and row["error"] > 0 and row["distance"] > 0 for row in rows[1:])
    assert Image.open(out / "picture.png").size[0] > 400


def test_nothing_removed_changes_nothing() -> None:
    checkpoint = load_checkpoint()
    images = torch.zeros(1, *checkpoint.image_shape)
    rows = bench(checkpoint, {"none": None, "nothing": LGTMConfig(ratio=0.0)}, images, turns=1)
    assert rows[1].distance == 0.0
    assert rows[1].error == rows[0].error
    with pytest.raises(ValueError, match=r"^methods: got \['L-GTM'\], expected None"):
        bench(checkpoint, {"L-GTM": LGTMConfig()}, images)
