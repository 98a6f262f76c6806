"""Launches every kernel on small odd shapes and checks nothing: `compute-sanitizer` does.

    python tests/gpu/small_launches.py        (once without: the kernels are compiled then)
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/small_launches.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/small_launches.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/gpu/small_launches.py

Every tensor gets an allocation of its own, so that a read past its end is seen.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import bigain_kernels as bk
from tests.shapes import tokens

DTYPES = (torch.bfloat16, torch.float32)
# Leftover strips on both sides; tiles that are not square.
GRIDS = (((7, 5), (2, 2)), ((9, 13), (3, 2)))


def launch_everything(x: torch.Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> None:
    """Every op once, in every mode, on x (B, N, C)."""
    n = x.shape[1]
    score = bk.laplacian_score(x, grid)
    bk.laplacian_score(x, grid, "l2")
    destinations = bk.select_destinations(score, grid, stride)
    similarity, match = bk.bipartite_match(x, destinations)
    bk.bipartite_match(x, destinations, window=1, grid=grid, stride=stride)
    plans = [bk.merge_plan(similarity, match, destinations, n // 2, grid)]
    plans += [bk.block_merge_plan(score, grid, stride, n // 2, reduce) for reduce in ("max", "mean", "std")]
    ratio = 0.7 * bk.max_ratio(grid, stride)
    plans += [bk.lgtm_plan(x, grid, ratio, stride), bk.lgtm_plan(x, grid, ratio, stride, window=1)]
    if x.shape[0] % 2 == 0:
        plans.append(bk.lgtm_plan(x, grid, ratio, stride, share_plan=2))
    for plan in plans:
        for mode in ("mean", "mlerp", "prune"):
            y = bk.token_merge(x, plan, mode)
        bk.token_merge(x, plan, "mean", torch.ones_like(score))
        bk.token_merge(x, plan, norm_eps=1e-5)
        vectors = {"norm_weight": x[0, 0], "norm_bias": x[0, 0], "scale": x[:, 0], "shift": x[:, 0].float()}
        bk.token_merge(x, plan, weights=torch.ones_like(score), norm_eps=1e-5, **vectors)
        bk.token_unmerge(y, plan)
        bk.token_unmerge(y, plan, residual=x, gate=x[:, 0])
    factor = (min(2, grid[0]), min(3, grid[1]))
    rows = torch.linspace(0, 1, x.shape[0], device=x.device)
    for alpha in (0.0, 0.9, 1.0, rows):
        bk.kv_downsample((x, x[..., :8]), grid, factor, alpha)


def main() -> None:
    """Small grids, channels that fill blocks and do not, real strides, and a slot of more than a thousand members."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--backend", action="append", help="default: all that have kernels for the device")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for backend in options.backend or [name for name in bk.backends.order(options.device) if name != "reference"]:
        with bk.use_backend(backend):
            for dtype, (grid, stride) in zip(DTYPES, GRIDS, strict=True):
                whole = tokens(2, grid[0] * grid[1] + 3, 149, dtype).to(options.device)
                launch_everything(whole[:, 2:-1, 3:75], grid, stride)
            x = tokens(1, 1300, 64, torch.bfloat16).to(options.device)
            x[:, 5:1200] = x[:, :1]
            launch_everything(x, (26, 50), (2, 2))
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
