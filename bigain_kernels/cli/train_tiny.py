"""`bigain train-tiny`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import ThreadsOption, progress_bar, set_threads
from .text import say

# What a run writes, and the folders that hold nothing else.
_FILES = (
    "training_log.csv",
    "classifier.safetensors",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
)
_NAMES = ("training.json", *_FILES[:2], "scheduler/*", "transformer/*")


def train_tiny(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("tiny_dit"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in --out.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps of the DiT; 12000 made the shipped checkpoint.")] = 12000,
    batch_size: Annotated[int, typer.Option(help="Images of one step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of AdamW, after warm-up.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 200,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights, which are what is saved.")] = 0.999,
    label_dropout: Annotated[float, typer.Option(help="Fraction of images trained without their label.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    log_every: Annotated[int, typer.Option(help="Steps between log lines; the weights are saved at each.")] = 200,
    epochs: Annotated[int, typer.Option(help="Epochs of the digit classifier; 0 trains none.")] = 60,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train the tiny DiT of the demo, and the digit classifier that judges its samples, on scikit-learn's digits.

    The result is the same for one seed, one thread count and one torch version. Ctrl-C keeps the last saved weights.
    """
    import torch

    from ..evaluation.output import OutputFolder
    from ..evaluation.train_tiny import TrainConfig, describe, train_classifier, train_tiny_dit

    set_threads(threads)
    if not 0 <= epochs <= 10**6:
        raise ValueError(f"epochs: got {epochs}, expected 0 to 1e6")
    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        ema=ema,
        label_dropout=label_dropout,
        weight_decay=weight_decay,
        log_every=log_every,
        seed=seed,
    )
    command = " ".join(["bigain train-tiny", *(f"--{n.replace('_', '-')} {v}" for n, v in asdict(config).items())])
    settings = {"command": f"{command} --epochs {epochs} --threads {torch.get_num_threads()}", **describe(config)}
    with OutputFolder(out, _NAMES, again=overwrite) as output:
        for name in _FILES:
            output.claim(name)
        output.write_text("training.json", json.dumps(settings, indent=2) + "\n")
        if epochs:
            measured = train_classifier(out, epochs, seed)
            say(f"classifier: test accuracy {measured['test_accuracy']:.4f} in {measured['seconds']:.0f} s")
        with progress_bar() as progress:
            task = progress.add_task("training", total=steps)

            def show(row: dict[str, float]) -> None:
                described = f"loss {row['loss']:.4f}, validation {row['validation_error']:.4f}"
                progress.update(task, completed=int(row["step"]), description=described)

            last = train_tiny_dit(out, config, show)
        say(f"DiT: validation error {last['validation_error']:.4f} in {last['seconds']:.0f} s; saved in {out}")
