"""The compiled CUDA library: what one step of each loop costs, and how its loads wait for one another.

Its launches are made in C++, out of sight, so nothing is said of programs, and no time is predicted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..machine_code import tool
from .model import SCHEDULERS, Walk, loop_facts
from .sass import disassemble
from .trips import Trips

# One type stands for all: bfloat16, on aligned tensors where a kernel makes the difference.
_SHOWN = re.compile(r"BFloat16|merge_plan|pack|tables|select")
# Loops of fewer instructions search tables or fold a few sums.
_SHORT = 40
_NAME = re.compile(r"\d([a-z]+(?:_[a-z0-9]+)*_kernel)(.*)")


def cubins(library: Path) -> Iterator[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tool("cuobjdump")), "-xelf", "sm_90", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        for path in sorted(Path(folder).iterdir()):
            yield path.read_bytes()


def usage(cubin: bytes) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes of local memory and of static shared memory, by mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {name: (int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found}


def rows(library: Path) -> Iterator[dict[str, Any]]:
    """A row for every kernel of the library for sm_90, in bfloat16."""
    # Several files may have the same kernel.
    seen: set[str] = set()
    for cubin in cubins(library):
        found = usage(cubin)
        for name, function in disassemble(cubin).items():
            short = _NAME.search(name)
            if short is None or not _SHOWN.search(name) or name in seen:
                continue
            seen.add(name)
            walk = Walk(function, Trips(Counter(), Counter(), Counter(), {}, set()), SCHEDULERS)
            walk.time(function.code)
            registers, spills, shared = found[name]
            facts = loop_facts(function.code, walk, SCHEDULERS)
            yield {
                "kernel": short[1],
                "variant": short[2],
                "registers": registers,
                "spills": spills,
                "static_shared": shared,
                "instructions": len(function.instructions),
                "depth": walk.depth,
                "loops": [vars(each) for each in facts if each.instructions >= _SHORT],
            }


def markdown(found: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as a table; of the loops, instructions of a step, cycles by its stall counts, loads and barriers."""
    yield "| kernel | variant | registers | instructions | depth | loops: instructions, stalls, loads, barriers |"
    yield "|---|---|---|---|---|---|"
    for each in found:
        loops = "; ".join(
            f"{loop['instructions']:.0f}, {loop['stalls']:.0f}, {loop['loads'] + loop['copies']:.0f},"
            f" {loop['barriers']:.0f}" + (f", tensor {loop['ceiling']:.2f}" if loop["tensor"] else "")
            for loop in each["loops"]
        )
        head = f"| {each['kernel']} | {each['variant']} | {each['registers']} | {each['instructions']} |"
        yield f"{head} {each['depth']} | {loops} |"
