"""Training of the shipped models: deterministic, interruptible, and what is shipped fits the code."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigain_kernels.evaluation import train_tiny
from bigain_kernels.evaluation.checkpoints import TINY_DIT, load_checkpoint, load_classifier
from bigain_kernels.evaluation.data import load_digits, load_photograph
from bigain_kernels.evaluation.train_tiny import (
    TrainConfig,
    describe,
    spread_timesteps,
    train_classifier,
    train_tiny_dit,
)

CONFIG = TrainConfig(steps=4, batch_size=8, warmup=2, log_every=3)


def test_training_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The error is of all validation images: at six timesteps it takes far longer than four steps of training.
    monkeypatch.setattr(train_tiny, "_VALIDATION_TIMESTEPS", (250,))
    weights = []
    for name in ("a", "b"):
        rows: list[dict[str, float]] = []
        with torch.enable_grad():
            last = train_tiny_dit(tmp_path / name, CONFIG, rows.append)
        assert [row["step"] for row in rows] == [3, 4]
        assert rows[-1] == last
        weights.append(load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    with open(tmp_path / "a" / "training_log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3", "4"]
    assert load_checkpoint(tmp_path / "a").denoiser.num_classes == 10


def test_classifier_training_is_deterministic(tmp_path: Path) -> None:
    with torch.enable_grad():
        found = [train_classifier(tmp_path / name, epochs=1)["test_accuracy"] for name in ("a", "b")]
    assert found[0] == found[1] > 0.3


def test_shipped_classifier_is_good(digits) -> None:
    assert (load_classifier()(digits.images).argmax(dim=1) == digits.labels).float().mean() > 0.97


def test_shipped_checkpoint_has_its_command_and_log() -> None:
    settings = json.loads((TINY_DIT / "training.json").read_text())
    assert {"command", *describe(CONFIG)} == set(settings)
    assert settings["command"].startswith("bigain train-tiny --steps 12000 ")
    with open(TINY_DIT / "training_log.csv") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == settings["steps"]
    assert float(rows[-1]["validation_error"]) < float(rows[0]["validation_error"])


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 0"):
        TrainConfig(**{name: 0})


def test_splits_are_disjoint_and_sized() -> None:
    sizes = {split: len(load_digits(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 1197, "validation": 200, "test": 400}
    small = load_digits("test", size=8).images
    assert small.shape == (400, 1, 8, 8)
    assert small.min() >= -1
    assert small.max() <= 1
    with pytest.raises(ValueError, match=r"^split: got 'all'"):
        load_digits("all")
    with pytest.raises(ValueError, match=r"^name: got 'cat\.jpg'"):
        load_photograph("cat.jpg")


def test_timesteps_stay_below_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number that `rand` gives, added to the last stratum in float32, is its end."""
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2.0**-24))
    for n in (1, 12, 64):
        assert spread_timesteps(n, 1000, torch.Generator()).max() == 999
