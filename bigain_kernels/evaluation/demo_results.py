"""The numbers of the demo, and what they say about the claims of the paper."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace

import torch

from .data import load_digits
from .demo import METHODS, Demo, DemoMethod
from .metrics import (
    Fraction,
    KernelDistance,
    Measured,
    fraction_true,
    holm,
    mcnemar,
    mean,
    normal_p,
    paired_difference,
)

# What would come out by chance less often than this, in any of the comparisons, is called a difference.
LEVEL = 0.05


@dataclass(frozen=True)
class Generation:
    """One method at one guidance.

    `kid`: kernel distance from the held-out digits in the features of the small classifier. `consistency`: fraction of
    samples that the classifier takes for the digit asked for. `distance`: mean squared distance to the samples of the
    uncompressed model from the same noise.
    """

    kid: Measured
    consistency: Fraction
    distance: Measured


@dataclass(frozen=True)
class Comparison:
    """`difference` of one method from another in `what`, shown with so many digits; `p`: how likely by chance."""

    what: str
    difference: float
    p: float
    higher_is_better: bool
    digits: int


@dataclass(frozen=True)
class Row:
    """One line of the table. `difference` is the accuracy minus that of the rival on the same images, in points."""

    key: str
    title: str
    tokens: str
    images: int
    accuracy: Fraction
    rival: str | None
    difference: Comparison | None
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
        features = self.classifier.features(held_out)
        # The kernel is meant for features of order one.
        self.scale = features.square().mean().sqrt()
        self.kid = KernelDistance(features / self.scale)
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
        return self.classifier.features(self.samples[guidance][key]) / self.scale

    @torch.no_grad()
    def right(self, key: str, guidance: float) -> torch.Tensor:
        samples = self.samples[guidance][key]
        return self.classifier(samples).argmax(dim=1) == self.labels[: len(samples)]

    def generation(self, key: str, guidance: float) -> Generation:
        return Generation(
            self.kid.measure(self.features(key, guidance)),
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
            _accuracy(correct, method.key, method.rival) if method.rival and images else None,
            {guidance: judge.generation(method.key, guidance) for guidance in judge.samples},
            _seconds(demo, method.key),
            _speed(demo, method.key),
        )

    rows = _corrected_rows([row(method) for method in METHODS])
    samples = min((len(made["none"]) for made in judge.samples.values()), default=0)
    return DemoResult(rows, _notes(rows, correct, judge), samples)


def _accuracy(correct: dict[str, torch.Tensor], first: str, second: str) -> Comparison:
    return _of_outcomes("accuracy", correct[first], correct[second])


def _of_outcomes(what: str, first: torch.Tensor, second: torch.Tensor) -> Comparison:
    points = 100.0 * paired_difference(first.double(), second.double()).value
    return Comparison(what, points, mcnemar(first, second), True, 1)


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons with p-values that hold for all of them together."""
    return [replace(each, p=p) for each, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True)]


def _corrected_rows(rows: list[Row]) -> list[Row]:
    left = iter(_corrected([row.difference for row in rows if row.difference is not None]))
    return [row if row.difference is None else replace(row, difference=next(left)) for row in rows]


def verdict(comparison: Comparison) -> str:
    """ "better", "worse" or "no clear difference"."""
    if not comparison.p < LEVEL:
        return "no clear difference"
    return "better" if (comparison.difference > 0) == comparison.higher_is_better else "worse"


def shown_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"


# (first, second, who says that the first is better or None, what it is called)
_CLAIMS: tuple[tuple[str, str, str | None, str], ...] = (
    ("lgtm", "tome", "the paper", "L-GTM against ToMe"),
    ("iekvd", "todo", "the paper", "IE-KVD against ToDo"),
    ("tome_shared", "tome", "this project", "Sharing the plan, ToMe"),
    ("lgtm_shared", "lgtm", "this project", "Sharing the plan, L-GTM"),
    ("tome_proportional", "tome", None, "Proportional attention, ToMe"),
    ("lgtm_proportional", "lgtm", None, "Proportional attention, L-GTM"),
)


def claim_note(title: str, source: str | None, comparisons: list[Comparison]) -> str:
    """One line on the claim of `source` that a method is better. Without a source, it says what came out."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for each in comparisons:
        shown = f"{each.what} ({each.difference:+.{each.digits}f}, {shown_p(each.p)})"
        found[verdict(each)].append(shown)
    if source is None:
        came = "Measured, without a claim"
    elif found["worse"]:
        came = f"Not all as {source} says" if found["better"] else f"NOT as {source} says"
    else:
        came = f"As {source} says" if found["better"] else f"NOT shown here, though {source} says better"
    parts = [f"{word} in {', '.join(shown)}" for word, shown in found.items() if shown]
    return f"{title}. {came}: {'; '.join(parts)}."


def _comparisons(first: str, second: str, correct: dict[str, torch.Tensor], judge: _Judge) -> list[Comparison]:
    """All that is compared of two methods, with p-values of each comparison alone."""
    found = [_accuracy(correct, first, second)] if len(correct[first]) else []
    for guidance in judge.samples:
        features, right, apart = (
            [of(key, guidance) for key in (first, second)] for of in (judge.features, judge.right, judge.distances)
        )
        kid, distance = judge.kid.difference(*features), paired_difference(*apart)
        at = f"at guidance {guidance:g}"
        found += [
            Comparison(f"KID {at}", kid.value, normal_p(kid), False, 2),
            _of_outcomes(f"class right {at}", *right),
            Comparison(f"distance {at}", distance.value, normal_p(distance), False, 3),
        ]
    return found


def _notes(rows: list[Row], correct: dict[str, torch.Tensor], judge: _Judge) -> list[str]:
    """For each claim whether it came out; and which methods are not faster here."""
    made = [_comparisons(first, second, correct, judge) for first, second, _, _ in _CLAIMS]
    corrected = iter(_corrected([each for comparisons in made for each in comparisons]))
    notes = [
        claim_note(title, source, [next(corrected) for _ in comparisons])
        for (_, _, source, title), comparisons in zip(_CLAIMS, made, strict=True)
        if comparisons
    ]
    slower = [row.title for row in rows[1:] if row.speed < 1]
    if slower:
        notes.append(
            f"NOT faster than no compression on this CPU: {'; '.join(slower)}. The model has "
            f"{rows[0].tokens.split()[0]} tokens, so attention is a small part of its work."
        )
    notes.append(
        f"A clear difference has p below {LEVEL:g} after Holm's correction for all {sum(map(len, made))} comparisons "
        "of these lines: McNemar's exact test for accuracy and class right, normal for distance (paired) and KID."
    )
    return notes
