"""All benchmarks that this machine can run: checks, times, rows and plots.

    python -m benchmarks.run --out benchmarks/results [--device cpu] [--minutes 8]

Writes <out>/<device>.csv (rows are appended) and, where matplotlib is installed, <out>/plots/<device>_<op>.png. The
status is 1 when a check failed, a target was missed or the time ran out; what was measured is written all the same.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from . import bench_memory, harness, machine

MODULES = (
    "bench_lgtm",
    "bench_laplacian_score",
    "bench_bipartite_match",
    "bench_merge_plan",
    "bench_token_merge",
    "bench_token_unmerge",
    "bench_kv_downsample",
    "bench_attention",
    "bench_attention_layer",
)


def device_file(session: harness.Session) -> str:
    """`cpu`, or the name of the GPU as a file name."""
    if session.device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def main() -> int:
    options = harness.parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    options.add_argument("--no-plots", action="store_true", help="draw nothing; `python -m benchmarks.plot` does later")
    options.add_argument("--module", action="append", choices=MODULES, help="default: all")
    arguments = options.parse_args()
    torch.set_grad_enabled(False)
    session = harness.session_of(arguments)
    table = session.csv = arguments.csv or arguments.out / f"{device_file(session)}.csv"
    harness.print_heading(session)
    for name in arguments.module or MODULES:
        harness.run(import_module(f"benchmarks.{name}"), session)
    if session.device == "cpu" and arguments.module is None:
        session.failures += bench_memory.compare()
    if session.device == "cpu":
        print(f"at the end: {machine.spin()}")
    status = harness.finish(session)
    print(f"{len(session.rows)} rows in {table}")
    if arguments.no_plots or find_spec("matplotlib") is None:
        print(f"no plots drawn; to draw them: python -m benchmarks.plot {table}")
    else:
        from .plot import plot_file

        for picture in plot_file(table, arguments.out / "plots"):
            print(picture)
    return status


if __name__ == "__main__":
    sys.exit(main())
