"""What the drawings of an experiment are like: the table of its generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fidelity import FEWEST_FOR_INFINITY, FrechetDistance, inception_score, precision_recall, ssim, what_is_missing
from ..images import DamagedImage, read_whole
from ..metrics import KernelDistance, Measured, mean, psnr
from .drawing import read_drawings
from .judges import Judge, Judges, Look, as_published
from .reproduce import Part, Reproduction
from .tables import Line, Table, interval, number

# Pictures in memory at a time.
_BATCH = 16
# Precision and recall look at the third neighbour.
_FEWEST = 4
_NONE = Measured(math.nan, math.nan)


@dataclass(frozen=True)
class Drawn:
    """The drawings of one method, measured; NaN where there was nothing to measure with."""

    kid: Measured = _NONE
    fid: float = math.nan
    fid_endless: float = math.nan
    score: Measured = _NONE
    precision: float = math.nan
    recall: float = math.nan


def _batches(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(paths), _BATCH):
        yield paths[first : first + _BATCH]


def _looks(judge: Judge, pictures: Iterable[Tensor]) -> Look:
    found = [judge.look(images) for images in pictures]
    return Look(*(torch.cat(part) for part in zip(*found, strict=True)))


class _Measuring:
    """All that is measured of one method after the other."""

    def __init__(self, job: Reproduction, judges: Judges) -> None:
        self._job, self._judges = job, judges
        self._paths, _ = job.draws()
        self.missing = list(judges.missing)
        self.references = 0
        reason = what_is_missing()
        self._has_torchmetrics = reason is None
        if reason is not None:
            self.missing.append(f"FID, IS and SSIM: {reason}")
        self._judge = judges.features
        if self._judge is not None and len(self._paths) < _FEWEST:
            self.missing.append(
                f"KID, FID, IS, precision and recall: {len(self._paths)} drawings, fewer than {_FEWEST}"
            )
            self._judge = None
        if self._judge is not None:
            self._real = self._reference(self._judge)
            self.references = len(self._real)
            self._kernel = KernelDistance(self._real)
            self._frechet = FrechetDistance(self._real) if self._has_torchmetrics else None

    def _reference(self, judge: Judge) -> Tensor:
        """Features of the images of the data set, as they are classified, or whole as published."""
        images = self._job.images
        read: Callable[[int], Tensor] = images.read
        items = len(images.paths)
        if self._job.is_published_view:
            paths = images.references or images.paths
            items = len(paths)

            def read(i: int) -> Tensor:
                return as_published(read_whole(images.root / paths[i])[None], jpeg=False)[0]

        def readable() -> Iterator[Tensor]:
            for i in range(items):
                try:
                    yield read(i)[None]
                except DamagedImage:  # counted where images are classified
                    continue

        return _looks(judge, readable()).features

    def drawings(self, part: Part, paths: Sequence[str]) -> Tensor:
        return read_drawings(part.folder.path, paths)[:, : self._job.checkpoint.image_shape[0]]

    def against_data(self, part: Part) -> Drawn:
        """Distances to the images of the data set."""
        if self._judge is None:
            return Drawn()
        pictures = (self.drawings(part, paths) for paths in _batches(self._paths))
        if self._job.is_published_view:
            pictures = (as_published(images, jpeg=True) for images in pictures)
        seen = _looks(self._judge, pictures)
        kid = self._kernel.measure(seen.features)
        precision, recall = precision_recall(seen.features, self._real)
        if self._frechet is None:
            return Drawn(kid, precision=precision, recall=recall)
        fid, endless = self._frechet.measure(seen.features), math.nan
        if len(seen.features) >= FEWEST_FOR_INFINITY:
            endless = self._frechet.at_infinity(seen.features)
        return Drawn(kid, fid, endless, inception_score(seen.logits), precision, recall)

    def against_text(self, part: Part) -> Measured:
        """The CLIP score."""
        if self._judges.clip is None:
            return _NONE
        texts = dict(zip(self._paths, self._job.texts(), strict=True))
        scores = [
            self._judges.clip.score(self.drawings(part, paths), [texts[path] for path in paths])
            for paths in _batches(self._paths)
        ]
        return mean(torch.cat(scores))

    def against_each_other(self, part: Part, base: Part) -> tuple[float, float]:
        """Mean PSNR and SSIM to the drawings of the first method."""
        noise, likeness = [], []
        for paths in _batches(self._paths if part is not base else ()):
            drawn, plain = self.drawings(part, paths), self.drawings(base, paths)
            noise.append(psnr(drawn, plain))
            if self._has_torchmetrics:
                likeness.append(ssim(drawn, plain))
        return _mean(noise), _mean(likeness)


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).mean()) if parts else math.nan


def _score(value: Measured) -> str:
    if math.isnan(value.value):
        return "-"
    return f"{value.value:.2f}" + ("" if math.isnan(value.error) else f" +- {value.error:.2f}")


def generation_table(job: Reproduction, judges: Judges) -> tuple[Table | None, list[str]]:
    """What the drawings are like, and what was not measured of them; None while the first method has not all."""
    finished = [part for part in job.drawn if part.folder.done() == part.folder.shards]
    seeds = job.experiment.generate.seeds if job.experiment.generate else ()
    first = {part.method.title: part for part in finished if part.seed == seeds[0]}
    base = first.get(job.experiment.methods[0].title)
    if base is None:
        return None, []
    measuring = _Measuring(job, judges)
    drawings = len(job.draws()[0])
    lines = []
    for title, part in first.items():
        found, text = measuring.against_data(part), measuring.against_text(part)
        noise, likeness = measuring.against_each_other(part, base)
        paper = part.method.paper.get("FID")
        cells = [
            interval(found.kid),
            number(found.fid),
            number(found.fid_endless),
            "-" if paper is None else f"{paper:.2f}",
            _score(found.score),
            number(found.precision, 3),
            number(found.recall, 3),
            interval(text, 2),
            number(noise),
            number(likeness, 4),
        ]
        points = {"KID": found.kid.value, "FID": found.fid, "FID inf": found.fid_endless, "IS": found.score.value}
        points |= {"precision": found.precision, "recall": found.recall, "CLIP": text.value}
        points |= {"PSNR": noise, "SSIM": likeness}
        lines.append(Line(title, cells, {name: value for name, value in points.items() if not math.isnan(value)}))
    columns = ["method", "KID", f"FID of {drawings}", "FID inf", "paper FID", "IS", "precision", "recall", "CLIP"]
    return Table(
        "Generation", [*columns, "PSNR dB", "SSIM"], lines, _caption(job, measuring, judges)
    ), measuring.missing


def _caption(job: Reproduction, measuring: _Measuring, judges: Judges) -> str:
    plain = job.experiment.methods[0].title
    generate = job.experiment.generate
    of = f" of the first seed, {generate.seeds[0]}" if generate and len(generate.seeds) > 1 else ""
    against = f"{measuring.references} images of the data set"
    if job.is_published_view:
        against += ", whole, and drawings through JPEG, both squashed to 299 x 299 as published"
    seen = "not measured"
    if judges.features is not None and measuring.references:
        seen = f"in the features of {judges.features.name}, against {against}"
    return (
        f"{len(job.draws()[0])} drawings{of}. KID, FID, precision and recall: {seen}. KID is unbiased, with its 95 % "
        "interval (jackknife). FID is biased by the number of drawings in its heading; FID inf is what endless ones "
        "would have, by a line through parts. IS: mean and deviation over ten parts. CLIP: 100 times the cosine to "
        f"the prompt, with its 95 % interval. PSNR and SSIM: mean over drawings, against those of {plain} from the "
        "same noise. paper FID: the paper's, comparable where data, features and numbers of drawings are."
    )
