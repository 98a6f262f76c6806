"""The report: rows of facts, as JSON and as tables; two reports side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton

from .. import configs, machine_code
from ..launching import Launch
from . import trips
from .capture import SHAPES, Captured, Shape, capture
from .model import Compiled, Facts, examine
from .sass import disassemble

ARCHITECTURE = "sm_90"
# What L-GTM launches around an attention layer.
LGTM = ("lgtm_plan", "token_merge", "token_unmerge")
LGTM_WINDOW = ("lgtm_plan_window", *LGTM[1:])
Row = dict[str, Any]


class Compiler:
    """Compiles launches and reads their machine code, each different one once."""

    def __init__(self, architecture: str = ARCHITECTURE) -> None:
        self.architecture = architecture
        self._found: dict[str, Compiled] = {}

    def key(self, launch: Launch) -> str:
        """What tells one binary from another."""
        kernel = launch.kernel
        options = {name: value for name, value in launch.arguments.items() if name not in kernel.arg_names}
        return repr((launch.name, machine_code.specialize(launch), sorted(options.items())))

    def __call__(self, launch: Launch) -> Compiled:
        key = self.key(launch)
        if key not in self._found:
            compiled = machine_code.compile_case(launch, self.architecture)
            registers, spills, shared = machine_code.usage(compiled)
            (function,) = disassemble(compiled.asm["cubin"]).values()
            texts = compiled.asm["ttgir"], compiled.asm["ptx"]
            warps = compiled.metadata.num_warps
            self._found[key] = Compiled(function, registers, spills, shared, warps, 0.0, *texts)
        return self._found[key]

    def facts(self, launch: Launch) -> Facts:
        """All that the report says of a launch."""
        return examine(launch, self(launch), trips.count(launch))


def config_of(launch: Launch) -> dict[str, Any]:
    """The constants and options of a launch that a config decides."""
    names = {name for op in configs.table(ARCHITECTURE)["ops"].values() for each in op["candidates"] for name in each}
    return {name: value for name, value in launch.arguments.items() if name in names or name == "SPLIT"}


def row(captured: Captured, facts: Facts) -> Row:
    shape, op, launch = captured
    head = {"shape": shape.name, "op": op, "kernel": launch.name, "config": config_of(launch), "grid": launch.grid}
    return facts_row(head, facts)


def facts_row(head: Row, facts: Facts) -> Row:
    """A row of what tells the launch and what is known of it."""
    bound = max((name for name in facts.terms if name != "launch"), key=lambda name: facts.terms[name])
    return {**head, **_rounded(facts.as_dict()), "bound_by": bound}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 2) if isinstance(value, float) else value


def rows(shapes: tuple[Shape, ...] = SHAPES, compiler: Compiler | None = None) -> Iterator[Row]:
    """A row for every launch at every shape."""
    compiler = compiler or Compiler()
    for captured in capture(shapes):
        yield row(captured, compiler.facts(captured.launch))


def sums(found: Iterable[Row], ops: tuple[str, ...] = LGTM) -> dict[str, float]:
    """Predicted microseconds of some ops by shape."""
    total: dict[str, float] = {}
    for each in found:
        if each["op"] in ops:
            total[each["shape"]] = total.get(each["shape"], 0.0) + each["predicted"]
    return total


def document(found: list[Row], compiler: str = f"triton {triton.__version__}") -> dict[str, Any]:
    """The content of a file of predictions."""
    note = "PREDICTED from machine code by the model of docs/performance.md; nothing here was measured"
    return {"note": note, "architecture": ARCHITECTURE, "compiler": compiler, "rows": found}


def dump(found: dict[str, Any]) -> str:
    """JSON with a line a row."""
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in found.items() if key != "rows"]
    lines = ",\n".join(f"    {json.dumps(each)}" for each in found["rows"])
    return "\n".join(["{", *head, '  "rows": [', lines, "  ]", "}"]) + "\n"


def markdown(found: list[Row]) -> Iterator[str]:
    """The rows as a table, and the sums."""
    yield "| shape | kernel | predicted us | bound by | programs | waves, filled | registers | resident |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in found:
        yield (
            f"| {each['shape']} | {each['kernel']} | {each['predicted']:.1f} | {_terms(each)} |"
            f" {each['programs']} | {each['waves']:.2f}, {each['wave_efficiency']:.2f} | {each['registers']} |"
            f" {each['resident']} |"
        )
    yield ""
    yield "| shape | kernel | instructions | issue cycles | depth | barriers | MB: HBM, L2, L1 | loops |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in found:
        sizes = ", ".join(f"{each[name] / 1e6:.1f}" for name in ("hbm_bytes", "l2_bytes", "l1_bytes"))
        yield (
            f"| {each['shape']} | {each['kernel']} | {each['instructions']:.0f} | {each['issue_cycles']:.0f} |"
            f" {each['depth']} | {each['barriers']:.0f} | {sizes} | {'; '.join(map(_loop, each['loops']))} |"
        )
    yield ""
    for kind, ops in (("", LGTM), (" within a window", LGTM_WINDOW)):
        texts = (f"{name} {value:.1f}" for name, value in sums(found, ops).items())
        if any(each["op"] == ops[0] for each in found):
            yield f"predicted us of L-GTM{kind}: " + ", ".join(texts)


def _terms(each: Row) -> str:
    others = sorted(((value, name) for name, value in each["terms"].items() if name != "launch"), reverse=True)
    return ", ".join(f"{name} {value:.1f}" for value, name in others[:3])


def _loop(loop: Row) -> str:
    text = f"{loop['line']}: {loop['instructions']:.0f} x {loop['trips']:g}"
    return f"{text}, tensor {loop['ceiling']:.2f}" if loop["tensor"] else text


def side_by_side(before: list[Row], after: list[Row]) -> Iterator[str]:
    """Kernel by kernel, what two reports predict."""
    old = {(each["shape"], each["op"], each["kernel"]): each for each in before}
    yield "| shape | kernel | predicted us | instructions | ceiling | depth | programs |"
    yield "|---|---|---|---|---|---|---|"
    for each in after:
        was = old.get((each["shape"], each["op"], each["kernel"]))

        def pair(name: str, digits: int, was: Row | None = was, each: Row = each) -> str:
            return f"{_value(was, name, digits)} -> {_value(each, name, digits)}"

        columns = [pair("predicted", 1), pair("instructions", 0), pair("ceiling", 2), pair("depth", 0)]
        yield f"| {each['shape']} | {each['kernel']} | {' | '.join([*columns, pair('programs', 0)])} |"
    old_sums, new_sums = sums(before), sums(after)
    yield ""
    texts = (f"{name} {old_sums.get(name, 0):.1f} -> {value:.1f}" for name, value in new_sums.items())
    yield "predicted us of L-GTM: " + ", ".join(texts)


def _value(each: Row | None, name: str, digits: int) -> str:
    if each is None:
        return "none"
    if name == "ceiling":
        value = max((loop["ceiling"] for loop in each["loops"]), default=0.0)
        return f"{value:.2f}" if value else "none"
    return f"{each[name]:.{digits}f}"


def read(path: Path) -> list[Row]:
    """The rows of a file of predictions."""
    return json.loads(path.read_text())["rows"]
