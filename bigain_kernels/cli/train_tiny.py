"""`bigain train-tiny`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ThreadsOption, progress_bar, set_threads
from .text import say

if TYPE_CHECKING:
    from ..evaluation.output import OutputFolder
    from ..evaluation.train_mnist import Stage

# What a run writes, and the folders that hold nothing else.
_MODEL = ("training_log.csv", "scheduler/scheduler_config.json")
_WEIGHTS = ("config.json", "diffusion_pytorch_model.safetensors")
_FILES = {
    "digits": (*_MODEL, *(f"transformer/{name}" for name in _WEIGHTS), "classifier.safetensors"),
    "dit": (*_MODEL, *(f"transformer/{name}" for name in _WEIGHTS), "classifier.safetensors", "state.safetensors"),
    "unet": (
        *_MODEL,
        *(f"unet/{name}" for name in _WEIGHTS),
        "classifier.safetensors",
        "state.safetensors",
        "embeddings.safetensors",
    ),
}
_NAMES = (
    "training.json",
    "training_log.csv",
    "classifier.safetensors",
    "embeddings.safetensors",
    "state.safetensors",
    "scheduler/*",
    "transformer/*",
    "unet/*",
)


_STAGE = "SIZE:STEPS:BATCH[:RATE[:CONTRAST[:UNTIL[:WRONG]]]]"


def _read_stages(text: str) -> tuple[Stage, ...]:
    from ..evaluation.train_mnist import Stage

    stages = []
    for part in text.split(","):
        try:
            size, steps, batch, *rest = part.split(":")
            numbers: list[Any] = [*map(float, rest[:2]), *map(int, rest[2:])]
            stages.append(Stage(int(size), int(steps), int(batch), *numbers))
        except (TypeError, ValueError) as error:
            if str(error).startswith("stages: "):
                raise
            raise ValueError(f"stages: got {part!r}, expected {_STAGE},...") from error
    return tuple(stages)


def train_tiny(
    model: Annotated[
        str, typer.Option(help="unet, dit: of MNIST, those of the demo. digits: the DiT of 64 tokens that tests run.")
    ] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder of the checkpoint.", show_default="tiny_MODEL")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in --out.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="unet, dit: go on with the training in --out.")] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="unet, dit: go on from the state.safetensors of another run.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="digits: training steps (12000).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="digits: images of one step (64).")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help=f"unet, dit: {_STAGE},...: image size, steps, images of one step, factor of the learning rate, how "
            "much telling right labels from wrong ones counts, from which timestep it does not, how many wrong ones."
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of AdamW, after warm-up (2e-3).")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of warm-up (digits 200, else 100).")] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the averaged weights, which are saved (digits 0.999, else 0.995).")
    ] = None,
    label_dropout: Annotated[
        float | None, typer.Option(help="Fraction of images trained without their label (0.1).")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW (0.01).")] = None,
    snr_limit: Annotated[
        float | None, typer.Option(help="unet, dit: signal to noise above which no timestep weighs more (5).")
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps between log lines, where all is saved (digits 200, else 100).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of the classifier that judges samples; 0 trains none (digits 60, else 20).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train one of the shipped models, with the classifier that judges its samples.

    The result is the same for one seed, one thread count, one torch version and one kind of CPU.
    Ctrl-C keeps the last saved weights.
    """
    if model not in _FILES:
        raise ValueError(f"model: got {model!r}, expected one of {list(_FILES)}")
    digits = model == "digits"
    given: dict[str, Any] = {
        "learning_rate": learning_rate,
        "warmup": warmup,
        "ema": ema,
        "label_dropout": label_dropout,
        "weight_decay": weight_decay,
        "log_every": log_every,
        "epochs": epochs,
    }
    own: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
    other: dict[str, Any] = {"stages": stages, "snr_limit": snr_limit, "resume": resume or None, "state": state}
    if not digits:
        own, other = other, own
    for name, value in other.items():
        if value is not None:
            raise ValueError(f"{name}: got {value}, expected none with --model {model}")
    given = {name: value for name, value in (given | own).items() if value is not None}
    if resume and (overwrite or state):
        raise ValueError(f"resume: got --{'overwrite' if overwrite else 'state'} with it, expected one of the two")
    set_threads(threads)
    from ..evaluation.output import OutputFolder

    train = _of_digits({**given, "seed": seed}) if digits else _of_mnist(model, {**given, "seed": seed})
    folder = out or Path("tiny_dit" if digits else f"mnist_{model}")
    hint = "--overwrite" if digits else "--resume, --overwrite"
    with OutputFolder(folder, _NAMES, again=resume or overwrite, hint=hint) as output:
        for name in _FILES[model]:
            output.claim(name)
        # Of two models in one folder the wrong one might be loaded.
        train(output, output.clear if overwrite else lambda: None)


# Trains into a folder; the second is called when nothing can refuse the run any more, before the first file is written.
_Training = Callable[["OutputFolder", Callable[[], None]], None]


def _of_digits(given: dict[str, Any]) -> _Training:
    """What trains the tiny DiT and its classifier, with settings that have been looked at."""
    from ..evaluation.train_tiny import TrainConfig, train_classifier, train_tiny_dit

    epochs = _epochs(given, 60)
    config = TrainConfig(**given)

    def train(output: OutputFolder, begin: Callable[[], None]) -> None:
        begin()
        _write_settings(output, asdict(config) | {"epochs": epochs}, config)
        if epochs:
            measured = train_classifier(output.path, epochs, config.seed)
            say(f"classifier: test accuracy {measured['test_accuracy']:.4f} in {measured['seconds']:.0f} s")
        with progress_bar() as progress:
            last = train_tiny_dit(output.path, config, _shown(progress, config.steps))
        say(f"DiT: validation error {last['validation_error']:.4f} in {last['seconds']:.0f} s; saved in {output.path}")

    return train


def _epochs(given: dict[str, Any], default: int) -> int:
    """Take the epochs of the classifier out of `given`."""
    epochs = given.pop("epochs", default)
    if not 0 <= epochs <= 10**6:
        raise ValueError(f"epochs: got {epochs}, expected 0 to 1e6")
    return epochs


def _of_mnist(model: str, given: dict[str, Any]) -> _Training:
    """What trains the U-Net or the DiT of MNIST, with settings that have been looked at."""
    from ..evaluation.data import load_coarse_mnist
    from ..evaluation.train_mnist import STAGES, STATE, MnistConfig, train_mnist
    from ..evaluation.train_tiny import train_classifier

    epochs = _epochs(given, 20)
    text = given.pop("stages", None)
    resume, state = given.pop("resume", False), given.pop("state", None)
    config = MnistConfig(model=model, stages=STAGES[model] if text is None else _read_stages(text), **given)
    options = {**asdict(config), "stages": ",".join(map(str, config.stages)), "epochs": epochs}

    def train(output: OutputFolder, begin: Callable[[], None]) -> None:
        with progress_bar() as progress:
            shown = _shown(progress, config.steps)

            def log(row: dict[str, float]) -> None:
                # Only now is it known that the run goes on from the state that is there.
                _write_settings(output, options, config)
                shown(row)

            last = train_mnist(output.path, config, output.path / STATE if resume else state, log, begin)
        error, seconds = last["validation_error"], last["seconds"]
        if epochs and not (resume and (output.path / "classifier.safetensors").exists()):
            measured = train_classifier(output.path, epochs, config.seed, load_coarse_mnist)
            say(f"classifier: test accuracy {measured['test_accuracy']:.4f} in {measured['seconds']:.0f} s")
        say(f"{model}: validation error {error:.4f} in {seconds:.0f} s; saved in {output.path}")

    return train


def _write_settings(output: OutputFolder, options: dict[str, Any], config: Any) -> None:
    """`training.json`: the command with every option written out, and the settings and versions."""
    import torch

    from ..evaluation.train_tiny import describe

    command = " ".join(["bigain train-tiny", *(f"--{n.replace('_', '-')} {v}" for n, v in options.items())])
    settings = {"command": f"{command} --threads {torch.get_num_threads()}", **describe(config)}
    output.write_text("training.json", json.dumps(settings, indent=2) + "\n")


def _shown(progress: Any, steps: int) -> Any:
    task = progress.add_task("training", total=steps)

    def show(row: dict[str, float]) -> None:
        described = f"loss {row['loss']:.4f}, validation {row['validation_error']:.4f}"
        progress.update(task, completed=int(row["step"]), description=described)

    return show
