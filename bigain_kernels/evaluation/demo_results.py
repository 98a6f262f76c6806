"""The numbers of the demo, and what they say about the claims of the paper."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import torch

from .data import load_digits
from .demo import METHODS, Demo, DemoMethod
from .metrics import FrechetDistance, Measured, fraction_true, mean, paired_difference

# Differences of more than this many standard errors are called differences.
_CLEAR = 2.0


@dataclass(frozen=True)
class Generation:
    """One method at one guidance.

    `frechet`: distance from the held-out digits in the features of the small classifier. `consistency`: fraction of
    samples that the classifier takes for the digit asked for. `distance`: mean squared distance to the samples of the
    uncompressed model from the same noise.
    """

    frechet: Measured
    consistency: Measured
    distance: Measured


@dataclass(frozen=True)
class Row:
    """One line of the table. `difference` is the accuracy minus that of the rival on the same images."""

    key: str
    title: str
    tokens: str
    images: int
    accuracy: Measured
    rival: str | None
    difference: Measured | None
    generation: dict[float, Generation]
    seconds: float
    speed: float


@dataclass(frozen=True)
class DemoResult:
    """The table and the lines under it. `samples` counts the samples for each guidance."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: int = 0


def _titles() -> dict[str, str]:
    return {method.key: method.title for method in METHODS}


def _seconds(demo: Demo, key: str) -> float:
    """Time of all the work, as median time of a chunk times the chunks: what else the machine did falls away."""
    jobs = demo.outcomes[key].seconds.values()
    return sum(statistics.median(chunks) * len(chunks) for chunks in jobs if chunks)


def _speed(demo: Demo, key: str) -> float:
    """Median over the chunks of the time that "none" took over the time this method took."""
    ratios = []
    for job in ("classify", "generate"):
        mine, none = demo.outcomes[key].seconds[job], demo.outcomes["none"].seconds[job]
        ratios += [base / own for base, own in zip(none, mine, strict=False)]
    return statistics.median(ratios) if ratios else math.nan


class _Judge:
    """The features and labels that the small classifier gives to the samples."""

    @torch.no_grad()
    def __init__(self, demo: Demo) -> None:
        self.classifier = demo.classifier
        held_out = torch.cat([load_digits("validation").images, load_digits("test").images])
        self.frechet = FrechetDistance(self.classifier.features(held_out))
        # An interrupted demo may be ahead in some methods; only what all have done is compared.
        self.samples: dict[float, dict[str, torch.Tensor]] = {}
        for guidance in demo.config.guidances:
            made = {key: o.samples[guidance] for key, o in demo.outcomes.items() if guidance in o.samples}
            if len(made) == len(METHODS):
                count = min(len(samples) for samples in made.values())
                self.samples[guidance] = {key: samples[:count] for key, samples in made.items()}
        self.labels = demo.labels

    def distances(self, key: str, guidance: float) -> torch.Tensor:
        """(n,) mean squared distance of each sample to the uncompressed one."""
        made = self.samples[guidance]
        return (made[key] - made["none"]).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def features(self, key: str, guidance: float) -> torch.Tensor:
        return self.classifier.features(self.samples[guidance][key])

    @torch.no_grad()
    def right(self, key: str, guidance: float) -> torch.Tensor:
        samples = self.samples[guidance][key]
        return self.classifier(samples).argmax(dim=1) == self.labels[: len(samples)]

    def generation(self, key: str, guidance: float) -> Generation:
        return Generation(
            self.frechet.measure(self.features(key, guidance)),
            fraction_true(self.right(key, guidance)),
            mean(self.distances(key, guidance)),
        )


def summarise(demo: Demo) -> DemoResult:
    """The results of a demo that has run, or has been interrupted: of the images and samples all methods have done."""
    judge, titles = _Judge(demo), _titles()
    images = min(len(outcome.correct) for outcome in demo.outcomes.values())
    correct = {key: outcome.correct[:images] for key, outcome in demo.outcomes.items()}

    def row(method: DemoMethod) -> Row:
        outcome = demo.outcomes[method.key]
        return Row(
            method.key,
            method.title,
            outcome.tokens,
            images,
            fraction_true(correct[method.key]),
            titles[method.rival] if method.rival else None,
            _difference(correct, method.key, method.rival) if method.rival else None,
            {guidance: judge.generation(method.key, guidance) for guidance in judge.samples},
            _seconds(demo, method.key),
            _speed(demo, method.key),
        )

    rows = [row(method) for method in METHODS]
    samples = min((len(made["none"]) for made in judge.samples.values()), default=0)
    return DemoResult(rows, _notes(rows, correct, judge), samples)


def _difference(correct: dict[str, torch.Tensor], first: str, second: str) -> Measured:
    return paired_difference(correct[first].double(), correct[second].double())


def verdict(difference: Measured, higher_is_better: bool) -> str:
    """ "better", "worse" or "no clear difference"."""
    gain = difference.value if higher_is_better else -difference.value
    if abs(gain) <= _CLEAR * difference.error or gain == 0:
        return "no clear difference"
    return "better" if gain > 0 else "worse"


# (first, second, who says that the first is better or None, what it is called)
_CLAIMS: tuple[tuple[str, str, str | None, str], ...] = (
    ("lgtm", "tome", "the paper", "L-GTM against ToMe"),
    ("iekvd", "todo", "the paper", "IE-KVD against ToDo"),
    ("tome_shared", "tome", "this project", "Sharing the plan, ToMe"),
    ("lgtm_shared", "lgtm", "this project", "Sharing the plan, L-GTM"),
    ("tome_proportional", "tome", None, "Proportional attention, ToMe"),
    ("lgtm_proportional", "lgtm", None, "Proportional attention, L-GTM"),
)


def claim_note(title: str, source: str | None, measured: list[tuple[str, Measured, bool, int]]) -> str:
    """One line on the claim of `source` that a method is better, from (what, difference, higher is better, digits).

    Without a source nothing was claimed, and the line says what came out.
    """
    found: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for what, difference, higher, digits in measured:
        shown = f"{what} ({difference.value:+.{digits}f} ± {difference.error:.{digits}f})"
        found[verdict(difference, higher)].append(shown)
    if source is None:
        came = "Measured, without a claim"
    elif found["worse"]:
        came = f"Not all as {source} says" if found["better"] else f"NOT as {source} says"
    else:
        came = f"As {source} says" if found["better"] else f"NOT shown here, though {source} says better"
    parts = [f"{word} in {', '.join(shown)}" for word, shown in found.items() if shown]
    return f"{title}. {came}: {'; '.join(parts)}."


def _notes(rows: list[Row], correct: dict[str, torch.Tensor], judge: _Judge) -> list[str]:
    """For each claim whether it came out; and which methods are not faster here."""
    notes = []
    for first, second, source, title in _CLAIMS:
        measured: list[tuple[str, Measured, bool, int]] = []
        if len(correct[first]) > 1:
            points = paired_difference(100.0 * correct[first].double(), 100.0 * correct[second].double())
            measured.append(("accuracy", points, True, 1))
        for guidance in judge.samples:
            features, right, apart = (
                [of(key, guidance) for key in (first, second)] for of in (judge.features, judge.right, judge.distances)
            )
            points = paired_difference(100.0 * right[0].double(), 100.0 * right[1].double())
            at = f"at guidance {guidance:g}"
            measured += [
                (f"Frechet {at}", judge.frechet.difference(features[0], features[1]), False, 1),
                (f"class right {at}", points, True, 1),
                (f"distance {at}", paired_difference(apart[0], apart[1]), False, 3),
            ]
        notes.append(claim_note(title, source, measured))
    for guidance in judge.samples:
        plain = rows[0].generation[guidance].frechet.value
        below = [row.title for row in rows[1:] if row.generation[guidance].frechet.value < plain]
        if below:
            notes.append(
                f"At guidance {guidance:g} the Frechet distance of {'; '.join(below)} is below that of no compression. "
                "That is no better image: look at the samples. Guidance narrows the uncompressed samples, and the "
                "features of a digit classifier hardly see grain. The distance to the uncompressed samples does."
            )
    slower = [row.title for row in rows[1:] if row.speed < 1]
    if slower:
        notes.append(
            f"NOT faster than no compression on this CPU: {'; '.join(slower)}. The model has "
            f"{rows[0].tokens.split()[0]} tokens, so attention is a small part of its work."
        )
    notes.append(f"A clear difference is more than {_CLEAR:g} standard errors of the paired difference.")
    return notes
