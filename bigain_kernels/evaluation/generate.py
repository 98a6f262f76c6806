"""Generation with classifier-free guidance from any `Denoiser`; and the picture of a set of samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .compression import compressed, with_shared_plan
from .denoisers import Denoiser, prediction_type
from .noise import seeded_noise
from .output import replacing


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of generation.

    Attributes:
        steps: of the scheduler.
        guidance: uncond + guidance * (cond - uncond); 1 needs no unconditional pass.
        seed: of the starting noise; sample i starts from the noise of (seed, i), whatever the batch.
        batch_size: samples made together. With guidance a forward pass has twice as many rows.
        scheduler: a class of diffusers that takes the noise schedule of the model. What it draws on the way is drawn
            for (seed, i) too.
    """

    steps: int = 20
    guidance: float = 1.5
    seed: int = 0
    batch_size: int = 100
    scheduler: str = "DDIMScheduler"

    def __post_init__(self) -> None:
        most = {"steps": 10**6, "guidance": 1e4, "seed": 2**63 - 1, "batch_size": 10**6}
        for name, least in (("steps", 1), ("guidance", 1.0), ("seed", 0), ("batch_size", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
            if getattr(self, name) > most[name]:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at most {most[name]:g}")


def sampler(denoiser: Denoiser, name: str, steps: int) -> Any:
    """A scheduler of diffusers by name, with the noise schedule of the model and its timesteps set.

    Raises:
        ValueError: there is none of that name, or it needs another kind of model.
    """
    import diffusers

    prediction_type(denoiser.scheduler)
    cls: Any = getattr(diffusers, name, None)
    if diffusers.SchedulerMixin not in getattr(cls, "__mro__", ()):
        raise ValueError(f"scheduler: got {name!r}, expected a scheduler of diffusers such as DDIMScheduler")
    # Clipping is for models of pixels in [-1, 1] whose own scheduler asks for it; DDIM's default would add it to all.
    clip = bool(denoiser.scheduler.config.get("clip_sample", False))
    scheduler = cls.from_config(denoiser.scheduler.config, clip_sample=clip)
    prediction_type(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def _generate_batch(
    denoiser: Denoiser, labels: torch.Tensor, indices: Sequence[int], config: GenerateConfig
) -> torch.Tensor:
    noise = seeded_noise([(config.seed, i) for i in indices], denoiser.sample_shape).to(labels.device)
    scheduler = sampler(denoiser, config.scheduler, config.steps)
    drawn = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        keys = [np.random.SeedSequence((config.seed, i, 1)).generate_state(1, np.uint64)[0] >> 1 for i in indices]
        drawn = {"generator": [torch.Generator().manual_seed(int(key)) for key in keys]}
    x = noise * scheduler.init_noise_sigma
    guided = config.guidance != 1.0
    # [uncond, cond]: row b and row n + b are the pair of sample b, the order in which they may share a plan.
    both = torch.cat([torch.full_like(labels, denoiser.num_classes), labels]) if guided else labels
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, step)
        rows = torch.cat([scaled, scaled]) if guided else scaled
        # Some schedulers count in floats; denoisers take whole timesteps as integers.
        t = int(step) if float(step).is_integer() else float(step)
        predicted = denoiser(rows, torch.full((rows.shape[0],), t, device=x.device), both)
        if guided:
            uncond, cond = predicted.chunk(2)
            predicted = uncond + config.guidance * (cond - uncond)
        x = scheduler.step(predicted, step, x, **drawn).prev_sample
    # Once for a batch: what is infinite or NaN at any step stays so to the last.
    wrong = (~x.isfinite()).flatten(1).any(dim=1)
    if bool(wrong.any()):
        raise ValueError(
            f"samples: got values that are not finite in {int(wrong.sum())} of {len(wrong)} samples after "
            f"{config.steps} steps at guidance {config.guidance:g}, expected finite ones: the model, its dtype or the "
            "compression overflows"
        )
    return x


def generate(
    denoiser: Denoiser,
    labels: torch.Tensor,
    config: GenerateConfig | None = None,
    *,
    compression: Any = None,
    share_plan: bool = False,
    indices: Sequence[int] | None = None,
    record: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample one image for each label with classifier-free guidance, by a scheduler of diffusers.

    By default that is deterministic DDIM (Song et al., 2021).

    Args:
        denoiser: the model, see `Denoiser`.
        labels: (n,) int64, the classes to draw, on the device of the model.
        config: settings.
        compression: a config of `bigain_kernels.diffusers`, applied while this runs; None leaves the model as it is.
        share_plan: plan once for the two rows of a guidance pair. Without guidance (1) there are no pairs, and it
            changes nothing.
        indices: what the starting noise of each sample is drawn for; default 0, 1, ..., n - 1.
        record: called with each finished batch of samples.

    Returns:
        (n, C, H, W) in the space the model denoises.

    Raises:
        ValueError: samples that are not finite, labels out of range, more steps than the model has timesteps, or a
            shared plan with a method that builds none.
    """
    config = config or GenerateConfig()
    batches = generate_batches(
        denoiser, labels, config, compression=compression, share_plan=share_plan, indices=indices
    )
    made = []
    for batch in batches:
        made.append(batch)
        if record is not None:
            record(batch)
    return torch.cat(made)


def generate_batches(
    denoiser: Denoiser,
    labels: torch.Tensor,
    config: GenerateConfig,
    *,
    compression: Any = None,
    share_plan: bool = False,
    indices: Sequence[int] | None = None,
) -> Iterator[torch.Tensor]:
    """What `generate` makes, batch by batch: no more than one is in memory. Arguments and errors are those of it."""
    if labels.numel() == 0 or int(labels.min()) < 0 or int(labels.max()) >= denoiser.num_classes:
        raise ValueError(f"labels: got {labels.tolist()}, expected classes from 0 to {denoiser.num_classes - 1}")
    chosen = list(range(labels.numel())) if indices is None else list(indices)
    if len(chosen) != labels.numel():
        raise ValueError(f"indices: got {len(chosen)}, expected one for each of the {labels.numel()} labels")
    most = len(denoiser.scheduler.alphas_cumprod)
    if config.steps > most:
        raise ValueError(f"steps: got {config.steps}, expected at most {most}, the timesteps of the model")
    if share_plan:
        paired = with_shared_plan(compression, 2)
        compression = paired if config.guidance != 1.0 else compression
    with compressed(denoiser, compression):
        for first in range(0, len(chosen), config.batch_size):
            part = slice(first, first + config.batch_size)
            yield _generate_batch(denoiser, labels[part], chosen[part], config)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """(n, 1 or 3, H, W) in [-1, 1] to (n, H, W, 3) uint8."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def save_grid(images: torch.Tensor, labels: torch.Tensor, names: Sequence[str], path: Path, title: str) -> None:
    """Write a PNG with one row of samples for each class, its name on the left.

    Args:
        images: (n, 1 or 3, H, W) in [-1, 1].
        labels: (n,) the class asked for.
        names: name of each class.
        path: the PNG.
        title: one line above the samples.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pixels, present = to_pixels(images), sorted(set(labels.tolist()))
    members = [[i for i, label in enumerate(labels.tolist()) if label == c] for c in present]
    columns, (height, width) = max(len(m) for m in members), pixels.shape[1:3]
    canvas = np.full((len(present) * (height + 1), columns * (width + 1), 3), 255, dtype=np.uint8)
    for row, chosen in enumerate(members):
        for column, i in enumerate(chosen):
            top, left = row * (height + 1), column * (width + 1)
            canvas[top : top + height, left : left + width] = pixels[i]
    # Half an inch for the width of a sample, and room for the names and the title.
    rows = 0.5 * height / width * len(present)
    figure = Figure(figsize=(0.5 * columns + 1.2, rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(canvas, interpolation="nearest")
    # Names are a stranger's: dollars in them are no formula, and what is no character has no glyph.
    shown = [names[c].encode("utf-8", "backslashreplace").decode() for c in present]
    axes.set_yticks([row * (height + 1) + height / 2 for row in range(len(present))], shown, parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title(title, fontsize=9, loc="left")
    with replacing(path) as part:
        figure.savefig(part, format="png")
