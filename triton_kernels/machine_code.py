"""The machine code of a recorded launch: compiled without a GPU, read, and held to the rules of `aot`."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .early import as_on
from .launching import Launch

# Bytes of shared memory (LDS) that one program may have.
SHARED_LIMIT = {
    **{"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376},
    "gfx942": 65_536,
}
# Kernels that move data: the width of their accesses is their speed.
STREAMS_IN = (
    *("laplacian_score", "row_stats", "match_prepare", "match_near"),
    *("token_merge", "token_unmerge", "kv_downsample"),
)
MULTIPLIES = ("bipartite_match", "kv_downsample_attention", "pooled_kv_projection")
STREAMS_OUT = ("token_merge", "token_unmerge", "kv_downsample")
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Case(NamedTuple):
    """One kernel in one config with the launch that compiles it."""

    op: str
    dtype: str
    config: str
    launch: Launch


class Result(NamedTuple):
    """What the compiler made of a case, and the rules it breaks."""

    registers: int
    spills: int
    shared: int
    instructions: Counter[str]
    row_order: str
    broken: list[str]


def specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(signature, constants, attributes) of a launch as Triton's just-in-time path derives them from its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_case(launch: Launch, architecture: str) -> Any:
    """Compile a recorded launch for an architecture without a GPU."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    launch = launch._replace(arguments=as_on(architecture, launch.arguments))
    signature, constants, attributes = specialize(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    # What a launch is given beyond the kernel's own arguments.
    options = {key: value for key, value in launch.arguments.items() if key not in launch.kernel.arg_names}
    return triton.compile(source, target=target, options=options)


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that comes in the Triton wheel."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _cuobjdump(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tool('cuobjdump').parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [str(tool("cuobjdump")), flag, file.name], capture_output=True, text=True, check=True, env=environment
        )
    return done.stdout


def usage(compiled: Any) -> tuple[int, int, int]:
    """Registers, bytes of local memory and bytes of shared memory; many times sooner than the code is disassembled."""
    text = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared


def read_nvidia(compiled: Any) -> tuple[int, int, int, Counter[str]]:
    """What `usage` says, and how often each opcode stands in the code."""
    sass = _cuobjdump(compiled.asm["cubin"], "-sass")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return (*usage(compiled), Counter(opcodes))


def _read_amd(compiled: Any) -> tuple[int, int, int, Counter[str]]:
    text = compiled.asm["amdgcn"]
    number = {
        key: max(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    opcodes = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_[a-z0-9_]+)", text, re.MULTILINE)
    # Scalar registers spill into lanes of vector registers, not into memory.
    spills = max(4 * number["vgpr_spill_count"], number["private_segment_fixed_size"])
    return number["vgpr_count"], spills, compiled.metadata.shared, Counter(opcodes)


def _any(instructions: Counter[str], pattern: str) -> bool:
    return any(re.match(pattern, opcode) for opcode in instructions)


def broken_rules(case: Case, architecture: str, spills: int, shared: int, instructions: Counter[str]) -> list[str]:
    """The rules of this module that a compiled case breaks, in words."""
    broken = []
    amd = architecture.startswith("gfx")
    kernel = case.launch.name
    if spills or _any(instructions, r"(LDL|STL|scratch_)"):
        broken.append(f"{spills} bytes of local memory")
    if shared > SHARED_LIMIT[architecture]:
        broken.append(f"shared memory {shared} over {SHARED_LIMIT[architecture]}")
    if _any(instructions, r"(DADD|DMUL|DFMA|DSETP|DMMA|F2F\.F64|I2F\.F64|v_(add|mul|fma|div_\w+)_f64)"):
        broken.append("double precision")
    if kernel in MULTIPLIES:
        wanted = {"sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}.get(architecture, "v_mfma" if amd else "HMMA")
        if case.launch.arguments["BLOCK_M"] < 64 and not amd:
            wanted = "HMMA"
        if not _any(instructions, wanted):
            broken.append(f"no {wanted}")
    wide_in = r"(global|buffer)_load_dwordx4" if amd else r"LDG\.E\.128|LDG\.E\S*\.128|LDGSTS\S*\.128"
    wide_out = r"(global|buffer)_store_dwordx4" if amd else r"STG\.E\S*\.128|STG\.E\.128"
    if kernel in STREAMS_IN and not _any(instructions, wide_in):
        broken.append("no 16-byte loads")
    if kernel in STREAMS_OUT and not _any(instructions, wide_out):
        broken.append("no 16-byte stores")
    return broken


def row_order(ttgir: str) -> str:
    """In which order the compiler sums: the kind of matrix instruction (M x K), and how the columns of tiles whose rows
    are summed are spread over registers, lanes and warps.

    Two configs with the same answer give the same bits, however many rows a tile has and which warps have them.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    shapes = re.findall(
        r"(?:nvidia_mma|amd_mfma)<\{.*?instrShape = \[(\d+), \d+((?:, \d+)?)\]", "\n".join(layouts.values())
    )
    found = {f"{m}{k.replace(', ', ' x ')} products" for m, k in shapes}
    for body, tile in re.findall(r'"tt\.reduce"(.*?)\}\) : \(tensor<(.*?)>\)', ttgir, re.DOTALL):
        shape = re.fullmatch(r"\d+x(\d+)xf32, (#\w+)", tile)
        if shape is None or "axis = 1 " not in body or "arith.addf" not in body:
            continue  # a maximum is the same in any order
        columns, name = shape.groups()
        layout = layouts[name]
        if "#ttg.linear" in layout:
            places = re.findall(r"(register|lane|warp) = \[(.*?)\](?=, \w+ =|\})", layout)
            spread = {place: [c for c in re.findall(r"\[\d+, (\d+)\]", bases) if c != "0"] for place, bases in places}
            found.add(f"{columns} columns: {spread}")
        else:
            found.add(f"{columns} columns: " + re.sub(r"warpsPerCTA = \[\d+, (\d+)\]", r"\1 warps a row", layout))
    return "; ".join(sorted(found))


def examine(case: Case, architecture: str) -> Result:
    """Compile a case and judge the machine code."""
    compiled = compile_case(case.launch, architecture)
    read = _read_amd if architecture.startswith("gfx") else read_nvidia
    registers, spills, shared, instructions = read(compiled)
    broken = broken_rules(case, architecture, spills, shared, instructions)
    return Result(registers, spills, shared, instructions, row_order(compiled.asm["ttgir"]), broken)


_CLASSES = {
    "wgmma": "HGMMA",
    "tcgen05": r"UTC\w*MMA",
    "mma": r"(HMMA|v_mfma)",
    "async copy": r"LDGSTS",
    "load 16 B": r"(LDG\.E\S*\.128|(global|buffer)_load_dwordx4)",
    "store 16 B": r"(STG\.E\S*\.128|(global|buffer)_store_dwordx4)",
    "atomics": r"(ATOMG|REDG|RED\.|global_atomic|buffer_atomic)",
    "barriers": r"(BAR\.|s_barrier)",
}


def summary(instructions: Counter[str]) -> str:
    """Counts of the instruction classes that matter, as text."""
    counts = {
        name: sum(count for opcode, count in instructions.items() if re.match(pattern, opcode))
        for name, pattern in _CLASSES.items()
    }
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
