"""What a compiled launch costs, term by term; docs/performance.md derives the terms and says what they leave out."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ..launching import Launch
from .capture import MULTIPROCESSORS
from .sass import Code, Function, Instruction, Loop, Place, flat, waits_first
from .trips import Trips, first_of_body, heads_loop, statement

SCHEDULERS = 4
# An H200. Clock in cycles a microsecond; bytes a microsecond of HBM and of the L2 cache.
CLOCK = 1755.0
HBM = 4.3e6
L2 = 5.5e6
# Bytes a cycle of a multiprocessor.
L1, SHARED = 64, 128
# Between two dependent launches of a CUDA graph, in microseconds; less where the second starts before the first ends.
LAUNCH, LAUNCH_EARLY = 1.2, 0.4
# Cycles until a result is there. Tables come from the L2 cache, where the launch before left them, and so do tokens
# unless the launch moves more than half of the cache holds.
FROM_HBM, FROM_L2, L2_KEEPS = 600, 280, 25e6
# Accesses from 8 bytes a thread on are of tokens; narrower ones are of tables, whose lines the L1 cache keeps.
_WIDE = 8
_LATENCY = {"LDS": 33, "LDSM": 33, "SHFL": 25, "MUFU": 40, "S2R": 30, "S2UR": 30, "LDC": 40, "ATOMG": 500, "ATOM": 500}
_DEFAULT_LATENCY, _READ_LATENCY, _BARRIER = 25, 20, 30
# Multiply-adds a cycle of a multiprocessor's tensor cores in 16 bits; half as many for TF32. Without wgmma, 0.62 of it.
_MACS = 2048
_WITHOUT_WGMMA = 0.62
_COPIES = ("LDGSTS", "UTMALDG")
_LOADS = ("LDG", "LD", *_COPIES)


@dataclass
class LoopFacts:
    """One step of a loop.

    Attributes:
        line: `file:line` of the source.
        trips: how often it runs each time it is entered.
        instructions: of a warp; stalls: the cycles that a warp takes at least, by its stall counts.
        issue: cycles in which the schedulers issue the step for all warps of a program.
        tensor: cycles in which the tensor cores compute it; ceiling: the share of their rate that issuing leaves.
        loads, copies, barriers: loads into registers, asynchronous copies and barriers of a warp.
        slow: instructions that have no place in a step (reciprocals, conversions of integers).
    """

    line: str
    trips: float
    instructions: float
    stalls: float
    issue: float
    tensor: float
    ceiling: float
    loads: float
    copies: float
    barriers: float
    slow: float


@dataclass
class Facts:
    """What is known of a launch without running it; times in microseconds are predictions.

    Attributes:
        registers, spills, shared: a thread's registers and bytes of local memory, a program's bytes of shared memory.
        warps, programs, resident: warps of a program, programs of the launch, programs of a multiprocessor at a time.
        waves: rounds that the launch takes.
        wave_efficiency: the share of the multiprocessors' time that is filled, as programs side by side share one.
        instructions: that a warp issues in all.
        issue_cycles: in which the schedulers issue one program.
        depth: loads that wait for one another, one after the other.
        barriers: that a program passes.
        hbm_bytes, l2_bytes, l1_bytes, shared_bytes: moved at each level: tensors once; what passes the L1 cache; what
            threads ask for, masked lanes too; in and out of shared memory.
        loops: the loops that run.
        terms: microseconds by name: launch, hbm, l2, l1, shared, tensor, issue, latency.
        predicted: launch and the largest of the other terms.
        assumed: whether the length of a loop depends on data.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    programs: int = 0
    resident: int = 0
    waves: float = 0.0
    wave_efficiency: float = 0.0
    instructions: float = 0.0
    issue_cycles: float = 0.0
    depth: int = 0
    barriers: float = 0.0
    hbm_bytes: int = 0
    l2_bytes: float = 0.0
    l1_bytes: float = 0.0
    shared_bytes: float = 0.0
    loops: list[LoopFacts] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    predicted: float = 0.0
    assumed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Compiled(NamedTuple):
    """What the compiler made of a launch."""

    function: Function
    registers: int
    spills: int
    shared: int
    warps: int
    # Bytes that tensor copies (TMA) of a launch move, which their instructions do not tell.
    tma_bytes: float = 0.0
    # The compiler's own intermediate texts.
    ttgir: str = ""
    ptx: str = ""


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor of sm_90 holds at a time."""
    by_registers = 64 // (warps * math.ceil(max(registers, 24) / 8) * 8 * 32 / 1024)
    by_shared = 233_472 // (math.ceil(shared / 128) * 128 + 1024)
    return max(int(min(by_registers, by_shared, 64 // warps, 32)), 1)


def multiply_adds(each: Instruction) -> float:
    """Cycles of a multiprocessor's tensor cores for one instruction of a warp (of four warps together for wgmma)."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", each.opcode):
        m, n, k = (int(value) for value in match.groups())
        return m * n * k / (_MACS / 2 if "TF32" in each.opcode else _MACS) / 4
    if match := re.match(r"HMMA\.(\d\d)(8)(\d+)", each.opcode):
        m, n, k = (int(value) for value in match.groups())
        return m * n * k / (_MACS / 2 if "TF32" in each.opcode else _MACS) / _WITHOUT_WGMMA
    return 0.0


def operands(each: Instruction) -> float:
    """Bytes of shared memory that a product reads, for one warp of its four."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", each.opcode):
        m, n, k = (int(value) for value in match.groups())
        # The first operand has a descriptor of its own unless it comes from registers.
        from_shared = each.operands.count("gdesc") > 1 or "gdesc" in each.operands.split(",")[1]
        return (n + (m if from_shared else 0)) * k * (4 if "TF32" in each.opcode else 2) / 4
    return 0.0


def width(each: Instruction) -> int:
    """Bytes of a thread that a memory instruction moves."""
    for text, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if text in each.opcode:
            return size
    if each.kind == "LDSM":
        return 4 * int(each.opcode[-1]) if each.opcode[-1].isdigit() else 4
    return 4


def _copies(code: Code) -> Counter[Place]:
    """The copies in a stretch of code, by the innermost line of source; those of its loops left out."""
    return Counter(each.place[:1] for each in code if isinstance(each, Instruction) and each.kind in _COPIES)


def ahead(loop: Loop, among: Code) -> int:
    """How many rounds of a loop were copied before it began: its last rounds copy nothing, predicated off."""
    inside, before = _copies(loop.body), _copies(among)
    return round(max((before[place] / count for place, count in inside.items()), default=0))


class Walk:
    """One warp's way through a program, its fellow warps in step with it.

    `weigh` goes through the code and says how often each instruction runs; `time` goes through it once more as a warp
    does: it issues in order, as far apart as the stall counts and the other warps of its scheduler ask, and stops at
    what it waits for.
    """

    def __init__(self, function: Function, trips: Trips, warps: int, latency: int = FROM_L2) -> None:
        self.function, self.trips, self.latency = function, trips, latency
        # Bytes that L2 has for a program in a cycle.
        self.warps, self.rate = warps, math.inf
        self.pace = max(warps / SCHEDULERS, 1.0)
        # Whether copies are real, and when the last of them has come.
        self.copies_on, self.arrived = True, 0.0
        self.skippable, self.bodies = self._skippable()
        self.heads: Counter[tuple[str, int]] = Counter()
        for place, ran in trips.statements.items():
            self.heads.update({place[0]: ran} if place else {})
        self.now = 0.0
        self.free = 0.0
        self.ready: dict[int, float] = {}
        self.copying: list[float] = []
        self.groups: deque[float] = deque()
        self.depth_of: dict[int, int] = {}
        self.depth_now = self.depth = 0
        self.multiplied: list[float] = []

    def _skippable(self) -> tuple[set[int], set[int]]:
        """Addresses that a branch may jump over, or that stand behind the end of another way through the program; and
        of these, those that bear the line of an `if` that is jumped over: the compiler has lost which of its statements
        they are of, but not that they are."""
        code = self.function.instructions
        place_of = {each.address: each.place for each in code}
        ends = [each.address for each in code if each.kind in ("EXIT", "BRA") and not each.predicate]
        found = {each.address for each in code if ends and each.address > ends[0]}
        bodies = set()
        for each in code:
            if each.kind == "BRA" and each.target is not None and each.target > each.address:
                over = range(each.address + 16, each.target, 16)
                found |= set(over)
                bodies |= {address for address in over if each.predicate and place_of.get(address) == each.place}
        return found, bodies

    def repeats(self, loop: Loop, among: Code) -> float:
        """How often a loop runs when it is entered. What the compiler unrolled runs less often."""
        place = statement(loop.place)
        times = self.trips.per_entry(place)
        if times is None:
            # A loop of the source that never ran, or one that only waits.
            return 0.0 if place and self._is_loop(place) else 1.0
        return self.unrolled(loop, among, times)

    @staticmethod
    def unrolled(loop: Loop, among: Code, times: float) -> float:
        """How often a loop runs whose source runs so many times, but of which the compiler made several."""
        same = [len(list(flat(each.body))) for each in among if isinstance(each, Loop) and each.place == loop.place]
        size = len(list(flat(loop.body)))
        unrolled = round(size / min(same))
        if len(same) > 1 and unrolled > 1:
            return times // unrolled
        if len(same) > 1 and max(same) >= 2 * size:
            return times % round(max(same) / size)
        return times

    def _is_loop(self, place: Any) -> bool:
        return place in self.trips.entries or heads_loop(*place[0])

    def weigh(self, code: Code, times: float = 1.0) -> list[tuple[Instruction, float]]:
        """(instruction, how often it runs), in order."""
        found: list[tuple[Instruction, float]] = []
        for each in code:
            if isinstance(each, Loop):
                found += self.weigh(each.body, times * self.repeats(each, code))
            else:
                found.append((each, times * self.share(each, times)))
        return found

    def copies(self, code: Code, times: float = 1.0) -> Iterator[tuple[Instruction, float]]:
        """(copy, how often it moves something): what was copied before a loop, its last rounds do not copy again."""
        repeated = Counter[Place]()
        for each in code:
            if isinstance(each, Loop) and (repeats := self.repeats(each, code)):
                repeated.update(_copies(each.body))
                yield from self.copies(each.body, times * repeats)
        for each in code:
            if isinstance(each, Instruction) and each.kind in _COPIES and each.place[:1] not in repeated:
                yield each, times * self.share(each, times)

    def share(self, each: Instruction, times: float) -> float:
        """The share of rounds in which an instruction that may be jumped over runs."""
        place = statement(each.place)
        if each.address not in self.skippable or not place or times == 0:
            return 1.0
        if each.address in self.bodies and (line := first_of_body(*place[0])):
            place = ((place[0][0], line), *place[1:])
        # Triton 3.6 forgets who called, of loads that it moves ahead.
        ran = self.trips.statements[place] or (self.heads[place[0]] if len(place) == 1 else 0)
        return min(ran / times, 1.0)

    def time(self, code: Code, times: float = 1.0) -> None:
        for each in code:
            if not isinstance(each, Loop):
                self.issue(each, self.share(each, times))
                continue
            repeats = self.repeats(each, code)
            if repeats == 0:
                continue
            # What was copied before the loop is not copied again in its last rounds.
            last = min(ahead(each, code), math.ceil(repeats))
            rounds = min(math.ceil(repeats) - last, 6)
            step = 0.0
            for _ in range(rounds):
                before = self.now
                self.time(each.body, times * repeats)
                step = self.now - before
            # Back in time where a loop runs so often and a half on the average.
            self.later((repeats - rounds - last) * step)
            copies_on = self.copies_on
            self.copies_on = False
            for _ in range(last):
                self.time(each.body, times * repeats)
            self.copies_on = copies_on

    def later(self, cycles: float) -> None:
        """Let time pass with everything that is on its way as far from its end as it is now."""
        self.now += cycles
        self.free += cycles
        self.arrived += cycles
        self.ready = {key: value + cycles for key, value in self.ready.items()}
        self.copying = [value + cycles for value in self.copying]
        self.groups = deque(value + cycles for value in self.groups)
        self.multiplied = [value + cycles for value in self.multiplied]

    def issue(self, each: Instruction, share: float) -> None:
        if share < 0.5:
            self.now += share * max(each.stall, self.pace)
            return
        self.wait(each)
        latency = _LATENCY.get(each.kind, _DEFAULT_LATENCY)
        if each.kind in _LOADS:
            latency = self.latency if width(each) >= _WIDE else FROM_L2
        if each.kind in _LOADS:
            self.depth = max(self.depth, self.depth_now + 1)
        if each.sets is not None:
            self.ready[each.sets] = max(self.ready.get(each.sets, 0.0), self.now + latency)
            if each.kind in _LOADS:
                self.depth_of[each.sets] = max(self.depth_of.get(each.sets, 0), self.depth_now + 1)
        if each.reads is not None:
            self.ready[each.reads] = max(self.ready.get(each.reads, 0.0), self.now + _READ_LATENCY)
        if each.kind in _COPIES:
            self.copying.append(self.bring(each) if self.copies_on else self.now)
        if each.kind == "LDGDEPBAR" or each.kind == "UTMALDG":
            self.groups.append(max(self.copying, default=self.now))
            self.copying = []
        if each.kind in ("HGMMA", "HMMA"):
            # A warp's own scheduler has a quarter of the tensor cores.
            cycles = multiply_adds(each) * SCHEDULERS * (self.pace if each.kind == "HMMA" else max(self.pace, 1.0))
            self.free = max(self.free, self.now) + cycles
            self.multiplied.append(self.free + _DEFAULT_LATENCY)
        if each.kind == "BAR":
            self.now += _BARRIER
        self.now += max(each.stall, self.pace)

    def bring(self, each: Instruction) -> float:
        """When what a copy asks for is there: after the way, and no sooner than the program's share of L2 allows."""
        self.arrived = max(self.arrived, self.now) + 32 * self.warps * width(each) / self.rate
        return self.arrived + self.latency

    def wait(self, each: Instruction) -> None:
        """Let time pass until what the instruction needs is there."""
        for board in each.waits:
            self.now = max(self.now, self.ready.get(board, 0.0))
            self.depth_now = max(self.depth_now, self.depth_of.get(board, 0))
        left = re.search(r"0x([0-9a-f]+)\s*$", each.operands)
        if each.kind == "DEPBAR" and each.opcode.startswith("DEPBAR.LE") and left and self.groups:
            while len(self.groups) > int(left[1], 16):
                self.now = max(self.now, self.groups.popleft())
        elif each.kind == "SYNCS" and "TRYWAIT" in each.opcode and self.groups:
            self.now = max(self.now, self.groups.popleft())
        elif each.kind == "WARPGROUP" and "DEPBAR" in each.opcode and left:
            keep = int(left[1], 16)
            done, self.multiplied = (
                self.multiplied[: len(self.multiplied) - keep],
                self.multiplied[len(self.multiplied) - keep :],
            )
            self.now = max([self.now, *done])


def examine(launch: Launch, compiled: Compiled, trips: Trips) -> Facts:
    """All that the report says of a launch of Triton's."""
    tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, torch.Tensor)}
    hbm_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    warp = Walk(compiled.function, trips, compiled.warps, FROM_HBM if hbm_bytes > L2_KEEPS else FROM_L2)
    early = launch.arguments.get("launch_pdl") and waits_first(compiled.function)
    start = LAUNCH_EARLY if early else LAUNCH
    facts = predict(compiled, warp, math.prod(launch.grid), hbm_bytes, start)
    facts.assumed = bool(trips.assumed)
    return facts


def predict(compiled: Compiled, warp: Walk, programs: int, hbm_bytes: int, start: float) -> Facts:
    """What a launch of so many programs costs that moves so many bytes, and begins `start` microseconds after the one
    ahead of it."""
    facts = Facts(compiled.registers, compiled.spills, compiled.shared, compiled.warps, programs)
    facts.resident = resident(compiled.registers, compiled.shared, compiled.warps)
    facts.waves = programs / (MULTIPROCESSORS * facts.resident)
    on_one = math.ceil(programs / MULTIPROCESSORS)
    facts.wave_efficiency = programs / (MULTIPROCESSORS * on_one)
    facts.hbm_bytes = hbm_bytes
    busy, beside = min(programs, MULTIPROCESSORS), min(facts.resident, on_one)
    warp.rate = min(L2 / CLOCK / busy, L1) / beside
    code = compiled.function.code
    weighed = warp.weigh(code)
    # After the last EXIT comes a jump to itself and padding.
    facts.instructions = sum(times for _, times in weighed)
    facts.issue_cycles = facts.instructions * compiled.warps / SCHEDULERS
    facts.barriers = sum(times for each, times in weighed if each.kind == "BAR")
    threads = 32 * compiled.warps * programs

    def moved(*kinds: str, least: int = 0) -> float:
        return threads * sum(t * width(i) for i, t in weighed if i.kind in kinds and width(i) >= least)

    # Copies to shared memory go past the L1 cache; what a program loads twice into registers, it finds there. Kernels
    # that copy load tokens into registers by the line of source that copies elsewhere, once a program.
    copies = list(warp.copies(code))
    copied = threads * sum(times * width(each) for each, times in copies) + compiled.tma_bytes
    lines = {each.place[:1] for each, _ in copies}
    loaded = threads * sum(t * width(i) for i, t in weighed if i.kind == "LDG" and i.place[:1] in lines)
    facts.l2_bytes = max(copied + loaded, facts.hbm_bytes)
    facts.l1_bytes = moved("LDG", "STG", least=_WIDE) + copied
    facts.shared_bytes = moved("LDS", "STS", "LDSM", "STSM") + copied
    facts.shared_bytes += programs * compiled.warps * sum(times * operands(each) for each, times in weighed)
    tensor_cycles = sum(times * multiply_adds(each) for each, times in weighed) * compiled.warps
    facts.loops = list(loop_facts(code, warp, compiled.warps, 1.0))
    warp.time(code)
    facts.depth = warp.depth
    rounds = math.ceil(facts.waves)
    facts.terms = {
        "launch": start,
        "hbm": facts.hbm_bytes / HBM,
        "l2": facts.l2_bytes / L2,
        "l1": facts.l1_bytes / (L1 * CLOCK * MULTIPROCESSORS),
        "shared": facts.shared_bytes / (SHARED * CLOCK * MULTIPROCESSORS),
        "tensor": on_one * tensor_cycles / CLOCK,
        "issue": on_one * facts.issue_cycles / CLOCK,
        "latency": rounds * warp.now / CLOCK,
    }
    facts.predicted = facts.terms["launch"] + max(time for name, time in facts.terms.items() if name != "launch")
    return facts


def loop_facts(code: Code, warp: Walk, warps: int, times: float = 1.0) -> Iterator[LoopFacts]:
    """The loops that run, those inside others after them."""
    for each in code:
        if not isinstance(each, Loop):
            continue
        repeats = warp.repeats(each, code)
        if repeats == 0:
            continue
        inside = [
            (instruction, count / (times * repeats)) for instruction, count in warp.weigh(each.body, times * repeats)
        ]
        instructions = sum(count for _, count in inside)
        tensor = sum(count * multiply_adds(instruction) for instruction, count in inside) * warps
        issue = instructions * warps / SCHEDULERS
        place = statement(each.place)

        def number(*kinds: str, inside: list[tuple[Instruction, float]] = inside) -> float:
            return sum(count for instruction, count in inside if instruction.kind in kinds)

        yield LoopFacts(
            line=f"{place[0][0]}:{place[0][1]}" if place else "",
            trips=repeats,
            instructions=instructions,
            stalls=sum(count * max(instruction.stall, 1) for instruction, count in inside),
            issue=issue,
            tensor=tensor,
            ceiling=min(tensor / issue, 1.0) if tensor else 0.0,
            loads=number("LDG", "LD"),
            copies=number(*_COPIES),
            barriers=number("BAR"),
            slow=number("MUFU", "I2F", "F2I"),
        )
        yield from loop_facts(each.body, warp, warps, times * repeats)


def loads_ahead(loop: Loop) -> bool:
    """Whether a loop has data on its way from one step to the next: copies, or a load that the next step waits for."""
    body = list(flat(loop.body))
    for i, each in enumerate(body):
        if each.kind in _COPIES:
            return True
        if each.kind == "LDG" and not any(each.sets in other.waits for other in body[i + 1 :]):
            return True
    return False
