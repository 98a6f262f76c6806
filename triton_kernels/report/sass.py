"""The machine code of NVIDIA GPUs as nvdisasm prints it: instructions, their control codes, and loops.

An instruction is 128 bits, of which 21 say how it is scheduled: how many cycles its warp waits before the next one, and
which of six scoreboards it waits for, or holds until its result is there. The hardware checks nothing else, so these
bits tell how a warp runs. Source: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
2018, section 2.1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..machine_code import tool

# Where a line of source stands, the innermost call first: (file name, line).
Place = tuple[tuple[str, int], ...]
_NONE = 7

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_HALF = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_TEXT = re.compile(r"(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        address: bytes from the start of the function.
        predicate: what it depends on, as `@!P0`; empty when it always runs.
        opcode, operands: as printed.
        stall: cycles until the warp may issue the next one.
        sets: the scoreboard that it holds until its result is written, or None.
        reads: the scoreboard that it holds until its operands are read, or None.
        waits: the scoreboards that it waits for.
        place: the line of source.
        target: the address that it branches to, or None.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int = 0
    sets: int | None = None
    reads: int | None = None
    waits: tuple[int, ...] = ()
    place: Place = ()
    target: int | None = None

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    def decode(self, high: int) -> None:
        """Take the control bits from the second half of the instruction."""
        control = high >> 41
        self.stall = control & 15
        self.sets = None if control >> 5 & 7 == _NONE else control >> 5 & 7
        self.reads = None if control >> 8 & 7 == _NONE else control >> 8 & 7
        self.waits = tuple(i for i in range(6) if control >> 11 >> i & 1)


@dataclass
class Loop:
    """A backward branch and what it repeats: instructions and loops inside, in order."""

    branch: Instruction
    body: list[Instruction | Loop] = field(default_factory=list)

    @property
    def place(self) -> Place:
        return self.branch.place


Code = list[Instruction | Loop]


class Function(NamedTuple):
    """A kernel."""

    name: str
    instructions: list[Instruction]

    @property
    def code(self) -> Code:
        """The instructions with those of each loop together."""
        return nest(self.instructions)


# What reads or writes memory that other launches see.
_GLOBAL = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UTMASTG", "UBLKCP")


def waits_first(function: Function) -> bool:
    """Whether a kernel waits for the launch before it (griddepcontrol.wait) before it branches or touches memory, and
    lets the next one begin (griddepcontrol.launch_dependents)."""
    kinds = [each.kind for each in function.instructions]
    if "ACQBULK" not in kinds or "PREEXIT" not in kinds:
        return False
    wait = function.instructions[kinds.index("ACQBULK")]
    return not wait.predicate and not {*_GLOBAL, "BRA", "EXIT"} & set(kinds[: kinds.index("ACQBULK")])


def parse(text: str) -> dict[str, Function]:
    """The functions in what `nvdisasm -gi -hex -c` prints, by name."""
    functions: dict[str, Function] = {}
    addresses: dict[str, int] = {}
    labels: list[str] = []
    targets: list[tuple[Instruction, str]] = []
    place: list[tuple[str, int]] = []
    placed = True
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            found, place = [], []
            functions[match[1]] = Function(match[1], found)
        elif match := _INSTRUCTION.match(line):
            head = _TEXT.fullmatch(match[2])
            assert head is not None, line
            each = Instruction(int(match[1], 16), head[1] or "", head[2], head[3], place=tuple(place))
            found.append(each)
            addresses.update(dict.fromkeys(labels, each.address))
            labels, placed = [], True
            if target := _TARGET.search(head[3]):
                targets.append((each, target[1]))
        elif (match := _SECOND_HALF.match(line)) and found:
            found[-1].decode(int(match[1], 16))
        elif match := _LINE.match(line):
            # One comment a call, the innermost first; they stand together before the instruction.
            place, placed = ([] if placed else place), False
            place.append((Path(match[1]).name, int(match[2])))
        elif match := _LABEL.match(line):
            labels.append(match[1])
    for each, label in targets:
        each.target = addresses.get(label)
    return functions


def nest(instructions: list[Instruction]) -> Code:
    """Instructions with loops put together; a loop reaches from the target of a backward branch to the branch."""
    ends = {
        each.address: each.target
        for each in instructions
        # The last instruction of every function jumps to itself.
        if each.kind == "BRA" and each.target is not None and each.target < each.address
    }
    open_at: dict[int, list[int]] = {}
    # Of several branches back to one place, the last one closes the loop.
    last = {target: max(end for end, other in ends.items() if other == target) for target in ends.values()}
    for target, end in sorted(last.items(), key=lambda pair: -pair[1]):
        open_at.setdefault(target, []).append(end)
    whole: Code = []
    stack: list[tuple[int, Code]] = [(-1, whole)]
    for each in instructions:
        for end in open_at.get(each.address, ()):
            loop = Loop(each)
            stack[-1][1].append(loop)
            stack.append((end, loop.body))
        stack[-1][1].append(each)
        while len(stack) > 1 and stack[-1][0] == each.address:
            stack.pop()
            closed = stack[-1][1][-1]
            assert isinstance(closed, Loop)
            closed.branch = each
    return whole


def flat(code: Code) -> Iterator[Instruction]:
    """All instructions once, in order."""
    for each in code:
        if isinstance(each, Loop):
            yield from flat(each.body)
        else:
            yield each


def loops(code: Code) -> Iterator[Loop]:
    """All loops, those inside others after them."""
    for each in code:
        if isinstance(each, Loop):
            yield each
            yield from loops(each.body)


def is_innermost(loop: Loop) -> bool:
    return not any(isinstance(each, Loop) for each in loop.body)


def disassemble(cubin: bytes) -> dict[str, Function]:
    """The functions of a cubin, by name, read by the nvdisasm in the Triton wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("nvdisasm")), "-gi", "-hex", "-c", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
