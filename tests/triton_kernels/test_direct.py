"""Direct launches pick the binary that Triton picks, and pass it the same; what belongs to Triton is left to it."""

from __future__ import annotations

import itertools
import random
import struct
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bigain_kernels import env
from bigain_kernels.triton_kernels import direct
from bigain_kernels.triton_kernels.launching import observe_launches, programs

from .stub_driver import stub_driver
from .test_binder import Driver
from .test_launches import CALLS, IMPLEMENTATIONS, record_launches

pytestmark = pytest.mark.skipif(bool(direct.reason()), reason=direct.reason())


def _source(p_a, p_b, n, s, value, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(p_a, tl.load(p_b))


@pytest.fixture
def kernel():
    return triton.jit(_source, do_not_specialize=["n"])


LOG: list = []


@pytest.fixture
def launched(monkeypatch):
    """What was launched: the compiled kernel and all that its launcher was given, pointers as addresses. Nothing is
    compiled: each kind that Triton asks to be compiled is an object of its own."""
    log = LOG
    log.clear()

    def compile(source, target, options):
        made = object.__new__(CompiledKernel)
        made.src, made.function, made.packed_metadata, made.name = None, len(log), options, "toy"
        made.module, made._module_pid = object(), None
        made._run = lambda *given: log.append((made, *map(plain, given)))
        return made

    def plain(value):
        return value.data_ptr() if isinstance(value, torch.Tensor) else value

    monkeypatch.setattr(triton.compiler, "compile", compile)
    monkeypatch.setattr(driver, "_active", Driver())
    return log


def routes(kernel, launched, grid, arguments):
    """The last launch by Triton and by ours, without Triton's notes for hooks (the seventh of what a launcher gets)."""
    kernel[grid](**arguments)
    programs(kernel, *grid)(**arguments)
    (*one, _, _, _), (*other, _, _, _) = (launch[:9] for launch in launched[-2:])
    return (one, launched[-2][10:]), (other, launched[-1][10:])


STORAGE = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
POINTERS = [tensor[at:] for tensor in STORAGE.values() for at in (0, 1, 8)] + [torch.nn.Parameter(torch.zeros(4))]
INTEGERS = [0, 1, 2, 8, 15, 16, 17, 2**15, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**40, 2**63 - 1, 2**63, 2**64 - 16]
NUMBERS = [*INTEGERS, *(-each for each in INTEGERS if each <= 2**63), True, False, 0.0, 1.0, 0.5, float("inf")]
OPTIONS = [{}, {"num_warps": 4}, {"num_warps": 8}, {"num_warps": 8, "num_stages": 2}, {"maxnreg": 64}]


def arguments_at_random(pick):
    return {
        "p_a": pick.choice(POINTERS),
        "p_b": pick.choice(POINTERS),
        "n": pick.choice(NUMBERS),
        "s": pick.choice(NUMBERS),
        "value": pick.choice(NUMBERS),
        "FLAG": pick.choice(["mean", "max", 0, 2]),
        "BLOCK": pick.choice([16, 32]),
        **pick.choice(OPTIONS),
    }


def test_both_routes_launch_the_same(kernel, launched):
    pick = random.Random(0)
    for _ in range(400):
        arguments = arguments_at_random(pick)
        grid = tuple(pick.choices([1, 2, 132], k=pick.choice([1, 2, 3])))
        # Twice: the first launch of a kind goes through Triton anyway.
        for _ in range(2):
            theirs, ours = routes(kernel, launched, grid, arguments)
            assert theirs == ours


@pytest.mark.parametrize("name", ["n", "s", "value", "p_a"])
def test_one_argument_at_a_time(kernel, launched, name):
    """Each value of one argument after each other value: a key that is too coarse would pick the binary before."""
    arguments = arguments_at_random(random.Random(1))
    values = POINTERS if name == "p_a" else NUMBERS
    for before, after in itertools.permutations(values, 2):
        programs(kernel, 1)(**arguments | {name: before})
        theirs, ours = routes(kernel, launched, (1,), arguments | {name: after})
        assert theirs == ours
    # One key for each kind that Triton tells apart, no more.
    kept = direct.launcher(kernel).kept.values()
    assert len({entry[0] for entry in kept}) == len(kept) < len(values)


def through_triton(monkeypatch):
    """Count the launches that Triton makes."""
    run, counted = JITFunction.run, []

    def count(self, *args, **kwargs):
        counted.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", count)
    return counted


def test_only_the_first_launch_of_a_kind_is_triton_s(kernel, launched, monkeypatch):
    counted = through_triton(monkeypatch)
    arguments = arguments_at_random(random.Random(3))
    for n in (5, 6, 7):
        programs(kernel, 3)(**arguments | {"n": n, "s": 3})
    assert (len(counted), len(launched)) == (1, 3)
    with observe_launches() as taken:
        programs(kernel, 3)(**arguments | {"n": n, "s": 3})
    assert (len(counted), len(launched), len(taken)) == (1, 4, 1)


@pytest.mark.parametrize("value", [np.int64(3), np.float32(3), None])
def test_what_has_no_name_here_is_triton_s(kernel, launched, value, monkeypatch):
    counted = through_triton(monkeypatch)
    arguments = arguments_at_random(random.Random(4)) | {"value": value}
    for _ in range(3):
        with suppress(TypeError):  # by Triton
            programs(kernel, 1)(**arguments)
    assert len(counted) == 3
    assert not direct.launcher(kernel).kept


def hook(metadata):
    pass


SETTINGS = {
    "a hook before": lambda patch: patch.setattr(knobs.runtime.launch_enter_hook, "calls", [hook]),
    "a hook after": lambda patch: patch.setattr(knobs.runtime.launch_exit_hook, "calls", [hook]),
    "another hook": lambda patch: patch.setitem(vars(knobs.runtime), "launch_enter_hook", hook),
    "debug": lambda patch: patch.setitem(vars(knobs.runtime), "debug", True),
    "instrumentation": lambda patch: patch.setitem(vars(knobs.compilation), "instrumentation_mode", "fpsan"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_hooks_and_settings_are_triton_s(kernel, launched, setting, monkeypatch):
    arguments = arguments_at_random(random.Random(5))
    programs(kernel, 1)(**arguments)
    with monkeypatch.context() as patch:
        counted = through_triton(patch)
        SETTINGS[setting](patch)
        programs(kernel, 1)(**arguments)
        other = arguments | {"n": 2**40}
        programs(kernel, 1)(**other)
        assert len(counted) == 2
    # Nothing that was compiled under a setting is kept after it.
    theirs, ours = routes(kernel, launched, (1,), other)
    assert theirs == ours


def test_a_hook_of_the_kernel_runs_at_each_launch(kernel, launched):
    arguments, calls = arguments_at_random(random.Random(6)), []
    programs(kernel, 1)(**arguments)
    kernel.add_pre_run_hook(lambda *args, **kwargs: calls.append(kwargs))
    programs(kernel, 1)(**arguments)
    assert len(calls) == 1


def test_device_and_stream_are_the_current_ones(kernel, launched, monkeypatch):
    arguments = arguments_at_random(random.Random(7))
    current = SimpleNamespace(device=0, stream=100)
    monkeypatch.setattr(driver.active, "get_current_device", lambda: current.device, raising=False)
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: current.stream + device, raising=False)
    picked = {}
    for _ in range(2):
        for current.device, current.stream in itertools.product((0, 1), (100, 200)):
            theirs, ours = routes(kernel, launched, (1,), arguments)
            assert theirs == ours
            assert ours[0][4] == current.stream + current.device
            picked.setdefault(current.device, set()).add(ours[0][0])
    assert [len(each) for each in picked.values()] == [1, 1]
    assert picked[0] != picked[1]


def test_launchers_of_triton_hand_on_the_same(tmp_path, kernel, monkeypatch):
    """All of Triton, its launchers too, down to what the CUDA driver is told."""
    counted = through_triton(monkeypatch)
    x = torch.zeros(64, dtype=torch.bfloat16)
    arguments = {"p_a": x[1:], "p_b": x, "n": 70_000, "s": 2**40, "value": 0.5, "FLAG": "mean", "BLOCK": 16}
    arguments |= {"num_warps": 8, "launch_pdl": True}
    # Two pointers, 32, 64 and 32 bits; the constants are in the binary.
    with stub_driver(tmp_path) as active, active.observed([8, 8, 4, 8, 4]) as launches:
        kernel[(5, 2)](**arguments)
        programs(kernel, 5, 2)(**arguments)
        programs(kernel, 5, 2)(**arguments)
        assert len(counted) == 2
    triton_s, first, ours = launches
    assert triton_s == first == ours
    assert (ours.grid, ours.block, ours.stream) == ((5, 2, 1), (256, 1, 1), 7)
    assert ours.attributes == (6,)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    (half,) = struct.unpack("<I", struct.pack("<f", 0.5))
    assert ours.parameters == (x.data_ptr() + 2, x.data_ptr(), 70_000, 2**40, half)


def test_another_release_is_left_to_triton(monkeypatch):
    for release in ("3.5.1", "3.10.0", "4.0.0+git"):
        monkeypatch.setattr(triton, "__version__", release)
        assert release in direct.reason.__wrapped__()
    for release in ("3.6.0", "3.9.0", "3.9.1+rocm"):
        monkeypatch.setattr(triton, "__version__", release)
        assert direct.reason.__wrapped__() == ""


def test_env_says_how_kernels_are_launched(monkeypatch):
    assert f"{'Triton launches':16} direct\n" in env.report()
    monkeypatch.setattr(direct, "reason", lambda: "of the moon")
    assert f"{'Triton launches':16} by Triton: of the moon\n" in env.report()


def test_pointers_of_the_kernels_are_called_so():
    """Direct launches know pointers by their names."""
    for op, arguments in CALLS.values():
        with record_launches() as launches:
            IMPLEMENTATIONS[op](*arguments)
        for launch in launches:
            for parameter in launch.kernel.params:
                value = launch.arguments[parameter.name]
                assert isinstance(value, torch.Tensor) == parameter.name.startswith("p_")
