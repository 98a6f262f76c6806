"""The state of a training in one safetensors file, which unlike a pickle cannot hold code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .output import replacing

if TYPE_CHECKING:
    from .train_mnist import MnistConfig, Run


def save_state(path: Path, run: Run) -> None:
    """Write weights, averaged weights, moments of the optimizer, generator, step, settings and log of a run."""
    tensors = {"generator": run.generator.get_state()}
    for name, module in (("model", run.model), ("average", run.average)):
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for number, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
    about = {"step": run.step, "config": asdict(run.config), "rows": run.rows}
    with replacing(path) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, {"run": json.dumps(about)})


def _past(config: dict[str, Any], step: int) -> dict[str, Any]:
    """The settings as far as they decide the first `step` steps."""
    stages = []
    for stage in config["stages"]:
        steps = min(stage["steps"], step)
        step -= steps
        if steps:
            # Older states do not say until where labels were contrasted, or with how many: by the defaults.
            stages.append({"until": 700, "wrong": 1, **stage, "steps": steps})
    # How often the log is written changes no weight.
    return {**config, "stages": stages, "log_every": None}


def _check(path: Path, config: MnistConfig, about: dict[str, Any]) -> None:
    was, now = (_past(c, about["step"]) for c in (about["config"], asdict(config)))
    for name in now:
        if was[name] != now[name]:
            raise ValueError(f"{name}: got {now[name]}, expected {was[name]} to go on with {path}")
    if about["step"] > config.steps:
        raise ValueError(f"stages: got {config.steps} steps in all, expected more than the {about['step']} in {path}")


def load_state(path: Path, run: Run) -> None:
    """Put a run, new and of the same settings, where `save_state` left one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a run whose settings differ in what has been done already.
    """
    if not path.is_file():
        raise FileNotFoundError(f"state: got no {path}, expected the file that `bigain train-tiny --model` writes")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        _check(path, run.config, about)
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        run.generator.set_state(tensors.pop("generator"))
        for key, value in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = value
        run.model.load_state_dict(parts["model"])
        run.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in parts["optimizer"].items():
            number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": moments})
        run.step, run.rows = about["step"], about["rows"]
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"state: got {path}, expected the state of such a run, whole ({error})") from error
