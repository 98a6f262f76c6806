"""The report of predictions: what it reads, what it counts and what it makes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.problems import PROBLEMS
from bigain_kernels.triton_kernels.report import capture, model, sass, trips

# Two loads in flight, a wait for the second alone, and a loop of two instructions.
LISTING = """
.text.some_kernel:
	//## File "/x/inner.py", line 7 inlined at "/x/outer.py", line 9
	//## File "/x/outer.py", line 9
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0000000402047981 */
                                                                     /* 0x000ea2000c1e1d00 */
        /*0010*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ; /* 0x0000100402087981 */
                                                                     /* 0x000ee2000c1e1d00 */
.L_x_0:
        /*0020*/              @!P0 FADD R4, R4, R9 ;                 /* 0x0000000904047221 */
                                                                     /* 0x008fc80000000000 */
        /*0030*/               @P1 BRA `(.L_x_0) ;                   /* 0xfffffffc00000947 */
                                                                     /* 0x000fea000383ffff */
        /*0040*/                   EXIT ;                            /* 0x000000000000794d */
                                                                     /* 0x000fea0003800000 */
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);                    /* 0xfffffffc00fc7947 */
                                                                     /* 0x000fc0000383ffff */
"""


def test_a_listing_is_read():
    (function,) = sass.parse(LISTING).values()
    first, second, add, branch, *_ = function.instructions
    assert (first.opcode, first.sets, first.stall, first.waits) == ("LDG.E.128", 2, 1, ())
    assert first.place == (("inner.py", 7), ("outer.py", 9))
    assert (second.sets, model.width(first), model.width(second)) == (3, 16, 8)
    assert (add.predicate, add.opcode, add.waits, add.stall) == ("@!P0", "FADD", (3,), 4)
    assert (branch.target, branch.stall) == (0x20, 5)
    (loop,) = sass.loops(function.code)
    assert loop.body == [add, branch]
    assert loop.branch is branch


@pytest.fixture(scope="module")
def captured():
    return list(capture.capture(capture.SHAPES[:1]))


def test_loops_run_as_often_as_the_numbers_say(captured):
    score = next(each.launch for each in captured if each.launch.name == "laplacian_score")
    counted = trips.count(score)
    # 320 channels in steps of 64.
    assert list(counted.iterations.values()) == [5]
    assert list(counted.entries.values()) == [1]
    merge = next(each.launch for each in captured if each.launch.name == "token_merge")
    assert trips.count(merge).assumed


def test_programs_of_a_multiprocessor():
    assert model.resident(registers=32, shared=0, warps=4) == 16
    assert model.resident(registers=185, shared=0, warps=8) == 1
    assert model.resident(registers=168, shared=0, warps=4) == 3
    assert model.resident(registers=32, shared=100_000, warps=4) == 2


def test_the_shapes_are_those_of_the_benchmarks():
    for shape in capture.SHAPES:
        problem = PROBLEMS[shape.name]
        assert shape == capture.Shape(shape.name, problem.batch, problem.grid, problem.channels, problem.heads)


def test_the_launches_are_those_of_a_gpu(captured):
    """Matching splits its tiles over 132 multiprocessors, as it would on an H200."""
    names = [each.launch.name for each in captured if each.op in ("lgtm_plan", "token_merge", "token_unmerge")]
    assert names[0] == "laplacian_score"
    assert names[-1] == "token_unmerge"
    match = next(each.launch for each in captured if each.launch.name == "bipartite_match")
    # 48 x 16 tiles of products, six for a program.
    assert match.grid == (128,)
    assert match.grid[0] <= capture.MULTIPROCESSORS


def copying(in_flight, rounds):
    """A loop that waits for a copy of 16 bytes and starts another, in_flight of which were started before it."""
    place = (("kernel.py", 1),)
    copy = sass.Instruction(0, "", "LDGSTS.E.BYPASS.128", "", place=place)
    group = sass.Instruction(16, "", "LDGDEPBAR", "", place=place)
    wait = sass.Instruction(32, "", "DEPBAR.LE", f" SB0, {hex(in_flight)}", place=place)
    loop = sass.Loop(sass.Instruction(48, "", "BRA", "", place=place), [copy, group, wait])
    walk = model.Walk(sass.Function("kernel", []), trips.Trips({}, {}, {}, {}, set()), 4)
    walk.rate = 16
    walk.repeats = lambda *_: rounds
    return walk, [copy, group] * in_flight + [loop]


def test_what_was_copied_before_a_loop_is_not_copied_again():
    for in_flight in (0, 3):
        walk, code = copying(in_flight, rounds=10)
        assert model.ahead(code[-1], code) == in_flight
        assert sum(times for _, times in walk.copies(code)) == 10


def test_copies_come_no_faster_than_the_share_of_l2():
    walk, code = copying(3, rounds=100)
    walk.time(code)
    # A hundred of 16 bytes by 128 threads, 16 bytes a cycle, and the way of the last one.
    assert walk.now == pytest.approx(100 * 16 * 128 / 16 + model.FROM_L2, rel=0.05)


def test_bodies_of_ifs_run_as_often_as_their_statements():
    """What is jumped over bears the line of the `if`, which runs in each round; its body runs in one of four."""
    name, lines = "match_tiles.py", (Path(trips.__file__).parents[1] / "match_tiles.py").read_text().splitlines()
    at = 1 + next(i for i, line in enumerate(lines) if line.strip() == "if i_k % PART == 0:")
    assert trips.first_of_body(name, at) == at + 1
    assert trips.first_of_body(name, at + 1) is None

    head, body = ((name, at),), ((name, at + 1),)
    jump = sass.Instruction(0, "@P0", "BRA", "", place=head, target=48)
    lost, told = sass.Instruction(16, "", "FADD", "", place=head), sass.Instruction(32, "", "FADD", "", place=body)
    after = sass.Instruction(48, "", "FADD", "", place=head)
    counted = trips.Trips(Counter({head: 4, body: 1}), Counter(), Counter(), {}, set())
    walk = model.Walk(sass.Function("kernel", [jump, lost, told, after]), counted, 4)
    shares = [walk.share(each, 4.0) for each in (jump, lost, told, after)]
    assert shares == [1.0, 0.25, 0.25, 1.0]
    # A branch that stands elsewhere does not tell that the line of the `if` is that of its body.
    jump.place = ((name, 1),)
    walk = model.Walk(sass.Function("kernel", [jump, lost, told, after]), counted, 4)
    assert walk.share(lost, 4.0) == 1.0
