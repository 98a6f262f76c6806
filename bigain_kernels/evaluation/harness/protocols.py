"""Protocols by name: what is asked, and how an image is brought to the size of the model."""

from __future__ import annotations

from dataclasses import dataclass

from ..classify import ClassifierConfig, default_stages
from .rules import Rule, Stages


def published_timesteps(samples: tuple[int, ...], steps: int = 1000) -> tuple[int, ...]:
    """The timesteps of the published classifier, in the order in which its stages ask for them.

    The last stage has `samples[-1]` timesteps, evenly spread with half a spacing at each end. An earlier stage takes
    every so many of them, again from the middle of each part, and later stages those that are left, ascending. For (5,
    20) these are 125, 325, 525, 725, 925 and then the other 15 of 25, 75, ..., 975.

    Args:
        samples: noise samples after each stage; each divides the last.
        steps: length of the schedule.

    Raises:
        ValueError: the numbers do not divide.
    """
    most = samples[-1]
    if any(most % n for n in samples) or not 1 <= most <= steps // 2:
        raise ValueError(f"samples: got {samples}, expected divisors of the last, which is at most {steps // 2}")
    every = [steps // most // 2 + i * (steps // most) for i in range(most)]
    found: list[int] = []
    for n in samples:
        part = most // n
        found += [t for t in every[part // 2 :: part][:n] if t not in found]
    return tuple(found)


@dataclass(frozen=True)
class Protocol:
    """How images are classified.

    Attributes:
        rule: what is asked, for K classes.
        timesteps: of the samples in turn.
        transform: "paper" resizes the shorter side (bicubic, as a whole number of pixels) and crops the centre; "fit"
            crops to the shape of the model first.
        plans: where merge plans come from, see `kept_plans`.
        half_errors: whether errors are rounded to float16, in which the published code takes their means.
    """

    rule: Rule
    timesteps: tuple[int, ...]
    transform: str
    plans: str
    half_errors: bool = False


NAMES = ("paper", "ours")


def protocol(name: str, classes: int, *, merges: bool = False, half_errors: bool = False) -> Protocol:
    """A protocol by name.

    Args:
        name: "paper": 5 samples for all classes, 20 for the best 5, the mean of l2 errors, plans of each class its own.
            "ours": the default of `ClassifierConfig` with stages for the number of classes, standardised scores, and
            plans of the null prompt.
        classes: K, of which the first stage keeps no more.
        merges: whether the method builds plans.
        half_errors: round errors as the published code does ("paper" alone).

    Raises:
        ValueError: there is no such protocol.
    """
    if name not in NAMES:
        raise ValueError(f"protocol: got {name!r}, expected one of {list(NAMES)}")
    if name == "paper":
        stages = ((5, min(5, classes)), (20, 1)) if classes > 1 else ((20, 1),)
        return Protocol(Stages(stages), published_timesteps((5, 20)), "paper", "own", half_errors)
    config = ClassifierConfig()
    return Protocol(Stages(default_stages(classes), config.score), config.timesteps, "fit", "null" if merges else "own")
