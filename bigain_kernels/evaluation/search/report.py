"""A search in words: tables, and whether held-out images confirm it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ...methods.mixed import parts_of
from ..metrics import Measured
from .search import SAME_SPEED, Result

# Standard errors by which two numbers differ by more than chance.
_SURE = 2.0
# Fractions by which a sum is far from the whole.
_FAR = 0.05
_FAR_ERROR = 0.25


def _pm(value: Measured) -> str:
    return f"{value.value:+.2f} ± {value.error:.2f}"


def confirmed(result: Result) -> bool:
    """Whether held-out images meet the goal; a speed up to `SAME_SPEED` of it."""
    if result.goal.speed is not None:
        return result.found.speed >= result.goal.speed * SAME_SPEED
    return result.found.rise.value <= result.goal.percent


def notes(result: Result) -> list[str]:
    """What the numbers say, a sentence each."""
    found, verified, speed = result.found, result.verified[0], result.found.speed
    wanted = f"{result.goal.speed:g}x" if result.goal.speed is not None else f"at most {result.goal.percent:g} %"
    came = f"{speed:.2f}x" if result.goal.speed is not None else f"{_pm(found.rise)} %"
    verdict = "confirm it" if confirmed(result) else "do not confirm it"
    said = [f"Held-out images {verdict}: {wanted} was asked for, and they give {came}."]
    apart = found.rise.value - verified.value
    sure = _SURE * math.hypot(found.rise.error, verified.error)
    if apart > sure:
        said.append(
            f"The error rises more on them than on the images of the search, by {apart:.2f} points of percent: more or "
            "other images would choose better."
        )
    summed, whole = result.predicted[0], verified.value
    if abs(summed - whole) > max(_SURE * verified.error, _FAR_ERROR * abs(whole)):
        said.append(f"The sum over blocks, {summed:+.2f} %, is far from what they do together, {whole:+.2f} %.")
    promised, real = result.predicted[1], result.verified[1]
    if abs(promised / real - 1) > _FAR:
        said.append(f"The times of single blocks promised {promised:.2f}x, together they give {real:.2f}x.")
    rivals = result.rivals
    if not rivals:
        said.append(f"Nothing that is the same in all blocks is as fast (within {1 - SAME_SPEED:.0%}).")
        return said
    best = rivals[0]
    if best.more.value > _SURE * best.more.error:
        word = "beats"
    else:
        word = "does not beat" if best.more.value < -_SURE * best.more.error else "cannot be told from"
    said.append(
        f"It {word} the best that is the same in all blocks and as fast, {best.name}, by {_pm(best.more)} points of "
        f"percent of the error ({speed:.2f}x against {best.speed:.2f}x)."
    )
    return said


def summary(result: Result, heading: str) -> str:
    """What was found and how it stands, as Markdown."""
    lines = [f"# {heading}", "", f"Looked for: {result.goal}.", "", *(f"* {note}" for note in notes(result)), ""]
    lines += ["| group | blocks | given | error alone, % | time saved alone, % |", "|---|---|---|---|---|"]
    by_group = {choice.group.name: choice for choice in result.chosen}
    for group in result.groups:
        blocks = ", ".join(map(str, group.blocks))
        choice = by_group.get(group.name)
        cells = ["-", "", ""] if choice is None else [choice.candidate.brief(), _pm(choice.rise), _saved(choice.saved)]
        lines.append(f"| {' | '.join([group.name, blocks, *cells])} |")
    rise, speed = result.verified
    lines += [
        "",
        "| what was found | error, % | speed |",
        "|---|---|---|",
        f"| sum over groups | {result.predicted[0]:+.2f} | {result.predicted[1]:.2f}x |",
        f"| together, images of the search | {_pm(rise)} | {speed:.2f}x |",
        f"| together, held-out images | {_pm(result.found.rise)} | {result.found.speed:.2f}x |",
        "",
        "| on held-out images | error, % | more than what was found | speed |",
        "|---|---|---|---|",
        f"| **found** | {_pm(result.found.rise)} | | {result.found.speed:.2f}x |",
    ]
    for row in sorted(result.others, key=lambda row: row.rise.value):
        as_fast = "" if row in result.rivals else ", slower"
        lines.append(f"| {row.name}, all groups{as_fast} | {_pm(row.rise)} | {_pm(row.more)} | {row.speed:.2f}x |")
    lines += [
        "",
        "Errors are rises of the mean squared denoising error, in percent of that of the model as it is, with standard "
        "errors over images; differences are paired. Speeds are medians over turns that all configs take.",
    ]
    if result.left_out:
        lines += ["", "Left out, because the model refuses it:", ""]
        lines += [f"* {group}, {what}: {why}" for group, what, why in result.left_out]
    return "\n".join(lines) + "\n"


def markdown(result: Result, heading: str) -> str:
    """The whole report: `summary`, and what every candidate does in every group."""
    lines = ["", "## All that was measured", "", "| group | given | error, % | time saved, % |", "|---|---|---|---|"]
    for choice in result.measured:
        cells = [choice.group.name, choice.candidate.brief(), _pm(choice.rise), _saved(choice.saved)]
        lines.append(f"| {' | '.join(cells)} |")
    return summary(result, heading) + "\n".join(lines) + "\n"


def _saved(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def numbers(result: Result) -> dict[str, Any]:
    """The same as JSON values."""
    rows = [result.found, *result.others]
    return {
        "goal": asdict(result.goal),
        "confirmed": confirmed(result),
        "notes": notes(result),
        "configs": [part.settings() for part in parts_of(result.config)],
        "predicted": dict(zip(("rise", "speed"), result.predicted, strict=True)),
        "calibration": {"rise": asdict(result.verified[0]), "speed": result.verified[1]},
        "held_out": [
            {"name": row.name, "rise": asdict(row.rise), "more": asdict(row.more), "speed": row.speed} for row in rows
        ],
        "measured": [
            {
                "group": choice.group.name,
                "blocks": choice.group.blocks,
                "given": choice.candidate.brief(),
                "rise": asdict(choice.rise),
                "saved": choice.saved,
                "chosen": choice in result.chosen,
            }
            for choice in result.measured
        ],
        "left_out": [dict(zip(("group", "given", "reason"), row, strict=True)) for row in result.left_out],
        "seconds": result.seconds,
    }
