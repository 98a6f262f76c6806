"""Proportional attention over merged tokens: the ways a weight per key reaches the scores.

    python -m benchmarks.bench_proportional_attention --dtype bfloat16 [--seconds 1]

"plain" is PyTorch's attention without weights, what the others are measured against; "float32" computes everything in
float32, as a mask of that precision asks for on a GPU. Every way is checked against float64 before it is timed. The
fastest of all turns counts: on a CPU, disturbances only add.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bigain_kernels.attention import proportional_attention
from bigain_kernels.backends.key_bias import ROUTES, attend_with_bias

from . import harness
from .sdpa import assert_attention, split_heads

# Merged at ratio 0.7: (batch, heads, tokens, head dim).
SHAPES = {
    "sd15_512": (2, 8, 1229, 40),
    "sd2_512": (2, 5, 1229, 64),
    "dit_512": (2, 16, 308, 72),
    "sd15_512_level2": (2, 8, 308, 80),
    "flux_like": (1, 4, 1229, 128),
    "sd15_512_level3": (2, 8, 77, 160),
}
# The float64 result is computed for so many queries.
CHECKED = 64


def calls_of(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> dict[str, harness.Call]:
    """What to run, by name."""
    bias = sizes.float().log()
    return {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v),
        "float32": lambda: attend_with_bias(q.float(), k.float(), v.float(), bias, None, "mask").to(q.dtype),
        **{name: partial(proportional_attention, q, k, v, sizes, None, name) for name in ("op", *ROUTES)},
    }


def check(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, sizes: Tensor) -> None:
    """The first row of `out` errs at most twice as much as PyTorch's attention over one copy of a key per token."""
    if name == "plain":
        return
    keys, values = (x[:1].repeat_interleave(sizes[0].long(), dim=2) for x in (k, v))
    few = q[:1, :, :CHECKED]
    exact = F.scaled_dot_product_attention(few.double(), keys.double(), values.double())
    assert_attention(out[:1, :, :CHECKED], exact, F.scaled_dot_product_attention(few, keys, values))


def fastest(calls: dict[str, harness.Call], seconds: float, device: str) -> dict[str, float]:
    """Microseconds of each call's fastest turn; the calls take turns."""
    best = dict.fromkeys(calls, float("inf"))
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < 5:
        turns += 1
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e6)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each shape")
    options = parser.parse_args()
    dtype = harness.DTYPES[options.dtype]
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    for problem, (batch, heads, tokens, d) in SHAPES.items():
        x = torch.randn(batch, tokens, 3 * heads * d, generator=generator).to(options.device, dtype)
        q, k, v = (split_heads(each, heads) for each in x.chunk(3, dim=2))
        sizes = torch.randint(1, 9, (batch, tokens), generator=generator).to(options.device, torch.int32)
        calls = calls_of(q, k, v, sizes)
        for name, call in calls.items():
            out = call()
            assert isinstance(out, Tensor)
            check(name, out, q, k, v, sizes)
        times = fastest(calls, options.seconds, options.device)
        print(problem, options.dtype, *(f"{name} {value:.0f}" for name, value in times.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
