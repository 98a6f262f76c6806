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
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
    out: Path | None = None,
    against: Path | None = None,
    built: Path | None = None,
    emulated: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print what is predicted of every launch, of Triton's or of a CUDA library's, and write it to a file."""
    found = list(table.rows() if built is None or emulated is None else cuda.rows(built, emulated))
    compiler = f"triton {triton.__version__}" if built is None else "nvcc"
    text = table.dump(table.document(found, compiler))
    if as_json:
        print(text, end="")
    else:
        print(f"PREDICTED for {table.ARCHITECTURE} with {compiler}; nothing here was measured\n")
        print("\n".join(table.markdown(found)))
    if against is not None:
        print(f"\n{against} -> now\n")
        print("\n".join(table.side_by_side(table.read(against), found)))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    return 0


def checked(architectures: Iterable[str], default_only: bool = False) -> Iterator[dict[str, Any]]:
    """A row for every case: what it is, what the compiler made of it, and the rules that it breaks."""
    seen: dict[str, Result] = {}
    orders: dict[tuple[str, str, str], str] = {}
    for architecture in architectures:
        for case in cases(architecture, default_only=default_only):
            signature = repr((case.launch.name, specialize(case.launch), case.config, architecture))
            key = hashlib.sha256(signature.encode()).hexdigest()
            if key not in seen:
                seen[key] = examine(case, architecture)
            result = seen[key]
            order = orders.setdefault((architecture, case.op, case.dtype), result.row_order)
            if result.row_order != order:
                result.broken.append(f"sums rows as {result.row_order}, another config as {order}")
            yield {
                "architecture": architecture,
                "kernel": case.op,
                "dtype": case.dtype,
                "config": case.config,
                "registers": result.registers,
                "spills": result.spills,
                "shared": result.shared,
                "instructions": summary(result.instructions),
                "broken": list(result.broken),
            }


def check(architectures: Sequence[str], default_only: bool = False, as_json: bool = False) -> int:
    """Print the table of `checked`; 1 when a rule is broken."""
    found: list[dict[str, Any]] = []
    if not as_json:
        print(f"triton {triton.__version__}, torch {torch.__version__}; x is {SHAPE} on a {GRID} grid")
    for row in checked(architectures, default_only):
        if not as_json:
            if not found or found[-1]["architecture"] != row["architecture"]:
                print(f"\n## {row['architecture']}\n")
                print("| kernel | dtype | config | registers | spills | shared | instructions | |")
                print("|---|---|---|---|---|---|---|---|")
            cells = [str(row[name]) for name in list(row)[1:-1]]
            print(f"| {' | '.join(cells)} | {'; '.join(row['broken']) or 'ok'} |", flush=True)
        found.append(row)
    failures = sum(bool(row["broken"]) for row in found)
    if as_json:
        compiler = {"triton": triton.__version__, "torch": torch.__version__}
        print(json.dumps({**compiler, "x": SHAPE, "grid": GRID, "broken": failures, "rows": found}, indent=2))
    else:
        print(f"\n{failures} broken" if failures else "\nevery rule holds")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m bigain_kernels.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--default-only", action="store_true", help="only the config chosen for large calls")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of tables")
    parser.add_argument("--report", action="store_true", help="predict the launches at the design's shapes, for sm_90")
    parser.add_argument("--out", type=Path, help="with --report: a file of predictions to write")
    parser.add_argument("--against", type=Path, help="with --report: an older file of predictions to compare with")
    parser.add_argument("--library", type=Path, help="read the loops of a built CUDA library instead")
    parser.add_argument("--emulated", type=Path, help="with --report --library: an emulated one, for its launches")
    parser.add_argument("--choose", action="store_true", help="write what the model likes best into tuned/, for sm_90")
    options = parser.parse_args(arguments)
    if options.json and options.against:
        parser.error("--against: got it with --json, expected one of the two: compare two files of --out instead")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET: is set, expected unset: the interpreter compiles nothing")
    if options.report and options.library and not options.emulated:
        parser.error("--emulated: is missing, expected a library built with csrc/build_cuda.py --emulate")
    if options.choose:
        configs.path_of(table.ARCHITECTURE).write_text(dump(choose.improved(table.Compiler())))
        return 0
    if options.library and not options.report:
        kernels = list(library.rows(options.library))
        text = table.dump(table.document(kernels, "nvcc"))
        print(text if options.json else "\n".join(library.markdown(kernels)))
        if options.out:
            options.out.write_text(text)
        return 0
    if options.report:
        return report(options.out, options.against, options.library, options.emulated, options.json)
    return check(options.architecture or ARCHITECTURES, options.default_only, options.json)
