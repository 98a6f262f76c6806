"""Random calls of the ops, most of them wrong: `python -m tests.csrc.fuzz --count 2000 --seed 0`.

A call may return or raise; what it may not do is end the process. Prints how many did which.
"""

# ruff: noqa: T201 (a program that prints its results)

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from torch import Tensor

from tests.csrc.test_direct_calls import (
    ANCHOR,
    DESTINATIONS,
    MATCH,
    MEMBERS,
    NORM_ARGUMENTS,
    OFFSETS,
    SCORE,
    SIMILARITY,
    SLOT,
    X,
    Y,
)

CALLS = [
    ("laplacian_score", (X, 6, 8, "l1")),
    ("select_destinations", (SCORE, 6, 8, 2, 2)),
    ("bipartite_match", (X, DESTINATIONS, -1, 1, 1, 1, 1)),
    ("bipartite_match", (X, DESTINATIONS, 1, 6, 8, 2, 2)),
    ("merge_plan", (SIMILARITY, MATCH, DESTINATIONS, 20)),
    ("block_merge_plan", (SCORE, 6, 8, 2, 2, 20, "mean")),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, "mean", None)),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, "mlerp", SCORE)),
    ("token_merge", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, "prune", None)),
    ("token_merge_norm", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, *NORM_ARGUMENTS)),
    ("token_merge_norm", (X, SLOT, OFFSETS, MEMBERS, ANCHOR, None, 1e-5, None, None, None, None)),
    ("token_unmerge", (Y, SLOT, OFFSETS, MEMBERS, ANCHOR, X, X[:, 0])),
    ("kv_downsample", ([X, X], 6, 8, 2, 2, 0.9, None)),
    ("kv_downsample", ([X], 6, 8, 2, 1, 0.0, SCORE[:, 0].contiguous())),
    ("lgtm_plan", (X, 6, 8, 2, 2, 20, -1, 1)),
    ("lgtm_plan", (X, 6, 8, 2, 2, 20, 1, 2)),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]
INTEGERS = [0, 1, 2, 3, 6, 8, 48, -1, -2, 10**9, 2**31, 2**62, 2**63 - 1, -(2**63)]


def with_odd_value(tensor: Tensor) -> Tensor:
    """The tensor with one value replaced: an index out of range, or a number that is none."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    values = [torch.nan, torch.inf, -torch.inf, 6e4] if tensor.is_floating_point() else [-1, 28, 47, 48, 49, 2**31 - 1]
    tensor.view(-1)[random.randrange(tensor.numel())] = random.choice(values)
    return tensor


def broken_tensor(tensor: Tensor) -> Tensor:
    """A tensor of another dtype, rank, shape, layout, device or content."""
    changes = [
        lambda: tensor.to(random.choice(DTYPES)),
        lambda: tensor[None],
        lambda: tensor[:0],
        lambda: tensor.to("meta"),
        lambda: tensor.new_empty(0),
        lambda: tensor.to(torch.complex64),
    ]
    if tensor.is_meta or tensor.is_sparse or tensor.is_complex():
        return tensor
    if tensor.dim() >= 2 and tensor.numel() > 0:
        changes += [
            lambda: tensor[0],
            lambda: tensor[:, :0],
            lambda: tensor[..., 1:],
            lambda: tensor[..., ::2],
            lambda: tensor[:2],
            lambda: tensor[:1].expand(tensor.shape),
            lambda: tensor.transpose(0, -1),
            lambda: tensor.to_sparse(),
            lambda: with_odd_value(tensor),
            lambda: with_odd_value(tensor),
        ]
    return random.choice(changes)()


def broken(value: Any) -> Any:
    """Something else of the type of the argument, or nearly."""
    if isinstance(value, Tensor):
        return broken_tensor(value)
    if isinstance(value, list):
        return random.choice([[], [broken_tensor(X)], [X, broken_tensor(X)]])
    if isinstance(value, int):
        return random.choice([*INTEGERS, random.randint(-50, 50)])
    if isinstance(value, float):
        return random.choice([torch.nan, torch.inf, -1e308, 2.0])
    if isinstance(value, str):
        return random.choice(["", "l2", "std", "mlerp", "prune", "x" * 10000])
    return random.choice([None, X, SCORE, SCORE[:, 0]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulated", help="call the ops of this library, the emulated CUDA kernels")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    namespace = torch.ops.bigain
    if arguments.emulated:
        torch.ops.load_library(arguments.emulated)
        namespace = torch.ops.bigain_cuda
    returned = raised = 0
    for _ in range(arguments.count):
        op, values = random.choice(CALLS)
        values = list(values)
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            place = random.randrange(len(values))
            values[place] = None if random.random() < 0.03 else broken(values[place])
        try:
            getattr(namespace, op)(*values)
            returned += 1
        # The kinds that torch.ops and the fake implementations (for meta tensors) raise.
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, ZeroDivisionError):
            raised += 1
    print(f"returned {returned} raised {raised}")


if __name__ == "__main__":
    main()
