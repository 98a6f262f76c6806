"""What this machine can do at most: a large copy, a large matrix product, and PyTorch's attention at each shape.

The copy and the matrix product are the floors of all other benchmarks; the attention of each fused backend that takes
the shape is what an unpatched model can spend.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from . import harness
from .problems import PROBLEMS
from .sdpa import backends_for, split_heads


def attention_case(name: str, device: str, dtype: torch.dtype) -> harness.Case:
    """Full attention of a problem by every backend that takes it."""
    problem = PROBLEMS[name]
    x = problem.make(device, dtype)
    q, k, v = (split_heads(each, problem.heads) for each in (x, x.flip(1), x.flip(0, 1)))

    def with_backend(backend: Any) -> Any:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    providers = {backend.name.lower(): with_backend(backend) for backend in backends_for(q, k, v)}
    providers["default"] = lambda: F.scaled_dot_product_attention(q, k, v)
    expected = providers["default"]()

    def check(provider: str, out: Any) -> None:
        assert (out - expected).abs().max() <= 0.01 * expected.abs().max(), "backends disagree"

    flops = 4 * problem.batch * problem.tokens**2 * problem.channels
    return harness.Case(providers, check, harness.tokens_bytes(x, 4), flops)


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    torch.set_grad_enabled(False)
    session = harness.session_of(arguments)
    harness.print_heading(session)
    for name in session.problems:
        if not PROBLEMS[name].alike and not session.is_late("attention", name):
            case = attention_case(name, session.device, harness.DTYPES[session.dtype])
            harness.run_case(session, "attention", name, case, ())
    return harness.finish(session)


if __name__ == "__main__":
    sys.exit(main())
