"""What can be said of tuning without a GPU and without the interpreter; check_tune.py runs the kernels."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from bigain_kernels import tune
from bigain_kernels.triton_kernels import configs


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
