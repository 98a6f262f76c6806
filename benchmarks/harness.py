"""What the benchmarks share: providers, checks before times, floors, rows, and the command line of each module.

A benchmark module has `OP`, `build(problem, x)` and, where the project asks for a ratio, `TARGETS`. A provider whose
result does not pass the check gets no row, and the run ends with status 1.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bigain_kernels as bk
from bigain_kernels import backends, native
from bigain_kernels.timing import MODES, Call, Timing, time_cpu, time_cuda

from . import machine
from .problems import DEFAULT, PROBLEMS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = [
    *("op", "problem", "dtype", "provider", "mode", "median_us", "p20_us", "p80_us", "floor_us"),
    *("bytes", "flops", "device", "torch", "triton", "commit", "command"),
]


@dataclass(frozen=True)
class Case:
    """What to run for one problem.

    Attributes:
        providers: what computes the result, by name.
        check: raises AssertionError when a provider's result is wrong.
        bytes: least number of bytes to move, inputs once and outputs once.
        flops: of the matrix products that cannot be avoided.
    """

    providers: Mapping[str, Call]
    check: Callable[[str, Any], None]
    bytes: int
    flops: int = 0


class Row(NamedTuple):
    """One line of the results."""

    op: str
    problem: str
    dtype: str
    provider: str
    mode: str
    timing: Timing
    floor: float
    bytes: int
    flops: int


@dataclass
class Session:
    """Options of a run, and what it found."""

    device: str
    dtype: str
    problems: tuple[str, ...]
    providers: tuple[str, ...] | None = None
    seconds: float = 0.1
    csv: Path | None = None
    deadline: float | None = None
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def is_late(self, op: str, problem: str) -> bool:
        """Whether the time is over; then notes that the problem was left out."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late:
            self.failures.append(f"{op} {problem}: not run, out of time")
        return late


def own_backends(op: str, device: str) -> list[str]:
    """The compiled backends that implement an op on a device type, the preferred one first."""
    found = []
    for name in backends.order(device):
        if name != "reference":
            with bk.use_backend(name):
                try:
                    backends.choose(op, device)
                except backends.BackendUnavailable:
                    continue
            found.append(name)
    return found


def on(backend: str, call: Call) -> Call:
    """`call` with the ops on one backend."""

    def run() -> object:
        with bk.use_backend(backend):
            return call()

    return run


def standard(op: str, device: str, call: Call, reference: Call) -> dict[str, Call]:
    """The providers that every op has: our backends, the reference as it is and compiled."""
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    ours = {name: on(name, call) for name in own_backends(op, device)}
    return {**ours, "reference": reference, "compiled": compiled}


def has_tomesd() -> bool:
    return find_spec("tomesd") is not None


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes a second of a large copy, FLOPs a second of a large matrix product), measured here and now.

    On a CPU the inputs of small problems stay in the cache, whose bandwidth is higher: there, shares of the floor above
    100 % are possible.
    """
    size, side = (1 << 28, 8192) if device == "cuda" else (1 << 26, 1024)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def copy() -> object:
        return target.copy_(source)

    if device == "cuda":
        times = {"copy": time_cuda(copy), "matmul": time_cuda(lambda: a @ b)}
    else:
        times = {**time_cpu({"copy": copy}, 0.5), **time_cpu({"matmul": lambda: a @ b}, 0.5)}
    # A ceiling is what the machine can do, so the better times count.
    return 2 * size / times["copy"].p20 * 1e6, 2 * side**3 / times["matmul"].p20 * 1e6


def _times(case: Case, session: Session) -> dict[tuple[str, str], Timing]:
    """The times of the providers that pass the check, by provider and mode."""
    good: dict[str, Call] = {}
    for name, call in case.providers.items():
        if session.providers is not None and name not in session.providers:
            continue
        try:
            case.check(name, call())
        except AssertionError as error:
            session.failures.append(f"{name}: {str(error).strip().splitlines()[0] if str(error) else 'wrong result'}")
            continue
        good[name] = call
    if session.device == "cpu":
        # Compiled code brings an OpenMP of its own, whose idle threads spin and take the cores from the others.
        groups = [{name: good[name] for name in good if (name == "compiled") == apart} for apart in (False, True)]
        times = [time_cpu(group, session.seconds * len(group) * 2) for group in groups if group]
        return {(name, "eager"): timing for group in times for name, timing in group.items()}
    return {(name, mode): time_cuda(call, mode, session.seconds) for name, call in good.items() for mode in MODES}


def run(module: Any, session: Session) -> None:
    """Run one benchmark module over the problems of a session; prints a line per row."""
    op, targets = module.OP, getattr(module, "TARGETS", {}).get(session.device, {})
    ours = own_backends(op, session.device)
    for name in session.problems:
        if name in getattr(module, "SKIP", ()):
            continue
        if session.is_late(op, name):
            continue
        problem = PROBLEMS[name]
        torch.compiler.reset()
        case = module.build(problem, problem.make(session.device, DTYPES[session.dtype]))
        times = run_case(session, op, name, case, ours)
        judge(session, op, name, times, {other: ratio for (where, other), ratio in targets.items() if where == name})


def run_case(session: Session, op: str, name: str, case: Case, ours: Sequence[str]) -> dict[tuple[str, str], Timing]:
    """Check and time the providers of one case, add its rows and print them; `ours` are compared with the others."""
    bandwidth, rate = ceilings(session.device, DTYPES[session.dtype])
    known = len(session.failures)
    times = _times(case, session)
    session.failures[known:] = [f"{op} {name} {failure}" for failure in session.failures[known:]]
    floor = max(case.bytes / bandwidth, case.flops / rate) * 1e6
    rows = [
        Row(op, name, session.dtype, provider, mode, timing, floor, case.bytes, case.flops)
        for (provider, mode), timing in times.items()
    ]
    session.rows += rows
    if session.csv is not None:
        # At once: a run that is cut off leaves what it has measured.
        write_csv(session.csv, session.device, rows)
    print_times(op, name, times, floor, ours)
    return times


def judge(
    session: Session, op: str, problem: str, times: Mapping[tuple[str, str], Timing], targets: Mapping[str, float]
) -> None:
    """Say how many times faster than others our first backend is, where the project asks for it."""
    first = next((name for name in own_backends(op, session.device) if (name, "eager") in times), None)
    for other, ratio in targets.items():
        if first is None or (other, "eager") not in times:
            continue
        reached = times[other, "eager"].median / times[first, "eager"].median
        print(f"    target: {ratio:g}x faster than {other}: {reached:.2f}x, {'met' if reached >= ratio else 'MISSED'}")
        if reached < ratio:
            session.failures.append(f"{op} {problem}: {reached:.2f}x faster than {other}, target {ratio:g}x")


def print_times(
    op: str, problem: str, times: Mapping[tuple[str, str], Timing], floor: float, ours: Iterable[str]
) -> None:
    """A block for one problem: time with its spread, share of the floor, and speed of our first backend over each."""
    print(f"{op} {problem}" + (f": floor {floor:.1f} us" if floor else ""))
    first = next((name for name in ours if any(provider == name for provider, _ in times)), None)
    for (provider, mode), timing in times.items():
        line = f"    {provider:12} {mode:6} {timing.median:11.1f} us  ({timing.p20:.1f} to {timing.p80:.1f})"
        line += f"  {100 * floor / timing.median:5.1f} % of floor" if floor else ""
        if first is not None and provider != first and (first, mode) in times:
            line += f"  {first} is {timing.median / times[first, mode].median:.2f}x faster"
        print(line, flush=True)


def device_name(device: str) -> str:
    """The GPU, or the processor with its threads and the instruction set of our library."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{machine.cpu_name()}, {torch.get_num_threads()} threads, {native.report()}"


def commit() -> str:
    """The commit of the checkout, marked where files differ from it; BIGAIN_COMMIT where there is no repository."""
    if "BIGAIN_COMMIT" in os.environ:
        return os.environ["BIGAIN_COMMIT"]
    here = Path(__file__).parent
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    return run.stdout.strip() or "unknown"


def write_csv(path: Path, device: str, rows: Sequence[Row]) -> None:
    """Append rows, with what identifies the run."""
    triton = metadata.version("triton") if find_spec("triton") is not None else "none"
    command = shlex.join(["python", "-m", module_name(), *sys.argv[1:]])
    facts = [device_name(device), torch.__version__, triton, commit(), command]
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        header = path.read_text().split("\n", 1)[0]
        if header != ",".join(COLUMNS):
            raise ValueError(f"csv: {path} has the columns {header!r}, expected {','.join(COLUMNS)!r}")
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for row in rows:
            numbers = [f"{value:.3f}" for value in (*row.timing, row.floor)]
            writer.writerow([*row[:5], *numbers, row.bytes, row.flops, *facts])


def module_name() -> str:
    """The module that was started with `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on CUDA, float32 on the CPU")
    options.add_argument("--problem", action="append", choices=tuple(PROBLEMS), help="default: those of the device")
    options.add_argument("--provider", action="append", help="default: all that run here")
    options.add_argument("--seconds", type=float, default=0.1, help="about how long each provider is timed")
    options.add_argument("--minutes", type=float, help="start nothing new after this time")
    options.add_argument("--csv", type=Path, help="append the rows to this file")
    return options


def session_of(arguments: argparse.Namespace) -> Session:
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    problems = tuple(arguments.problem or DEFAULT[arguments.device])
    return Session(
        arguments.device,
        dtype,
        problems,
        tuple(arguments.provider) if arguments.provider else None,
        arguments.seconds,
        arguments.csv,
        None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes,
    )


def print_heading(session: Session) -> None:
    """Machine, versions, whether it is left alone, and measured ceilings."""
    print(f"{device_name(session.device)}; torch {torch.__version__}; {session.dtype}; commit {commit()}")
    if session.device == "cpu":
        print(f"{os.cpu_count()} cores with {' '.join(machine.cpu_flags()) or 'flags that are not listed'}")
        print(machine.spin())
    bandwidth, rate = ceilings(session.device, DTYPES[session.dtype])
    print(f"measured here: copy {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s\n", flush=True)


def finish(session: Session) -> int:
    """Say what failed; the exit status."""
    for failure in session.failures:
        print(f"FAILED {failure}")
    return 1 if session.failures else 0


def main(module: Any) -> int:
    """The program of one benchmark module."""
    arguments = parser(module.__doc__).parse_args()
    torch.set_grad_enabled(False)
    session = session_of(arguments)
    print_heading(session)
    run(module, session)
    return finish(session)


def tokens_bytes(x: Tensor, share: float = 1.0) -> int:
    """Bytes of a share of the tokens."""
    return int(share * x.numel() * x.element_size())
