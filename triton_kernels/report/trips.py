"""How often the statements and loops of a kernel run, by running its source on numbers alone.

The function behind a kernel is called as Python, with the numbers of a launch as they are and with `Unknown` for all
that the GPU would hold in tensors. Loops over channels, tiles or tokens then run as often as on the GPU, and each
statement is counted. What depends on data is unknown: a loop that ends with the data runs as often as DATA_TRIPS says,
and an `if` about data is not entered, as such branches stand for what is rare.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from ..launching import Launch
from .sass import Place

# The bound of a loop whose length is in the data. For merging, it is the size of the largest slot of a block.
DATA_TRIPS = 8
_OURS = str(Path(__file__).resolve().parents[1])


class Trips(NamedTuple):
    """Counts of one program, by place.

    Attributes:
        statements: how often each statement ran.
        entries, iterations: how often each loop was entered, and how often its body ran.
        steps: the step of each `for`.
        assumed: the loops whose length is an assumption.
    """

    statements: Counter[Place]
    entries: Counter[Place]
    iterations: Counter[Place]
    steps: dict[Place, int]
    assumed: set[Place]

    def per_entry(self, loop: Place) -> float | None:
        """How often the body of a loop runs each time; None for a loop that never ran."""
        # Triton 3.6 forgets who called, of loops within functions of their own.
        same = [loop] if self.entries[loop] or len(loop) > 1 else [each for each in self.entries if each[:1] == loop]
        entered = sum(self.entries[each] for each in same)
        return sum(self.iterations[each] for each in same) / entered if entered else None


class Number(int):
    """An integer of the kernel: what `.to` and arithmetic make of it is one too."""

    def to(self, *_: Any, **__: Any) -> Number:
        return self


def _number(operation: str) -> Callable[..., Any]:
    def run(self: Number, *others: Any) -> Any:
        result = getattr(int, operation)(self, *others)
        return Number(result) if type(result) is int else result

    return run


_ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
for _name in _ARITHMETIC:
    for _side in ("__", "__r"):
        setattr(Number, f"{_side}{_name}__", _number(f"{_side}{_name}__"))
for _name in ("neg", "invert", "abs", "pos"):
    setattr(Number, f"__{_name}__", _number(f"__{_name}__"))


class Unknown:
    """A value that only the GPU knows; `dtype` is known of pointers."""

    def __init__(self, dtype: Any = None) -> None:
        self._dtype = dtype

    @property
    def dtype(self) -> Any:
        return self._dtype if self._dtype is not None else Unknown()

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown()

    def __call__(self, *_: Any, **__: Any) -> Unknown:
        return Unknown()

    def __getitem__(self, _: Any) -> Unknown:
        return Unknown(self._dtype)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("trips: a kernel unpacks a value that is unknown here, expected tl.split or the like")

    def __eq__(self, other: object) -> Unknown:  # type: ignore[override]
        return Unknown()

    def __ne__(self, other: object) -> Unknown:  # type: ignore[override]
        return Unknown()

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return _current.get().decide(sys._getframe(1))


def _unknown(self: Unknown, *_: Any) -> Unknown:
    return Unknown(self._dtype)


for _name in (*_ARITHMETIC, "truediv", "pow", "matmul"):
    for _side in ("__", "__r"):
        setattr(Unknown, f"{_side}{_name}__", _unknown)
for _name in ("neg", "invert", "abs", "pos", "lt", "le", "gt", "ge"):
    setattr(Unknown, f"__{_name}__", _unknown)


class _PointerType(NamedTuple):
    """What device code asks of a pointer's dtype."""

    element_ty: tl.dtype


class _Language:
    """Stands for triton.language: what is arithmetic on numbers is done, the rest is unknown."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Any:
        real = getattr(tl, name, None)
        if isinstance(real, tl.dtype):
            return real
        if hasattr(self._run, f"_{name}"):
            return getattr(self._run, f"_{name}")
        return Unknown()


@functools.cache
def _statement_lines(path: str) -> dict[int, int]:
    """The first line of the innermost statement of every line of a file; of compound ones, their head."""
    first: dict[int, int] = {}
    statements = [each for each in ast.walk(ast.parse(Path(path).read_text())) if isinstance(each, ast.stmt)]
    for each in sorted(statements, key=lambda node: (node.lineno, -(node.end_lineno or 0))):
        for line in range(each.lineno, (each.end_lineno or each.lineno) + 1):
            first[line] = each.lineno
    return first


@functools.cache
def heads_loop(name: str, line: int, *words: str) -> bool:
    """Whether a line of one of our files begins a loop, of one of these kinds where they are given."""
    text = (Path(_OURS) / name).read_text().splitlines()[line - 1]
    return text.split(" (", 1)[0].lstrip().startswith(words or ("for ", "while "))


@functools.cache
def first_of_body(name: str, line: int) -> int | None:
    """The line of the first statement within the `if` that a line of one of our files begins; None for other lines."""
    path = Path(_OURS) / name
    for each in ast.walk(ast.parse(path.read_text())):
        if isinstance(each, ast.If) and each.lineno == line:
            return each.body[0].lineno
    return None


@functools.cache
def statement(place: Place) -> Place:
    """A place with lines brought to the heads of their statements; files that are not ours are left out."""
    own = [(name, line) for name, line in place if (Path(_OURS) / name).exists()]
    return tuple((name, _statement_lines(f"{_OURS}/{name}").get(line, line)) for name, line in own)


class _Run:
    """One call of a kernel's function."""

    def __init__(self, program: tuple[int, ...], programs: tuple[int, ...]) -> None:
        self.program, self.programs = program, programs
        self.trips = Trips(Counter(), Counter(), Counter(), {}, set())
        self.language = _Language(self)
        self.seen: Counter[Place] = Counter()
        self.functions: dict[Any, Callable[..., Any]] = {}

    def place(self, frame: FrameType | None) -> Place:
        found = []
        while frame is not None and frame.f_code is not count.__code__:
            name = frame.f_code.co_filename
            if name.startswith(_OURS) and not name.startswith(f"{_OURS}/report"):
                found.append((Path(name).name, frame.f_lineno))
            frame = frame.f_back
        return statement(tuple(found))

    def decide(self, frame: FrameType) -> bool:
        """Whether something unknown is true: in a `while`, for the first few times; in an `if`, never."""
        place = self.place(frame)
        if place and heads_loop(*place[0], "while"):
            self.trips.assumed.add(place)
            self.seen[place] += 1
            return self.seen[place] % (DATA_TRIPS + 1) != 0
        return False

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(_OURS) or name.startswith(f"{_OURS}/report"):
            return None
        if event == "line":
            self.trips.statements[self.place(frame)] += 1
        return self.trace

    # ---- what kernels call ----------------------------------------------------------------------------------------

    def _program_id(self, axis: int) -> Number:
        return Number(self.program[axis] if axis < len(self.program) else 0)

    def _num_programs(self, axis: int) -> Number:
        return Number(self.programs[axis] if axis < len(self.programs) else 1)

    def _cdiv(self, x: Any, y: Any) -> Any:
        return (x + y - 1) // y

    def _maximum(self, x: Any, y: Any, **_: Any) -> Any:
        return Unknown() if isinstance(x, Unknown) or isinstance(y, Unknown) else Number(max(x, y))

    def _minimum(self, x: Any, y: Any, **_: Any) -> Any:
        return Unknown() if isinstance(x, Unknown) or isinstance(y, Unknown) else Number(min(x, y))

    def _where(self, condition: Any, x: Any, y: Any) -> Any:
        return Unknown() if isinstance(condition, Unknown) else (x if condition else y)

    def _abs(self, x: Any) -> Any:
        return abs(x)

    def _cast(self, x: Any, *_: Any, **__: Any) -> Any:
        return x

    def _multiple_of(self, x: Any, *_: Any) -> Any:
        return x

    _max_contiguous = _assume = _multiple_of

    def _full(self, shape: Any, value: Any, *_: Any, **__: Any) -> Any:
        return Number(value) if shape == () and type(value) in (int, Number) else Unknown()

    def _constexpr(self, value: Any) -> Any:
        return getattr(value, "value", value)

    def _split(self, _: Any) -> tuple[Unknown, Unknown]:
        return Unknown(), Unknown()

    def _associative_scan(self, values: Any, *_: Any, **__: Any) -> Any:
        return tuple(Unknown() for _ in values) if isinstance(values, tuple) else Unknown()

    _reduce = _associative_scan

    def _max(self, _: Any, axis: Any = None, return_indices: bool = False, **__: Any) -> Any:
        return (Unknown(), Unknown()) if return_indices else Unknown()

    _min = _max

    def _static_range(self, *bounds: Any) -> Any:
        return range(*bounds)

    def _range(self, *bounds: Any, **_: Any) -> Iterator[Number]:
        place = self.place(sys._getframe(1))
        if any(isinstance(each, Unknown) for each in bounds):
            self.trips.assumed.add(place)
            step = bounds[2] if len(bounds) == 3 and not isinstance(bounds[2], Unknown) else 1
            bounds = (0, max(DATA_TRIPS, step), step)
        plain = range(*(int(each) for each in bounds))
        self.trips.entries[place] += 1
        self.trips.steps[place] = plain.step
        for i in plain:
            self.trips.iterations[place] += 1
            yield Number(i)

    # ---- functions ------------------------------------------------------------------------------------------------

    def convert(self, value: Any) -> Any:
        """A global or a default value of a kernel as the run takes it."""
        if value is tl:
            return self.language
        if isinstance(value, JITFunction):
            return self.function(value)
        if isinstance(value, tl.constexpr):
            return value.value
        return value

    def function(self, kernel: Any) -> Callable[..., Any]:
        """The Python function of a kernel, among converted globals."""
        if kernel not in self.functions:
            plain = kernel.fn

            def call(*args: Any, **kwargs: Any) -> Any:
                space = {name: self.convert(each) for name, each in plain.__globals__.items()}
                space |= {"range": self._range}
                defaults = tuple(self.convert(each) for each in plain.__defaults__ or ())
                return FunctionType(plain.__code__, space, plain.__name__, defaults, plain.__closure__)(*args, **kwargs)

            self.functions[kernel] = call
        return self.functions[kernel]


_current: ContextVar[_Run] = ContextVar("bigain_trips")


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Unknown(_PointerType(getattr(tl, str(value.dtype).removeprefix("torch."))))
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    return Number(value) if isinstance(value, int) else Unknown()


def count(launch: Launch) -> Trips:
    """What the program in the middle of a launch does."""
    run = _Run(tuple(size // 2 for size in launch.grid), launch.grid)
    arguments = {name: _argument(launch.arguments[name]) for name in launch.kernel.arg_names}
    previous = sys.gettrace()
    token = _current.set(run)
    sys.settrace(run.trace)
    try:
        run.function(launch.kernel)(**arguments)
    finally:
        sys.settrace(previous)
        _current.reset(token)
    trips = run.trips
    for place in trips.assumed:
        if not trips.entries[place]:  # a `while`
            trips.entries[place] = max(run.seen[place] // (DATA_TRIPS + 1), 1)
            trips.iterations[place] = trips.entries[place] * DATA_TRIPS
    for place, times in trips.statements.items():
        # A `while` over numbers: its head runs once more than its body, each time it is entered.
        if place not in trips.entries and heads_loop(*place[0], "while"):
            trips.entries[place] = 1
            trips.iterations[place] = times - 1
    return trips
