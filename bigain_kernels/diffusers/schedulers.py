"""What a model is told as its timestep, by the scheduler of its pipeline.

Most schedulers of diffusers number the steps of the training schedule, from T - 1 or T, the noisiest, to 0. Some hand
the model a function of the noise level instead. `start`, `end`, schedules over the timestep and random patterns need to
know which, so that the noisiest step is the noisiest under all of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..methods import CompressionConfig, MergeConfig, PoolConfig

# Numbered steps of training, whole or interpolated; those of flow matching are T * sigma, from T on.
NUMBERED = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class TimestepRange:
    """The timesteps that a model is told: `cleanest` at the end of denoising, `noisiest` at its start."""

    cleanest: float
    noisiest: float

    def noise(self, timestep: Any) -> Any:
        """How noisy a timestep is, from 0 to 1; of a number, or of a tensor element by element, in float32."""
        if isinstance(timestep, Tensor):
            level = (timestep.to(torch.float32) - self.cleanest) / (self.noisiest - self.cleanest)
            return level.clamp(0.0, 1.0)
        return min(max((timestep - self.cleanest) / (self.noisiest - self.cleanest), 0.0), 1.0)


# What flow-matching models are told that take sigma itself, from 1 to 0: Flux, Qwen-Image.
SIGMA = TimestepRange(0.0, 1.0)


def sigma_steps(num_train_timesteps: int) -> TimestepRange:
    """What flow-matching models are told that take T * sigma: from T to 0."""
    return TimestepRange(0.0, float(num_train_timesteps))


def numbered(num_train_timesteps: int) -> TimestepRange:
    """The range of a scheduler that numbers its steps, and of a model without one."""
    return TimestepRange(0.0, float(num_train_timesteps - 1))


def _of_sigmas(config: Any, function: Callable[[float], float]) -> TimestepRange:
    return TimestepRange(function(config.sigma_min), function(config.sigma_max))


def _log_sigma(sigma: float) -> float:
    """The noise condition of EDM (Karras et al., arXiv 2206.00364, table 1)."""
    return math.log(sigma) / 4


# Those that tell the model something else, by class; every class before its bases.
_SPECIAL: tuple[tuple[str, Callable[[Any], TimestepRange]], ...] = (
    ("EDMEulerScheduler", lambda config: _of_sigmas(config, _log_sigma)),
    ("EDMDPMSolverMultistepScheduler", lambda config: _of_sigmas(config, _log_sigma)),
    ("CosineDPMSolverMultistepScheduler", lambda config: _of_sigmas(config, lambda s: math.atan(s) / math.pi * 2)),
    ("CMStochasticIterativeScheduler", lambda config: _of_sigmas(config, lambda s: 1000 * _log_sigma(s))),
    ("ScoreSdeVeScheduler", lambda config: TimestepRange(config.sampling_eps, 1.0)),
    ("IPNDMScheduler", lambda config: TimestepRange(0.0, 1.0)),
    ("DDPMWuerstchenScheduler", lambda config: TimestepRange(0.0, 1.0)),
)


def _is(scheduler: Any, name: str) -> bool:
    # Some schedulers need packages that are not installed; then nothing is an instance of them.
    cls = getattr(diffusers, name, None)
    return isinstance(cls, type) and isinstance(scheduler, cls)


def range_of(scheduler: Any) -> TimestepRange | None:
    """What the scheduler tells the model, or None where that is not known."""
    config: Any = getattr(scheduler, "config", None)
    for name, make in _SPECIAL:
        if _is(scheduler, name):
            return make(config)
    if not any(_is(scheduler, name) for name in NUMBERED):
        return None
    if getattr(config, "timestep_type", None) == "continuous" and config.prediction_type == "v_prediction":
        sigmas = scheduler.sigmas[scheduler.sigmas > 0]
        return TimestepRange(
            _log_sigma(config.sigma_min or float(sigmas.min())), _log_sigma(config.sigma_max or float(sigmas.max()))
        )
    return numbered(config.num_train_timesteps)


def reads_timesteps(config: CompressionConfig) -> str | None:
    """The argument of a config for which the timestep must be understood, or None."""
    if config.has_window:
        return "start" if config.start > 0.0 else "end"
    if isinstance(config, MergeConfig) and config.is_scheduled:
        return "ratio"
    if isinstance(config, PoolConfig) and isinstance(config.alpha, tuple):
        return "alpha"
    return "seed" if config.is_random else None


# Pipelines whose names begin so call the model once for each condition, as those with a guider do.
ONE_CONDITION = (
    *(
        "Chroma",
        "CogView4",
        "Flux",
        "HunyuanSkyreels",
        "HunyuanVideo",
        "LucyEdit",
        "Lumina2",
        "QwenImage",
        "VisualCloze",
        "Wan",
    ),
)


class Pipeline:
    """What a compressed model asks of its pipeline, which it must not keep alive; nothing where there is none."""

    def __init__(self, pipeline: Any = None, lost: bool = False) -> None:
        self._had_one = lost or pipeline is not None
        # Stand-ins for a pipeline, such as types.SimpleNamespace, may know no weak references; those are kept.
        weak = hasattr(type(pipeline), "__weakref__")
        self._get: Callable[[], Any] = weakref.ref(pipeline) if weak else lambda: pipeline

    def __reduce__(self) -> tuple[type[Pipeline], tuple[None, bool]]:
        # A copied model belongs to no pipeline that we know.
        return Pipeline, (None, self._had_one)

    @property
    def scheduler(self) -> Any:
        """The scheduler that the pipeline has now."""
        return getattr(self._get(), "scheduler", None)

    def conditions(self) -> int | None:
        """How many rows of a batch belong to one picture: 1 without guidance, 2 with it; None where nobody says.

        0, which is no number that plans are shared by, where a pipeline could have said and is gone: of a copied model,
        or one that outlived its pipeline.
        Pipelines say whether they run guidance while they run, and whether rows for perturbed attention come on top.
        """
        pipeline = self._get()
        if pipeline is None:
            return 0 if self._had_one else None
        names = [cls.__name__ for cls in type(pipeline).__mro__]
        if getattr(pipeline, "guider", None) is not None or any(name.startswith(ONE_CONDITION) for name in names):
            return 1
        # Properties that look at the guidance scale of the present call; before the first there is none.
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None:
            return None
        if guided and any("InstructPix2Pix" in name for name in names):
            return 3  # with text and picture, with the picture alone, with neither
        return 1 + bool(guided) + bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
