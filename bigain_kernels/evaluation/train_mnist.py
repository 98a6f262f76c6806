"""Training of the models of `mnist_models`: on coarse images first, then on fine ones, resumable to the bit.

What is learned on 16 x 16 pixels costs a fifth there of what it costs on 32 x 32, and most of it stays.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file

from .checkpoints import EMBEDDINGS
from .data import Digits, load_mnist
from .denoisers import Denoiser, diffuse
from .mnist_models import FOLDERS, SIZES, build_mnist_model, class_embeddings, mnist_denoiser, resized
from .output import replacing
from .tiny_models import NUM_CLASSES
from .train_tiny import augment, average_into, check_settings, drop_labels, save_model, spread_timesteps
from .training_state import load_state, save_state

LOG = "training_log.csv"
STATE = "state.safetensors"
# By a few of these the right label is to beat a wrong one, in mean squared error of the prediction.
_MARGIN = 0.002
# At less noise no label is needed.
_CONTRASTED_FROM = 100
# Where, and on how many images, the validation error is logged.
_VALIDATION_TIMESTEPS = (100, 250, 400, 550, 700)
_VALIDATION_IMAGES, _VALIDATION_BATCH = 100, 20


STAGE_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Stage:
    """`steps` steps on images of `size` x `size` pixels, `batch` at a time, at `rate` times the learning rate.

    With `contrast` above 0 each image is denoised with `wrong` wrong labels too, at 1 + `wrong` times the cost, and so
    much of `contrast_loss` is added to the loss: the right label is to leave the smallest error, which the denoising
    loss alone asks for in the end only. From timestep `until` on no digit can be told, and labels are not contrasted.
    """

    size: int
    steps: int
    batch: int
    rate: float = 1.0
    contrast: float = 0.0
    until: int = 700
    wrong: int = 1

    def __post_init__(self) -> None:
        if self.size not in STAGE_SIZES:
            raise ValueError(f"stages: got size {self.size}, expected one of {list(STAGE_SIZES)}")
        for name in ("steps", "batch"):
            if not 1 <= getattr(self, name) <= 10**9:
                raise ValueError(f"stages: got {name} {getattr(self, name)}, expected 1 to 1e9")
        for name in ("rate", "contrast", "until"):
            if not 0 <= getattr(self, name) <= 1e3:
                raise ValueError(f"stages: got {name} {getattr(self, name)}, expected 0 to 1000")
        if not 1 <= self.wrong < NUM_CLASSES:
            raise ValueError(f"stages: got wrong {self.wrong}, expected 1 to {NUM_CLASSES - 1} wrong labels")

    def __str__(self) -> str:
        return f"{self.size}:{self.steps}:{self.batch}:{self.rate:g}:{self.contrast:g}:{self.until}:{self.wrong}"


STAGES = {
    "unet": (Stage(16, 400, 32), Stage(16, 800, 16, 1.0, 1.0), Stage(32, 4000, 12, 0.5, 1.0)),
    "dit": (
        Stage(16, 1200, 64),
        Stage(16, 800, 32, 1.0, 1.0),
        Stage(32, 1200, 32, 1.0, 1.0),
        Stage(64, 1000, 16, 0.5, 1.0),
    ),
}


@dataclass(frozen=True)
class MnistConfig:
    """Everything that decides the result of `train_mnist`, apart from the thread count and the torch version.

    The learning rate warms up over `warmup` steps and then stays: the average of the weights does what its decay would
    do, and so a run can be ended, or continued with other stages, anywhere.

    Attributes:
        model: "unet" or "dit".
        stages: one after the other.
        snr_limit: timesteps with a higher ratio of signal to noise do not weigh more (Hang et al., "Efficient Diffusion
            Training via Min-SNR Weighting Strategy", 2023).
        log_every: steps between log lines; everything is saved at each.
    """

    model: str = "unet"
    stages: tuple[Stage, ...] = STAGES["unet"]
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.995
    label_dropout: float = 0.1
    weight_decay: float = 0.01
    snr_limit: float = 5.0
    log_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in FOLDERS:
            raise ValueError(f"model: got {self.model!r}, expected one of {list(FOLDERS)}")
        if not self.stages:
            raise ValueError("stages: got none, expected at least one")
        limits = {"learning_rate": 1e3, "weight_decay": 1e3, "ema": 1.0, "label_dropout": 1.0, "snr_limit": 1e6}
        check_settings(self, ("log_every",), limits)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> tuple[Stage, int]:
        """The stage that step `step`, from 0, belongs to, and which of its steps that is, from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError(f"step: got {step} past the last one, expected less than {self.steps}")

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return self.learning_rate * self.stage(step)[0].rate * min(1.0, (step + 1) / max(1, self.warmup))


class _PlainAttention:
    """Attention with its matrix written out: in bfloat16, on up to 1,024 tokens, the faster way to train on a CPU."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        # Autocast would take the softmax to float32, and most of the time with it.
        with torch.autocast("cpu", enabled=False):
            weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1)
            mixed = weights @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for it. Elsewhere it is emulated, several times slower than float32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _fast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16())


def contrast_loss(right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """What the errors of the right label, (n,), and of k wrong ones, (k, n), cost: the less, the larger the wrong ones.

    It is the cross entropy of a classifier whose logits are the negative errors in margins, times the margin. So its
    slope is at most that of the errors themselves and fades once all wrong ones are behind by a few margins: a label
    that is told apart is left to the denoising loss.
    """
    behind = (right - wrong) / _MARGIN
    return F.softplus(behind.logsumexp(0)) * _MARGIN


def _wrong_labels(labels: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """(k, n): for each of the n labels k others, all different."""
    if k == 1:
        shift = torch.randint(1, NUM_CLASSES, (1, len(labels)), generator=generator)
    else:
        shift = torch.rand(NUM_CLASSES - 1, len(labels), generator=generator).argsort(0)[:k] + 1
    return (labels + shift) % NUM_CLASSES


@torch.no_grad()
def _validation_error(denoiser: Denoiser, kind: str, data: Digits, size: int) -> float:
    images, labels = resized(kind, data.images[:_VALIDATION_IMAGES], size), data.labels[:_VALIDATION_IMAGES]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for timestep in _VALIDATION_TIMESTEPS:
        t = torch.full((len(images),), timestep)
        noisy, target = diffuse(denoiser.scheduler, images, noise, t)
        parts = [x.split(_VALIDATION_BATCH) for x in (noisy, t, labels)]
        with _fast():
            predicted = torch.cat([denoiser(*part) for part in zip(*parts, strict=True)])
        errors.append(F.mse_loss(predicted.float(), target))
    return torch.stack(errors).mean().item()


class Run:
    """All that a training is made of: weights, averaged weights, optimizer, generator, step, and the log so far."""

    def __init__(self, config: MnistConfig) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model, self.average = build_mnist_model(config.model), build_mnist_model(config.model)
        self.model.train()
        self.average.eval().load_state_dict(self.model.state_dict())
        # In float32 PyTorch's fused attention is the faster one.
        for module in self.model.modules() if _has_bfloat16() else ():
            if isinstance(module, Attention):
                module.set_processor(_PlainAttention())
        self.config = config
        # By the size of the images: the same model, each with the noise of its size.
        self.denoisers = {size: mnist_denoiser(config.model, self.model, size) for size in STAGE_SIZES}
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.step = 0
        self.rows: list[dict[str, float]] = []

    def advance(self, data: Digits) -> float:
        """Take one step; returns the denoising part of its loss."""
        stage, within = self.config.stage(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        denoising, loss = self._losses(data, stage)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # Weights of coarser images would spoil the average for long: it starts anew with each stage.
        average_into(self.average, self.model, self.config.ema, within)
        self.step += 1
        return denoising.item()

    def _losses(self, data: Digits, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        n, generator, kind = stage.batch, self.generator, self.config.model
        scheduler = self.denoisers[stage.size].scheduler
        index = torch.randint(len(data), (n,), generator=generator)
        images, true = resized(kind, augment(data.images[index], generator), stage.size), data.labels[index]
        labels = drop_labels(true, self.config.label_dropout, generator)
        t = spread_timesteps(n, scheduler.config.num_train_timesteps, generator)
        noise = torch.randn(images.shape, generator=generator)
        noisy, target = diffuse(scheduler, images, noise, t)
        # v-prediction alone would weigh the error of the clean image by SNR + 1.
        weight = ((self.config.snr_limit + 1) * (1 - scheduler.alphas_cumprod[t])).clamp(max=1.0)
        dropped = labels == NUM_CLASSES
        asked = labels[None]
        if stage.contrast:
            other = _wrong_labels(true, stage.wrong, generator)
            # An image that has lost its label gets it back in its second row.
            other[0] = torch.where(dropped, true, other[0])
            asked = torch.cat([asked, other])
        rows = len(asked)
        with _fast():
            predicted = self.denoisers[stage.size](noisy.repeat(rows, 1, 1, 1), t.repeat(rows), asked.flatten())
        errors = (predicted.float() - target.repeat(rows, 1, 1, 1)).square().mean(dim=(1, 2, 3)).unflatten(0, (rows, n))
        first, others = errors[0], errors[1:]
        denoising = (first * weight).mean()
        if not stage.contrast:
            return denoising, denoising
        compared = ~dropped & (t >= _CONTRASTED_FROM) & (t < stage.until)
        contrast = (contrast_loss(first, others) * compared).mean()
        return denoising, denoising + (others[0] * weight * dropped).mean() + stage.contrast * contrast


def _write(out: Path, run: Run) -> None:
    """The checkpoint, the log, and last the state, from which the others can be written again."""
    save_model(run.average, out / FOLDERS[run.config.model])
    run.denoisers[SIZES[run.config.model]].scheduler.save_pretrained(out / "scheduler")
    if run.config.model == "unet":
        with replacing(out / EMBEDDINGS) as part:
            save_file({"embeddings": class_embeddings()}, part)
    with replacing(out / LOG) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(run.rows[-1])
        writer.writerows(
            [[f"{value:.5g}" if isinstance(value, float) else value for value in r.values()] for r in run.rows]
        )
    save_state(out / STATE, run)


def train_mnist(
    out: Path,
    config: MnistConfig,
    state: Path | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
    on_start: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train a U-Net or a DiT on MNIST and save it as a diffusers checkpoint.

    Writes `out/unet/` or `out/transformer/`, `out/scheduler/`, for the U-Net `out/embeddings.safetensors`, and
    `out/training_log.csv`: step, size of the images, images seen, denoising loss, validation error of the averaged
    weights, seconds and seconds of the processor. All are written at every log line together with
    `out/state.safetensors`, from which a run goes on as if it had not been interrupted.

    Args:
        out: folder of the checkpoint; made if missing.
        config: all settings of the run.
        state: the file to go on from, such as `out/state.safetensors`; None starts anew. The stages may differ in what
            is still to come, and `log_every`.
        on_log: called with each row of the log.
        on_start: called once data and state are read, before anything is written.

    Returns:
        The last row of the log.

    Raises:
        ValueError: the state is of a run with other settings, or is damaged, or the loss is not finite.
        FileNotFoundError: there is no state, or no MNIST.
    """
    train, validation = load_mnist("train"), load_mnist("validation")
    run = Run(config)
    if state is not None:
        load_state(state, run)
        if run.step == config.steps and state.resolve() != (out / STATE).resolve():
            raise ValueError(f"stages: got {config.steps} steps in all, expected more than the {run.step} in {state}")
    out.mkdir(parents=True, exist_ok=True)
    if on_start is not None:
        on_start()
    last = run.rows[-1] if run.rows else {"images": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    started, started_cpu = time.perf_counter() - last["seconds"], time.process_time() - last["cpu_seconds"]
    images, losses = last["images"], []
    while run.step < config.steps:
        stage, _ = config.stage(run.step)
        losses.append(run.advance(train))
        images += stage.batch
        if not math.isfinite(losses[-1]):
            raise ValueError(f"loss: got {losses[-1]} at step {run.step}, expected a finite one: training diverged")
        if run.step % config.log_every == 0 or run.step == config.steps:
            averaged = mnist_denoiser(config.model, run.average, stage.size)
            row = {
                "step": run.step,
                "size": stage.size,
                "images": images,
                "loss": sum(losses) / len(losses),
                "validation_error": _validation_error(averaged, config.model, validation, stage.size),
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - started_cpu,
            }
            losses.clear()
            run.rows.append(row)
            _write(out, run)
            if on_log is not None:
                on_log(row)
    return run.rows[-1]
