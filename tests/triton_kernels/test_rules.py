"""What the machine code for sm_90 must be like, in the config that is picked at each of the design's shapes.

A kernel that still breaks a rule stands in BROKEN; an entry that is no longer true fails, so that it is taken out.
"""

from __future__ import annotations

import functools
import re

import pytest

pytest.importorskip("triton")

from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.report import capture, choose, model, sass, table, trips
from bigain_kernels.triton_kernels.report.capture import SHAPES, Captured, Shape
from bigain_kernels.triton_kernels.report.model import Facts

STREAMS = ("laplacian_score", "row_stats", "token_merge", "token_unmerge", "kv_downsample")
KERNELS = (*STREAMS, "bipartite_match", "match_near", "merge_plan")
# (rule, kernel): what is wrong. Nothing, at present.
BROKEN: dict[tuple[str, str], str] = {}
COMPILER = table.Compiler()


@functools.cache
def captured(*shapes: Shape) -> list[Captured]:
    return list(capture.capture(shapes))


def launches(kernel: str, *shapes: Shape) -> list[Captured]:
    """What a kernel launches at some shapes."""
    return [each for each in captured(*(shapes or SHAPES)) if each.launch.name == kernel]


@functools.cache
def facts(kernel: str, *shapes: Shape) -> list[tuple[str, Facts]]:
    return [(each.shape.name, COMPILER.facts(each.launch)) for each in launches(kernel, *shapes)]


@pytest.fixture
def known(request):
    """Expects the failure of a rule that a kernel is known to break."""

    def expect(rule: str, kernel: str) -> None:
        if (rule, kernel) in BROKEN:
            request.applymarker(pytest.mark.xfail(strict=True, reason=BROKEN[rule, kernel], raises=AssertionError))

    return expect


def products(found: list[tuple[str, Facts]]):
    """The innermost loops that multiply, with their shapes."""
    steps = [(shape, loop) for shape, each in found for loop in each.loops if loop.tensor]
    assert steps, "no loop multiplies"
    least = {shape: min(loop.instructions for name, loop in steps if name == shape) for shape, _ in steps}
    return [(shape, loop) for shape, loop in steps if loop.instructions == least[shape]]


def test_matching_is_not_held_up_by_issuing(known):
    """The tensor cores need at least nine tenths of the cycles in which the step is issued."""
    known("issue ceiling", "bipartite_match")
    low = {shape: round(loop.ceiling, 2) for shape, loop in products(facts("bipartite_match")) if loop.ceiling < 0.9}
    assert low == {}


def test_a_step_of_matching_holds_nothing_but_the_product(known):
    """No loads into registers, no reciprocals or conversions, a barrier for copies and one for each product at most.
    Where sources are kept, the step is a whole tile of destinations, and loads their words."""
    known("pure step", "bipartite_match")
    kept = {each.shape.name for each in launches("bipartite_match") if each.launch.arguments["LONG"]}
    groups = {each.shape.name: each.launch.arguments["GROUPS"] for each in launches("bipartite_match")}
    assert kept == {"sd2_512", "sd2_768"}
    for shape, loop in products(facts("bipartite_match")):
        assert loop.slow == 0, shape
        assert loop.loads <= (10 if shape in kept else 0), shape
        assert loop.barriers <= (3 if shape in kept else 1 + groups[shape]), shape


@pytest.mark.parametrize("kernel", ["token_unmerge", "kv_downsample"])
def test_loads_that_wait_for_loads(kernel, known):
    """Two rounds to memory: the table, then all rows."""
    known("depth", kernel)
    assert {shape: each.depth for shape, each in facts(kernel) if each.depth > 2} == {}


@pytest.mark.parametrize("kernel", ["laplacian_score", "row_stats", "match_near"])
def test_loops_over_channels_load_ahead(kernel, known):
    """Or ask in one step for as much as HBM brings in the time until the first of it is there."""
    known("loads ahead", kernel)
    on_the_way = model.HBM / model.CLOCK / capture.MULTIPROCESSORS * model.FROM_HBM
    for each in launches(kernel, SHAPES[0]):
        found = filter(sass.is_innermost, sass.loops(COMPILER(each.launch).function.code))
        # Those that read tokens.
        loops = [loop for loop in found if any(".128" in other.opcode for other in sass.flat(loop.body))]
        assert loops
        facts = COMPILER.facts(each.launch)
        programs = min(facts.resident, -(-facts.programs // capture.MULTIPROCESSORS))
        for loop in loops:
            asked = sum(model.width(other) for other in sass.flat(loop.body) if other.kind == "LDG")
            assert model.loads_ahead(loop) or asked * 32 * facts.warps * programs >= on_the_way


def test_matching_within_a_window_takes_as_long_as_its_bytes():
    """Where tokens do not fit into the cache: a tenth more at most."""
    for each in launches("match_near"):
        found = COMPILER.facts(each.launch)
        if found.hbm_bytes > model.L2_KEEPS * 2:
            assert found.predicted - found.terms["launch"] <= 1.1 * found.terms["hbm"], each.shape.name


@pytest.mark.parametrize("kernel", STREAMS)
def test_streams_are_not_held_up_by_issuing(kernel, known):
    """With 32 rows of DiT, where the bytes are most of the time: issuing takes no longer than they do."""
    known("issue per byte", kernel)
    (shape,) = (each for each in SHAPES if each.name == "dit_512_b32")
    for _, each in facts(kernel, shape):
        assert each.terms["issue"] <= each.terms["hbm"]


# Tiles of matching that fill more multiprocessors than the shipped ones, where there are few of these.
SMALLER = [{"BLOCK_M": 64, "BLOCK_N": n, "num_warps": 4, "num_stages": 4} for n in (32, 16)]


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "merge_plan"])
def test_programs_fill_the_chip(kernel, known):
    """At least 85 % of the multiprocessors' time, with three rows as well; matching, unless that would take longer."""
    known("filled", kernel)
    shapes = {each.name: each for each in (*SHAPES, SHAPES[0]._replace(name="three rows", batch=3))}
    found = [(name, each) for shape in shapes.values() for name, each in facts(kernel, shape)]
    low = {name: each for name, each in found if each.wave_efficiency < 0.85}
    if kernel == "bipartite_match":
        every = [*configs.candidates("bipartite_match", table.ARCHITECTURE), *SMALLER]
        low = {name: each for name, each in low.items() if _filled_sooner(shapes[name], every, each)}
    assert {name: round(each.wave_efficiency, 2) for name, each in low.items()} == {}


def _filled_sooner(shape: Shape, candidates: list[configs.Config], chosen: Facts) -> bool:
    """Whether a tile that fills more multiprocessors takes less time than the chosen one."""
    (promises,) = choose.predictions("bipartite_match", COMPILER, [shape], candidates).values()
    assert max(each.filled for each in promises) >= 0.85, "no tile of the comparison fills the chip"
    return any(each.filled >= 0.85 and each.time < chosen.predicted for each in promises)


def test_matching_has_the_buffers_that_its_config_asks_for(known):
    known("buffers", "bipartite_match")
    for each in launches("bipartite_match", SHAPES[0]):
        text = COMPILER(each.launch).ttgir
        buffers = max(int(size) for size in re.findall(r"local_alloc.*memdesc<(\d+)x\d+x\d+x(?:bf16|f16)", text))
        assert buffers >= each.launch.arguments["num_stages"] - 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_binary_for_every_batch(kernel, known):
    """Of each config: a new batch size must not compile anew, least of all while a graph is captured."""
    known("one binary", kernel)
    found: dict[tuple[str, str], set[str]] = {}
    for batch in (1, 2, 4, 8, 16):
        for each in launches(kernel, SHAPES[0]._replace(batch=batch)):
            config = {k: v for k, v in table.config_of(each.launch).items() if k != "SPLIT"}
            found.setdefault((each.op, repr(config)), set()).add(COMPILER.key(each.launch))
    assert {key: len(binaries) for key, binaries in found.items() if len(binaries) > 1} == {}


@pytest.mark.parametrize("kernel", [*STREAMS, "bipartite_match", "match_near"])
def test_rows_of_72_channels_are_read_16_bytes_at_a_time(kernel, known):
    """Their length is no multiple of 16 elements, but of 16 bytes. What runs for long slots alone is left out: it reads
    scale and shift of one row, which is shorter than a program has threads."""
    known("72 channels", kernel)
    for each in launches(kernel, Shape("72 channels", 2, (64, 64), 72, 1)):
        compiled = COMPILER(each.launch)
        walk = model.Walk(compiled.function, trips.count(each.launch), compiled.warps)
        opcodes = [other.opcode for other, times in walk.weigh(compiled.function.code) if times]
        assert any(re.match(r"(LDG|LDGSTS)\..*128|UTMALDG", opcode) for opcode in opcodes)
        assert not any(re.match(r"LDG\.E\.(U16|S16)", opcode) for opcode in opcodes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_full_division_by_a_power_of_two(kernel, known):
    known("division", kernel)
    for each in launches(kernel, SHAPES[0]):
        divisors = re.findall(r"div\.(?:rn|full)\.f32 .*, 0f([0-9A-F]{8});", COMPILER(each.launch).ptx)
        assert not any(int(bits, 16) & 0x7FFFFF == 0 for bits in divisors)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_begin_early_and_wait_first(kernel, known):
    """Programmatic dependent launch: griddepcontrol.wait stands before all branches and all accesses to memory."""
    known("early", kernel)
    for each in launches(kernel, SHAPES[0]):
        assert each.launch.arguments.get("launch_pdl") is True
        assert sass.waits_first(COMPILER(each.launch).function)


def test_planning_stays_within_its_cycles(known):
    """10,500 cycles in which a multiprocessor issues instructions, for 4,096 tokens and in proportion for more."""
    known("plan budget", "merge_plan")
    for each in launches("merge_plan"):
        found = COMPILER.facts(each.launch)
        assert found.issue_cycles <= 10_500 * max(each.shape.tokens / 4096, 1.0), each.shape.name


@pytest.mark.slow
@pytest.mark.parametrize("op", choose.OPS)
def test_until_a_config_is_measured_the_best_of_the_model_is_chosen(op, known):
    """`python -m bigain_kernels.aot --choose` writes it down."""
    if configs.table(table.ARCHITECTURE)["tuned"]:
        return
    known("best config", op)
    assert choose.better(op, COMPILER) == {}
