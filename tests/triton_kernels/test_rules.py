"""What the machine code for sm_90 must be like, in the config that is picked at each of the design's shapes.

A kernel that still breaks a rule stands in BROKEN; an entry that is no longer true fails, so that it is taken out.
"""

from __future__ import annotations

import functools
import re

import pytest

pytest.importorskip("triton")

from bigain_kernels.triton_kernels import configs
from bigain_kernels.triton_kernels.report import capture, choose, model, sass, table
from bigain_kernels.triton_kernels.report.capture import SHAPES, Captured, Shape
from bigain_kernels.triton_kernels.report.model import Facts

STREAMS = ("laplacian_score", "row_stats", "token_merge", "token_unmerge", "kv_downsample")
KERNELS = (*STREAMS, "bipartite_match", "merge_plan")
# (rule, kernel): what is wrong.
BROKEN: dict[tuple[str, str], str] = {
    ("loads ahead", "laplacian_score"): "each step waits for its own loads",
    ("loads ahead", "row_stats"): "each step waits for its own loads",
    ("filled", "bipartite_match"): "0.73: 96 tiles for two rows of DiT",
    ("issue per byte", "laplacian_score"): "16 instructions an element",
    ("issue per byte", "token_merge"): "statistics of each member besides, where a LayerNorm is merged",
    ("72 channels", "token_merge"): "scale and shift of a norm are shorter than a program has threads",
}
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


@pytest.mark.parametrize("kernel", ["laplacian_score", "row_stats"])
def test_loops_over_channels_load_ahead(kernel, known):
    known("loads ahead", kernel)
    for each in launches(kernel, SHAPES[0]):
        loops = list(sass.loops(COMPILER(each.launch).function.code))
        assert loops
        assert all(model.loads_ahead(loop) for loop in loops if sass.is_innermost(loop))


@pytest.mark.parametrize("kernel", STREAMS)
def test_streams_are_not_held_up_by_issuing(kernel, known):
    """With 32 rows of DiT, where the bytes are most of the time: issuing takes no longer than they do."""
    known("issue per byte", kernel)
    (shape,) = (each for each in SHAPES if each.name == "dit_512_b32")
    for _, each in facts(kernel, shape):
        assert each.terms["issue"] <= each.terms["hbm"]


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "merge_plan"])
def test_programs_fill_the_chip(kernel, known):
    """At least 85 % of the multiprocessors' time, with three rows as well."""
    known("filled", kernel)
    found = [*facts(kernel), *facts(kernel, SHAPES[0]._replace(name="three rows", batch=3))]
    assert {shape: round(each.wave_efficiency, 2) for shape, each in found if each.wave_efficiency < 0.85} == {}


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


@pytest.mark.parametrize("kernel", [*STREAMS, "bipartite_match"])
def test_rows_of_72_channels_are_read_16_bytes_at_a_time(kernel, known):
    """Their length is no multiple of 16 elements, but of 16 bytes."""
    known("72 channels", kernel)
    for each in launches(kernel, Shape("72 channels", 2, (64, 64), 72, 1)):
        opcodes = [other.opcode for other in COMPILER(each.launch).function.instructions]
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
