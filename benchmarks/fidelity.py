"""What a method costs in fidelity on the shipped models of MNIST: `python -m benchmarks.fidelity --model unet`.

On validation images at three timesteps, with the true label: by how much the denoising error rises, and how far the
prediction moves (squared distance to the uncompressed one), both in percent of the uncompressed error. A row is a
method at a timestep. Rows that are there already, of the same weights and images, are not measured again, so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import torch

from bigain_kernels.evaluation.compression import compressed
from bigain_kernels.evaluation.denoisers import Denoiser, diffuse
from bigain_kernels.evaluation.noise import seeded_noise
from bigain_kernels.evaluation.subjects import load_subject
from bigain_kernels.methods.registry import make_config

from . import gated  # noqa: F401  (registers the method "gated")

TIMESTEPS = (200, 400, 600)
COLUMNS = ("model", "weights", "images", "method", "timestep", "error", "rise_percent", "rise_se", "moved_percent")
_BATCH = 20


def grid(blocks: tuple[int, ...]) -> dict[str, tuple[str, dict[str, Any]]]:
    """By what they are called in the rows, methods with their options: the demo's first, then what a default may be.

    `blocks`: of the model, those that bear compression better than the others.
    """
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(method: str, **options: Any) -> None:
        name = " ".join([method, *(f"{key}={value}" for key, value in options.items())])
        chosen[name] = method, options

    for ratio in (0.5, 0.7):
        for method in ("tome", "lgtm"):
            for proportional in (False, True):
                add(method, ratio=ratio, proportional=proportional)
        add("abm", ratio=ratio)
    for method in ("todo", "avgpool"):
        add(method, factor=2)
    for alpha in (0.8, 0.9, 1.0, 1.1, 1.2):
        add("iekvd", factor=2, alpha=alpha)
    for method in ("todo", "avgpool", "iekvd"):
        add(method, factor=4)
    for ratio in (0.5, 0.7):
        add("lgtm", ratio=ratio, proportional=True, mode="mlerp")
        for window in (1, 2):
            add("lgtm", ratio=ratio, proportional=True, window=window)
    for ratio in (0.3, 0.4, 0.6):
        for method in ("tome", "lgtm"):
            add(method, ratio=ratio, proportional=True)
    # Destinations by position, prune and random noise as SiTo has them, and larger tiles.
    for ratio in (0.5, 0.7):
        add("tome", ratio=ratio, proportional=True, destinations="first")
        add("sito", ratio=ratio, proportional=True)
        add("lgtm", ratio=ratio, proportional=True, stride=(4, 4))
    # The ranking of sources held back by their contrast; without, it is that of L-GTM and of ToMe.
    for ratio in (0.5, 0.7):
        for destinations in ("smoothest", "random"):
            for gate in (0.02, 0.1, 0.5, 1000.0):
                add("gated", ratio=ratio, proportional=True, destinations=destinations, gate=gate)
    for ratio in (0.5, 0.7) if blocks else ():
        for method in ("tome", "lgtm"):
            add(method, ratio=ratio, proportional=True, blocks=blocks)
        for destinations in ("smoothest", "random"):
            for gate in (0.1, 0.5, 1000.0):
                add("gated", ratio=ratio, proportional=True, destinations=destinations, gate=gate, blocks=blocks)
    return chosen


@torch.no_grad()
def predictions(denoiser: Denoiser, noisy: torch.Tensor, timestep: int, labels: torch.Tensor) -> torch.Tensor:
    """The predictions for `noisy` (n, 1, s, s), as many."""
    t = torch.full((len(noisy),), timestep)
    parts = [x.split(_BATCH) for x in (noisy, t, labels)]
    return torch.cat([denoiser(*part) for part in zip(*parts, strict=True)])


def _errors(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (predicted - target).square().mean(dim=(1, 2, 3)).double()


def measure(model: str, checkpoint: Path | None, images: int, out: Path) -> None:
    """Append the rows of `model` that `out` does not hold yet."""
    subject = load_subject(model, checkpoint)
    denoiser, weights = subject.checkpoint.denoiser, subject.checkpoint.fingerprint()
    data = subject.validation
    clean, labels = data.images[:images], data.labels[:images]
    known: set[tuple[str, ...]] = set()
    if out.exists():
        with open(out, newline="") as file:
            known = {tuple(row[name] for name in COLUMNS[:5]) for row in csv.DictReader(file)}
    plain: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    for name, (method, options) in {"none": ("none", {}), **grid(subject.settings.blocks)}.items():
        for timestep in TIMESTEPS:
            key = (model, weights, str(images), name, str(timestep))
            if key in known:
                continue
            if timestep not in plain:
                noise = seeded_noise([(1, index, timestep) for index in range(images)], tuple(clean.shape[1:]))
                noisy, target = diffuse(denoiser.scheduler, clean, noise, torch.full((images,), timestep))
                plain[timestep] = noisy, target, predictions(denoiser, noisy, timestep, labels)
            noisy, target, uncompressed = plain[timestep]
            with compressed(denoiser, None if method == "none" else make_config(method, options)):
                predicted = predictions(denoiser, noisy, timestep, labels)
            before, after = _errors(uncompressed, target), _errors(predicted, target)
            percent = 100 / before.mean().item()
            rise = (after - before) * percent
            moved = _errors(predicted, uncompressed).mean().item() * percent
            numbers = (after.mean().item(), rise.mean().item(), rise.std().item() / math.sqrt(images), moved)
            new = not out.exists()
            with open(out, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(COLUMNS)
                writer.writerow([*key, *(f"{number:.4g}" for number in numbers)])
            print(*key[3:], *(f"{number:.4g}" for number in numbers), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("unet", "dit"), required=True)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped one")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(arguments.model, arguments.checkpoint, arguments.images, arguments.out)


if __name__ == "__main__":
    main()
