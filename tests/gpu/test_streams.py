"""What a serving stack asks of an op: CUDA graphs, no host synchronization, other streams, other devices."""

from __future__ import annotations

import pytest
import torch

import bigain_kernels as bk

from .device import BACKENDS, DEVICE, DTYPES, needs_cuda, random_tokens

pytestmark = [needs_cuda, pytest.mark.parametrize("backend", BACKENDS)]
GRID = (32, 32)


def chain(x, gate, alpha):
    """L-GTM from tokens to tokens, its variants, and pooling with an alpha on the device."""
    plan = bk.lgtm_plan(x, GRID, 0.7)
    shared = bk.lgtm_plan(x, GRID, 0.5, share_plan=2, window=1)
    blocks = bk.abm_plan(x, GRID, 0.5)
    return [
        *torch.utils._pytree.tree_leaves((plan, shared, blocks)),
        bk.token_unmerge(bk.token_merge(x, plan), plan, residual=x, gate=gate),
        bk.token_merge(x, shared, "mlerp"),
        bk.token_merge(x, blocks, "prune"),
        *bk.kv_downsample((x, x), GRID, 2, alpha),
        bk.kv_downsample(x, GRID, 2, 1.0),
    ]


def inputs(dtype, seed):
    x = random_tokens(4, 1024, 320, dtype, seed)
    return x, x[:, 5].contiguous(), torch.rand(4, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_chain_replays_on_new_inputs(backend, dtype):
    with bk.use_backend(backend):
        static = inputs(dtype, 0)
        chain(*static)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(*static)
        for seed in (1, 2, 3):
            fresh = inputs(dtype, seed)
            for target, source in zip(static, fresh, strict=True):
                target.copy_(source)
            graph.replay()
            assert_same_bits(captured, chain(*fresh))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_device(backend, dtype):
    with bk.use_backend(backend):
        args = inputs(dtype, 0)
        expected = chain(*args)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = chain(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(actual, expected)


def test_a_second_stream(backend):
    """Launched on the current stream: the kernels wait for what that stream computes before, and nothing else does."""
    with bk.use_backend(backend):
        args = inputs(torch.bfloat16, 0)
        expected = chain(*args)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        late = [torch.zeros_like(t) for t in args]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for target, source in zip(late, args, strict=True):
                target.copy_(source)
            actual = chain(*late)
        stream.synchronize()
        assert_same_bits(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current(backend):
    with bk.use_backend(backend), torch.cuda.device(0):
        args = inputs(torch.bfloat16, 0)
        expected = chain(*args)
        there = chain(*(t.to("cuda:1") for t in args))
        assert all(t.device == torch.device("cuda:1") for t in there)
        assert_same_bits([t.to(DEVICE) for t in there], expected)
        assert torch.cuda.current_device() == 0
