"""Training of the models of MNIST: resumed to the bit, refused where it would be another run, loaded as written."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bigain_kernels.cli.main import main
from bigain_kernels.diffusers import token_compression
from bigain_kernels.evaluation.checkpoints import EMBEDDINGS, SHIPPED, load_checkpoint
from bigain_kernels.evaluation.data import load_mnist
from bigain_kernels.evaluation.mnist_models import (
    FOLDERS,
    SIZES,
    build_mnist_scheduler,
    build_mnist_unet,
    class_embeddings,
    mnist_denoiser,
    resized,
)
from bigain_kernels.evaluation.train_mnist import (
    LOG,
    STATE,
    MnistConfig,
    Run,
    Stage,
    _wrong_labels,
    contrast_loss,
    train_mnist,
)
from bigain_kernels.methods import LGTMConfig

# Images of 8 x 8 pixels: 64 tokens in the U-Net, 16 in the DiT.
FIRST, SECOND = Stage(8, 2, 2), Stage(8, 3, 2, 0.5, 1.0)


def _config(model: str, *stages: Stage) -> MnistConfig:
    return MnistConfig(model=model, stages=stages, log_every=2, warmup=2)


@pytest.fixture(scope="module", params=list(FOLDERS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The kind of model; a training in one go; the same one interrupted within its second stage."""
    kind, folder = request.param, tmp_path_factory.mktemp("mnist")
    whole, parts = folder / "whole", folder / "parts"
    with torch.enable_grad():
        train_mnist(whole, _config(kind, FIRST, SECOND))
        train_mnist(parts, _config(kind, FIRST, replace(SECOND, steps=2)))
        train_mnist(parts, _config(kind, FIRST, SECOND), parts / STATE)
    return kind, whole, parts


def test_an_interrupted_training_ends_as_an_uninterrupted_one(trained: tuple[str, Path, Path]) -> None:
    kind, whole, parts = trained
    for name in (STATE, f"{FOLDERS[kind]}/diffusion_pytorch_model.safetensors"):
        first, second = load_file(whole / name), load_file(parts / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    rows = []
    for folder in (whole, parts):
        with open(folder / LOG) as file:
            rows.append([[row[k] for k in row if "seconds" not in k] for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == ["2", "4", "5"]


def test_a_trained_model_classifies_as_it_was_trained(trained: tuple[str, Path, Path]) -> None:
    kind, whole, _ = trained
    checkpoint = load_checkpoint(whole)
    run = Run(_config(kind, FIRST, SECOND))
    run.average.load_state_dict(load_file(whole / FOLDERS[kind] / "diffusion_pytorch_model.safetensors"))
    images = resized(kind, load_mnist("test").images[:2], SIZES[kind])
    t, labels = torch.tensor([300, 500]), torch.tensor([3, 10])
    expected = mnist_denoiser(kind, run.average, SIZES[kind])(images, t, labels)
    assert torch.equal(checkpoint.denoiser(images, t, labels), expected)
    assert checkpoint.denoiser.num_classes == 10
    with token_compression(checkpoint.denoiser.model, LGTMConfig(ratio=0.5)):
        assert not torch.equal(checkpoint.denoiser(images, t, labels), expected)


def test_a_state_of_another_run_is_refused(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, whole, _ = trained
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes())
    config = _config(kind, FIRST, SECOND)
    for other, named in (
        (replace(config, seed=1), "seed: got 1, expected 0"),
        (replace(config, stages=(FIRST, replace(SECOND, contrast=0.0))), "stages: got "),
        (replace(config, stages=(FIRST,)), "stages: got "),
        (replace(config, model="dit" if kind == "unet" else "unet"), "model: got "),
    ):
        with pytest.raises(ValueError, match=f"^{named}"):
            train_mnist(tmp_path, other, tmp_path / STATE)
    with pytest.raises(FileNotFoundError, match=r"^state: got no "):
        train_mnist(tmp_path, config, tmp_path / "nothing")
    tensors = load_file(tmp_path / STATE)
    save_file({key: tensors[key] for key in list(tensors)[1:]}, tmp_path / STATE, {"run": "{}"})
    with pytest.raises(ValueError, match=r"^state: got .*, expected the state of such a run"):
        train_mnist(tmp_path, config, tmp_path / STATE)


def test_contrast_fades_once_the_right_label_is_ahead() -> None:
    right = torch.full((4,), 0.1, requires_grad=True)
    wrong = torch.tensor([[0.0, 0.1, 0.102, 0.15]])
    with torch.enable_grad():
        loss = contrast_loss(right, wrong)
        loss.sum().backward()
    assert loss[0] == pytest.approx(0.1, rel=1e-3)
    assert loss[1] == pytest.approx(0.002 * math.log(2), rel=1e-5)
    assert right.grad is not None
    assert right.grad[0] == pytest.approx(1.0)
    assert right.grad[1] == pytest.approx(0.5)
    assert 0.5 > right.grad[2] > right.grad[3] >= 0
    assert right.grad[3] < 1e-6


def test_contrast_with_several_labels_is_cross_entropy() -> None:
    errors = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01
    expected = F.cross_entropy(-errors.T / 0.002, torch.zeros(6, dtype=torch.int64), reduction="none") * 0.002
    assert torch.allclose(contrast_loss(errors[0], errors[1:]), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_wrong_labels_are_wrong_and_different(k: int) -> None:
    labels = torch.arange(10).repeat(20)
    wrong = _wrong_labels(labels, k, torch.Generator().manual_seed(0))
    assert wrong.shape == (k, 200)
    assert not (wrong == labels).any()
    assert wrong.unique().tolist() == list(range(10))
    assert (wrong.sort(0).values.diff(dim=0) > 0).all()


def test_one_step_with_all_wrong_labels_asks_each_once() -> None:
    asked: list[torch.Tensor] = []
    run = Run(replace(_config("dit", Stage(8, 1, 3, 1.0, 1.0, 1000, 9)), label_dropout=0.0))
    run.model.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[2]))
    with torch.enable_grad():
        run.advance(load_mnist("train"))
    (labels,) = asked
    assert labels.unflatten(0, (10, 3)).sort(0).values.eq(torch.arange(10)[:, None]).all()


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build_mnist_unet().save_pretrained(tmp_path / "unet")
    build_mnist_scheduler("unet", 32).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"^checkpoint: got UNet2DConditionModel without a pipeline"):
        load_checkpoint(tmp_path)
    for wrong in (torch.zeros(11, 4, 31), torch.zeros(11, 32), torch.full((11, 4, 32), torch.nan)):
        save_file({"embeddings": wrong}, tmp_path / EMBEDDINGS)
        with pytest.raises(ValueError, match=rf"^checkpoint: got .*{EMBEDDINGS}, expected a file of one tensor"):
            load_checkpoint(tmp_path)
    save_file({"embeddings": class_embeddings()}, tmp_path / EMBEDDINGS)
    assert load_checkpoint(tmp_path).image_shape == (1, 32, 32)


def test_mnist_is_split_once() -> None:
    splits = [load_mnist(name) for name in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [4000, 500, 500]
    assert splits[2].images.shape == (500, 1, 32, 32)
    for split in splits:
        assert split.images.min() == -1
        assert split.images.max() == 1
        assert set(split.labels.tolist()) == set(range(10))
    # The frame is what was padded.
    assert (splits[0].images[..., [0, 1, 30, 31]] == -1).all()
    with pytest.raises(ValueError, match=r"^split: got 'all'"):
        load_mnist("all")


def test_sizes_of_the_dit_hide_equally_much() -> None:
    """Over the pixels of one detail signal and noise add up to the same ratio at every size."""
    ratios = []
    for size in (16, 32, 64):
        alphas = build_mnist_scheduler("dit", size).alphas_cumprod[[50, 300, 600, 900]].double()
        ratios.append(alphas / (1 - alphas) * (size / 16) ** 2)
    for other in ratios[1:]:
        assert torch.allclose(other, ratios[0], rtol=1e-3)
    images = load_mnist("validation").images[:4]
    fine = resized("dit", images, 64)
    assert fine.shape == (4, 1, 64, 64)
    assert (F.avg_pool2d(fine, 4) - resized("dit", images, 16)).abs().mean() < 0.1
    # Smooth: half of the detail's pixels carries nearly everything.
    assert (F.interpolate(F.avg_pool2d(fine, 2), scale_factor=2.0, mode="bicubic") - fine).abs().mean() < 0.02
    assert torch.equal(resized("unet", images, 32), images)


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_shipped_checkpoint_has_its_log(kind: str) -> None:
    folder = SHIPPED[f"mnist-{kind}"]
    checkpoint = load_checkpoint(f"mnist-{kind}")
    assert checkpoint.image_shape == (1, SIZES[kind], SIZES[kind])
    assert checkpoint.denoiser.num_classes == 10
    settings = json.loads((folder / "training.json").read_text())
    with open(folder / LOG) as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == sum(stage["steps"] for stage in settings["stages"])
    assert settings["command"].startswith(f"bigain train-tiny --model {kind} --stages 16:")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"model": "vae"}, "model: got 'vae'"),
        ({"stages": ()}, "stages: got none"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"ema": 2.0}, "ema: got 2.0"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_settings_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        MnistConfig(**wrong)


def test_stages_are_read_from_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, named in (
        ("8", "stages: got '8', expected SIZE:STEPS:BATCH"),
        ("8:1:2,8:1:x", "stages: got '8:1:x'"),
        ("8:1:2:1:1:1:1:1", "stages: got '8:1:2:1:1:1:1:1'"),
        ("8:1:2:1:1:1:10", "stages: got wrong 10"),
        ("8:1:2:1:1:0.5", "stages: got '8:1:2:1:1:0.5'"),
        ("48:1:2", "stages: got size 48"),
        ("8:0:2", "stages: got steps 0"),
    ):
        assert main(["train-tiny", "--model", "unet", "--stages", text, "--out", str(tmp_path / "out")]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_removed_before_the_run_can_start(
    trained: tuple[str, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, whole, _ = trained
    out = tmp_path / "out"
    command = ["train-tiny", "--model", kind, "--out", str(out), "--epochs", "0", "--log-every", "2", "--warmup", "2"]
    stages = f"{FIRST},{SECOND}"
    with torch.enable_grad():
        assert main([*command, "--stages", stages]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for options in (
        ["--stages", stages, "--state", str(tmp_path / "nothing")],
        ["--stages", stages, "--state", str(out / STATE), "--seed", "1"],
    ):
        assert main([*command, "--overwrite", *options]) == 2
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # What is there may be what the run goes on from.
    longer = f"{FIRST},{SECOND},8:2:2"
    with torch.enable_grad():
        assert main([*command, "--overwrite", "--stages", longer, "--state", str(out / STATE)]) == 0
    with open(out / LOG) as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == "7"
    capsys.readouterr()
    # A finished run of another folder leaves nothing to do, so nothing would be saved.
    with pytest.raises(ValueError, match=r"^stages: got 5 steps in all, expected more than the 5 in "):
        train_mnist(tmp_path / "other", _config(kind, FIRST, SECOND), whole / STATE)
    assert not (tmp_path / "other").exists()
