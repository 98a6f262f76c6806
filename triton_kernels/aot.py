"""`python -m bigain_kernels.aot`: what can be known about the Triton kernels without a GPU.

Compiles every kernel, in every config that tuned/ ships, for NVIDIA and AMD architectures, and reads the machine code:
registers, spills, shared memory and the kinds of instructions. Exits with 1 when a rule is broken:

* no spills and no local memory;
* shared memory within what the architecture gives a program;
* matching, attention and projections use the tensor cores: wgmma (HGMMA) on sm_90, tcgen05 (UTC...MMA) on sm_100, MMA
  instructions elsewhere and in float32 attention with wide heads, whose tiles are too small for the former two;
* all configs of a kernel sum the rows of a tile in one order (attention: no other kernel leaves that to the compiler);
* the memory-bound kernels load and store 16 bytes at a time;
* no double-precision arithmetic.

With `--report`, says instead what the machine code makes of the design's shapes: see report/ and docs/performance.md.
With `--choose`, configs that were never measured are chosen by that.

The launches are the real ones: the launchers run on meta tensors and a recorder takes down what they would launch, with
the same argument specializations (pointer alignment, divisible strides) that Triton derives from a call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from . import configs
from .aot_recipes import GRID, SHAPE, recipes
from .launching import record_launches
from .machine_code import MULTIPLIES, TYPES, Case, Result, examine, specialize, summary
from .report import choose, cuda, library, table
from .tune import dump

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def cases(
    architecture: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    default_only: bool = False,
) -> Iterator[Case]:
    """Every kernel in every config shipped for the architecture, or in the one chosen for large calls."""
    for dtype in dtypes:
        for kernel, variant, op, call in recipes(dtype):
            if dtype == torch.float16 and kernel not in MULTIPLIES:
                continue  # moves the same bytes as bfloat16
            entry = configs.table(architecture)["ops"][op]
            chosen = [entry["candidates"][entry["choice"]["large"]]] if default_only else entry["candidates"]
            for config in chosen:
                # The launcher of another kernel launches these first, and looks up their configs itself.
                looked_up = kernel in ("match_prepare", "huge_mean")
                with record_launches() as launches:
                    call(None if looked_up else config)
                (launch,) = (each for each in launches if each.name == kernel)
                if looked_up:
                    launch.arguments.update(config)
                if kernel in MULTIPLIES and architecture.startswith("gfx"):
                    # The launcher asks the PyTorch at hand, which is not the one of that GPU.
                    launch.arguments["PRECISION"] = "ieee"
                name = f"{kernel} ({variant})" if variant else kernel
                text = " ".join(f"{key.replace('BLOCK_', '').replace('num_', '')}={v}" for key, v in config.items())
                yield Case(name, TYPES[dtype], text, launch)


def report(
    out: Path | None = None, against: Path | None = None, built: Path | None = None, emulated: Path | None = None
) -> int:
    """Print what is predicted of every launch, of Triton's or of a CUDA library's, and write it to a file."""
    if built is not None and emulated is None:
        raise SystemExit("--emulated: is missing, expected a library built with csrc/build_cuda.py --emulate")
    found = list(table.rows() if built is None or emulated is None else cuda.rows(built, emulated))
    compiler = f"triton {triton.__version__}" if built is None else "nvcc"
    print(f"PREDICTED for {table.ARCHITECTURE} with {compiler}; nothing here was measured\n")
    print("\n".join(table.markdown(found)))
    if against is not None:
        print(f"\n{against} -> now\n")
        print("\n".join(table.side_by_side(table.read(against), found)))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(table.dump(table.document(found, compiler)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m bigain_kernels.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--default-only", action="store_true", help="only the config chosen for large calls")
    parser.add_argument("--report", action="store_true", help="predict the launches at the design's shapes, for sm_90")
    parser.add_argument("--out", type=Path, help="with --report: a file of predictions to write")
    parser.add_argument("--against", type=Path, help="with --report: an older file of predictions to compare with")
    parser.add_argument("--library", type=Path, help="read the loops of a built CUDA library instead")
    parser.add_argument("--emulated", type=Path, help="with --report --library: an emulated one, for its launches")
    parser.add_argument("--choose", action="store_true", help="write what the model likes best into tuned/, for sm_90")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET: is set, expected unset: the interpreter compiles nothing")
    if options.choose:
        configs.path_of(table.ARCHITECTURE).write_text(dump(choose.improved(table.Compiler())))
        return 0
    if options.library and not options.report:
        kernels = list(library.rows(options.library))
        print("\n".join(library.markdown(kernels)))
        if options.out:
            options.out.write_text(table.dump(table.document(kernels, "nvcc")))
        return 0
    if options.report:
        return report(options.out, options.against, options.library, options.emulated)
    print(f"triton {triton.__version__}, torch {torch.__version__}; x is {SHAPE} on a {GRID} grid")
    failures = 0
    seen: dict[str, Result] = {}
    orders: dict[tuple[str, str, str], str] = {}
    for architecture in options.architecture or ARCHITECTURES:
        print(f"\n## {architecture}\n")
        print("| kernel | dtype | config | registers | spills | shared | instructions | |")
        print("|---|---|---|---|---|---|---|---|")
        for case in cases(architecture, default_only=options.default_only):
            signature = repr((case.launch.name, specialize(case.launch), case.config, architecture))
            key = hashlib.sha256(signature.encode()).hexdigest()
            if key not in seen:
                seen[key] = examine(case, architecture)
            result = seen[key]
            order = orders.setdefault((architecture, case.op, case.dtype), result.row_order)
            if result.row_order != order:
                result.broken.append(f"sums rows as {result.row_order}, another config as {order}")
            failures += bool(result.broken)
            verdict = "; ".join(result.broken) or "ok"
            print(
                f"| {case.op} | {case.dtype} | {case.config} | {result.registers} | {result.spills} |"
                f" {result.shared} | {summary(result.instructions)} | {verdict} |",
                flush=True,
            )
    print(f"\n{failures} broken" if failures else "\nevery rule holds")
    return 1 if failures else 0
