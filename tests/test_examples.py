"""The examples run, on their tiny models, in this process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each says, and what it needs.
SAYS = {
    "generate.py": "Flux: 2 layers compressed",
    "classify_folder.py": "accuracy",
    "video.py": "2 layers attend to 72 of 288 keys",
    "train_lora.py": "parameters, loss",
    "serve.py": "request 2",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("tiny", None)


def test_all_are_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "tiny.py"}


@pytest.mark.parametrize("name", SAYS)
def test_runs(name, monkeypatch, capsys):
    if name == "train_lora.py":
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [name])
    ended: list = []
    monkeypatch.setattr(sys, "exit", ended.append)
    with torch.enable_grad():  # as a script has it
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ended in ([], [0])
    assert SAYS[name] in capsys.readouterr().out


def test_the_notebook(monkeypatch):
    """Its cells, one after another, drawn without a screen."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    notebook = json.loads((EXAMPLES / "merge_maps.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), "merge_maps.ipynb", "exec"), names)
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert all(plan.num_slots < plan.num_tokens for plan in names["plans"].values())
