"""A repeated call launches what its launcher would, at the addresses of its own tensors."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.driver import driver

from bigain_kernels.declaration import OPS
from bigain_kernels.testing import Inputs, samples
from bigain_kernels.triton_kernels import configs, direct, registration
from bigain_kernels.triton_kernels.launching import record_launches
from bigain_kernels.triton_kernels.repeated import MOST, repeated

from .test_direct import launched as launched_by_triton  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(bool(direct.reason()), reason=direct.reason())
CALLS = samples(Inputs(torch.bfloat16, "cpu", 2, (8, 8), 64, head_dim=64))
WITHOUT_NUMBERS = {
    call: sample for call, sample in CALLS.items() if not any(isinstance(each, (float, list)) for each in sample[1])
}


class Arena:
    """Memory that is given out again from the start after `reset`, so that equal calls get equal addresses."""

    def __init__(self):
        self.memory, self.used = torch.zeros(1 << 22, dtype=torch.int64), 0

    def empty(self, shape, *, dtype, device):
        words = -(-torch.Size(shape).numel() * dtype.itemsize // 512) * 64
        self.used += words
        assert self.used <= self.memory.numel()
        made = self.memory[self.used - words : self.used].view(dtype)[: torch.Size(shape).numel()].view(shape)
        return made.detach()


@pytest.fixture
def launched(launched_by_triton, monkeypatch):  # noqa: F811
    """The same on another device: for the first, Triton shall keep no kernels that were never compiled."""
    monkeypatch.setattr(driver.active, "get_current_device", lambda: 99, raising=False)
    return launched_by_triton


@pytest.fixture
def arena(monkeypatch):
    """A block whose allocations are at the same addresses each time."""
    found = Arena()

    @contextmanager
    def use():
        found.used = 0
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", found.empty)
            patch.setattr(torch, "empty_like", lambda x: found.empty(x.shape, dtype=x.dtype, device=x.device))
            yield

    return use


def counting(launch):
    def counted(*args):
        counted.calls += 1
        return launch(*args)

    counted.calls = 0
    return counted


def launcher_of(op):
    return counting(OPS[op].of_launcher(registration._launcher(op)))


def others(args):
    """Tensors of the same kind in other memory, in the order of their addresses or not."""
    return [each.clone() if isinstance(each, torch.Tensor) and each.is_contiguous() else each for each in args]


def described(results):
    tensors = [results] if isinstance(results, torch.Tensor) else results
    return type(results), [(each.data_ptr(), each.dtype, each.shape, each.stride()) for each in tensors]


def compare(run, launch, args, launched, arena):
    """The launches of a repeated call, which are those of its launcher."""
    found = []
    for call in (launch, run):
        launched.clear()
        with arena():
            results = call(*args)
        found.append((described(results), [(each[0], each[1:7], each[10:]) for each in launched]))
    assert found[0] == found[1]
    return found[1][1]


@pytest.mark.parametrize("call", WITHOUT_NUMBERS)
def test_a_repeated_call_launches_what_its_launcher_does(call, launched, arena):
    op, args = WITHOUT_NUMBERS[call]
    launch = launcher_of(op)
    run = repeated(launch)
    run(*args)  # Triton compiles
    run(*args)
    watched = launch.calls
    for again in (args, others(args), others(args)[:1] + list(args[1:])):
        expected = compare(run, launcher_of(op), again, launched, arena)
        assert expected
    assert launch.calls == watched


def layer():
    x = torch.randn(2, 64, 32)
    tables = [torch.zeros(2, width, dtype=torch.int32) for width in (64, 21, 64, 20)]
    return torch.randn(2, 20, 32), tables, x, torch.randn(2, 32)


def test_one_tensor_in_two_places(launched, arena):
    """The first call must not say for all others that two inputs are one."""
    _, tables, x, _ = layer()
    launch = launcher_of("token_merge_norm")
    run = repeated(launch)
    both = [x, *tables, None, 1, None, None, x[:, 0], x[:, 1]]
    row = x[0, 0].clone()
    same = [*both[:7], row, row, None, None]
    for _ in range(2):
        compare(run, launcher_of("token_merge_norm"), same, launched, arena)
    assert launch.calls == 2
    different = [*both[:7], row, row.clone(), None, None]
    run(*different)
    for again in (different, same):
        calls = launch.calls
        compare(run, launcher_of("token_merge_norm"), again, launched, arena)
        assert launch.calls == calls


def test_other_kinds_are_launched_anew(launched, arena):
    y, tables, x, gate = layer()
    launch = launcher_of("token_unmerge")
    run = repeated(launch)
    shifted = torch.randn(2 * 64 * 32 + 1)[1:].view(2, 64, 32)
    strided = torch.randn(2, 64, 64)[:, :, :32]
    calls = [
        (y, *tables, x, None),
        (y, *tables, x, gate),
        (y, *tables, None, None),
        (y, *tables, shifted, None),
        (y, *tables, strided, None),
        (y.double().float(), *tables, x.bfloat16(), None),
        (torch.nn.Parameter(y), *tables, x, gate.half()),
    ]
    for args in calls:
        run(*args)
    for _ in range(2):
        for args in calls:
            compare(run, launcher_of("token_unmerge"), args, launched, arena)
    assert launch.calls == len(calls)


def test_copies_are_never_repeated(launched, arena):
    y, tables, x, _ = layer()
    launch = launcher_of("token_unmerge")
    run = repeated(launch)
    for i in range(3):
        run(y, *tables, x.transpose(1, 2).contiguous().transpose(1, 2), None)
        assert launch.calls == i + 1


def test_calls_that_others_look_at_are_not_repeated(launched, monkeypatch):
    y, tables, x, _ = layer()
    launch = launcher_of("token_unmerge")
    run = repeated(launch)
    args = (y, *tables, x, None)
    run(*args)
    run(*args)
    assert launch.calls == 1
    with record_launches() as launches:
        run(*args)
    assert (launch.calls, len(launches)) == (2, 1)
    with configs.use_chooser(configs.Chooser()):
        run(*args)
    assert launch.calls == 3
    monkeypatch.setattr(direct, "untouched", lambda: False)
    run(*args)
    assert launch.calls == 4


def test_what_is_kept_is_bounded(launched):
    launch = launcher_of("laplacian_score")
    run = repeated(launch)
    for width in range(1, MOST + 10):
        run(torch.zeros(1, width, 8), 1, width, "l1")
    run(torch.zeros(1, width, 8), 1, width, "l1")
    run(torch.zeros(1, 1, 8), 1, 1, "l1")
    assert launch.calls == MOST + 10
