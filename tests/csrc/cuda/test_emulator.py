"""The emulator of csrc/emulate: right kernels give right results, wrong ones raise instead of hanging."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[3] / "csrc"
FLAGS = "-std=c++17 -O1 -shared -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas -ffp-contract=off -DBIGAIN_EMULATE"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The library of emulator_kernels.cpp; every function that runs a kernel returns its error as bytes."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    output = tmp_path_factory.mktemp("emulator") / "kernels.so"
    sources = [
        Path(__file__).with_name("emulator_kernels.cpp"),
        *(CSRC / "emulate" / f"{n}.cpp" for n in ("simt", "warp")),
    ]
    folders = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'emulate'}"]
    subprocess.run([compiler, *FLAGS.split(), *folders, *map(str, sources), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    for name in ("sums", "votes", "multiply", "copies", "fresh_shared", "neighbours", "last_block", "wrong", "divide"):
        getattr(library, name).restype = ctypes.c_char_p
    library.too_many_threads.restype = ctypes.c_char_p
    library.launches.restype = ctypes.c_int64
    yield library
    library.set_order(ctypes.c_int64(0))


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("order", [0, -1, 7])
@pytest.mark.parametrize(("blocks", "threads", "count"), [(1, 32, 5), (3, 64, 1000), (2, 1024, 4096)])
def test_sums_by_shuffles_and_barriers(emulator, order, blocks, threads, count):
    emulator.set_order(ctypes.c_int64(order))
    x = torch.randint(-50, 50, (blocks, count)).float()
    sums = torch.full((blocks,), torch.nan)
    before = emulator.launches()
    assert emulator.sums(at(x), at(sums), blocks, threads, count) == b""
    assert emulator.launches() == before + 1
    assert torch.equal(sums, x.sum(1))


def test_votes_and_shuffles(emulator):
    values = torch.randint(-3, 4, (32,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    out = torch.zeros(7, 32, dtype=torch.int32)
    assert emulator.votes(at(values), at(out)) == b""
    v = values.tolist()
    unsigned = [[word % 2**32 for word in row] for row in out.tolist()[:2]]
    assert unsigned[0] == [sum(1 << i for i in range(32) if v[i] > 0)] * 32
    assert unsigned[1] == [sum(1 << j for j in range(32) if v[j] == v[i]) for i in range(32)]
    assert out[2].tolist() == [sum(v)] * 32
    assert out[3].tolist() == [v[i - 3] if i >= 3 else v[i] for i in range(32)]
    assert out[4].tolist() == [v[i + 5] if i % 16 + 5 < 16 else v[i] for i in range(32)]
    assert out[5].tolist() == [v[i ^ 9] for i in range(32)]
    assert out[6].tolist() == [v[8]] * 32


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 8)])
def test_mma_against_a_plain_product(emulator, dtype, depth):
    generator = torch.Generator().manual_seed(2)
    # Eighths below 4: exact in every dtype, TF32 included, and so are the sums.
    a, b = (torch.randint(-32, 33, (rows, depth), generator=generator).div(8).to(dtype) for rows in (16, 8))
    c = torch.full((16, 8), torch.nan)
    name = str(dtype).removeprefix("torch.").encode()
    assert emulator.multiply(name, at(a), at(b), at(c)) == b""
    assert torch.equal(c, a.float() @ b.float().T)


@pytest.mark.parametrize("divisor", [0, 1, 2, 3, 5, 7, 40, 255, 256, 257, 641, 65535, 65537, 2**30 + 1, 2**31 - 1])
def test_divisors_are_exact(emulator, divisor):
    """At both sides of multiples, where a rounded factor would be one off. 0, of a launch without work, counts as 1."""
    least, most = max(divisor, 1), 2**31 - 1
    multiples = [k * least for k in range(50)] + [most // least * least - k * least for k in range(50)]
    values = sorted({n + d for n in [*multiples, most] for d in (-1, 0, 1) if 0 <= n + d <= most})
    n = torch.tensor(values, dtype=torch.int32)
    out = torch.full((2, len(values)), -1, dtype=torch.int32)
    assert emulator.divide(at(n), at(out), len(values), ctypes.c_int64(divisor)) == b""
    assert out[0].tolist() == [value // least for value in values]
    assert out[1].tolist() == [value % least for value in values]


def test_tf32_drops_the_low_bits(emulator):
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[0, 0], b[0, 0] = 1 + 2**-11, 1 + 2**-10
    c = torch.full((16, 8), torch.nan)
    assert emulator.multiply(b"float32", at(a), at(b), at(c)) == b""
    assert c[0, 0].item() == 1 + 2**-10


def test_a_copy_takes_effect_at_the_wait(emulator):
    source = torch.arange(1, 17, dtype=torch.uint8)
    copied = [*range(1, 11), *[0] * 6]
    for wait_first, expected in ((0, [255] * 16), (1, copied)):
        out = torch.zeros(2, 16, dtype=torch.uint8)
        assert emulator.copies(at(source), at(out), wait_first) == b""
        assert out.tolist() == [expected, copied]


def test_shared_memory_starts_as_nan_in_every_block(emulator):
    out = torch.zeros(2)
    assert emulator.fresh_shared(at(out)) == b""
    assert out.isnan().all()


def test_orders_show_a_missing_barrier(emulator):
    def result(order, with_barrier):
        emulator.set_order(ctypes.c_int64(order))
        out = torch.full((64,), -9, dtype=torch.int32)
        assert emulator.neighbours(at(out), with_barrier) == b""
        return out.tolist()

    right = [*range(1, 64), 0]
    assert [result(order, 1) for order in (0, -1, 3)] == [right] * 3
    assert any(result(order, 0) != right for order in (0, -1, 3))


def test_orders_of_blocks(emulator):
    seen = set()
    for order in (0, -1, 1, 2, 3, 4):
        emulator.set_order(ctypes.c_int64(order))
        out = torch.full((1,), -1, dtype=torch.int32)
        assert emulator.last_block(at(out)) == b""
        assert out.item() == {0: 4, -1: 0}.get(order, out.item())
        seen.add(out.item())
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_for_some", "(waits at|barrier in divergent code).*(\\n|, ).*has ended"),
        ("two_barriers", "barrier in divergent code"),
        ("warp_and_block", "(?s)wait for others.*__sync.*\\n.*__sync"),
        ("missing_lane", "lanes ffffffff"),
        ("lane_not_in_mask", "reads lane 9"),
        ("past_the_end", "past the dynamic shared memory"),
        ("misaligned_copy", "not aligned"),
    ],
)
@pytest.mark.parametrize("order", [0, -1, 5])
def test_wrong_kernels_raise(emulator, kernel, message, order):
    emulator.set_order(ctypes.c_int64(order))
    said = emulator.wrong(kernel.encode()).decode()
    assert re.search(message, said), said
    # The emulator goes on after an error.
    x, sums = torch.ones(1, 64), torch.zeros(1)
    assert emulator.sums(at(x), at(sums), 1, 64, 64) == b""
    assert sums.item() == 64


def test_a_launch_that_no_device_takes(emulator):
    assert b"1025 threads" in emulator.too_many_threads()
