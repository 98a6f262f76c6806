"""`python -m bigain_kernels.aot`: what can be known about the Triton kernels without a GPU.

Compiles every kernel, in every config that tuned/ ships, for NVIDIA and AMD architectures, and reads the machine code:
registers, spills, shared memory and the kinds of instructions. Exits with 1 when a rule is broken:

* no spills and no local memory;
* shared memory within what the architecture gives a program;
* matching uses the tensor cores: wgmma (HGMMA) on sm_90, tcgen05 (UTC...MMA) on sm_100, MMA instructions elsewhere;
* the memory-bound kernels load and store 16 bytes at a time;
* no double-precision arithmetic.

The launches are the real ones: the launchers run on meta tensors and a recorder takes down what they would launch, with
the same argument specializations (pointer alignment, divisible strides) that Triton derives from a call.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Bytes of shared memory (LDS) that one program may have.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
# Kernels that move data: the width of their accesses is their speed.
STREAMS_IN = ("laplacian_score", "row_stats", "match_prepare", "token_merge", "token_unmerge", "kv_downsample")
STREAMS_OUT = ("token_merge", "token_unmerge", "kv_downsample")
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_SHAPE = (2, 4096, 320)
_GRID = (64, 64)


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid of programs and its arguments by name (options included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


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
    broken: list[str]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Take down the launches of the block instead of running them; works on meta tensors."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, tuple(grid), arguments))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


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
            signature[parameter.name] = "*" + _TYPES[value.dtype]
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


def _plan_tables(batch: int, n: int, m: int) -> dict[str, torch.Tensor]:
    widths = {"slot": n, "offsets": m + 1, "members": n, "anchor": m}
    return {name: torch.empty((batch, w), dtype=torch.int32, device="meta") for name, w in widths.items()}


def _recipes(dtype: torch.dtype) -> list[tuple[str, str, str, Callable[[dict[str, Any] | None], Any]]]:
    """(kernel, variant, op of the config, call) for every kernel; the call gets a config."""
    from bigain_kernels.triton_kernels import bipartite_match, kv_downsample, laplacian_score, merge_plan, row_stats
    from bigain_kernels.triton_kernels import token_merge as merging

    batch, n, channels = _SHAPE
    x = torch.empty(_SHAPE, dtype=dtype, device="meta")
    m = n - int(0.7 * n)
    tables = _plan_tables(batch, n, m)
    merge_tables = {name: tables[name] for name in ("offsets", "members", "anchor")}
    vector = torch.empty((channels,), dtype=dtype, device="meta")
    rows = torch.empty((batch, channels), dtype=dtype, device="meta")
    y = torch.empty((batch, m, channels), dtype=dtype, device="meta")
    destinations = torch.empty((batch, n // 4), dtype=torch.int32, device="meta")
    match_op = "bipartite_match_fp32" if dtype == torch.float32 else "bipartite_match"
    window_op = "bipartite_match_fp32" if dtype == torch.float32 else "bipartite_match_window"

    def match(window: int | None, split: int) -> Callable[[dict[str, Any] | None], Any]:
        return lambda config: bipartite_match.launch_bipartite_match(
            x, destinations, window, _GRID, (2, 2), config=None if config is None else {**config, "SPLIT": split}
        )

    return [
        (
            "laplacian_score",
            "score",
            "laplacian_score",
            lambda c: laplacian_score.launch_laplacian_score(x, _GRID, config=c),
        ),
        (
            "laplacian_score",
            "select",
            "laplacian_score",
            lambda c: laplacian_score.launch_score_and_select(x, _GRID, (2, 2), config=c),
        ),
        (
            "laplacian_score",
            "select, share 2",
            "laplacian_score",
            lambda c: laplacian_score.launch_score_and_select(x, _GRID, (2, 2), share=2, config=c),
        ),
        ("row_stats", "norm", "row_stats", lambda c: row_stats.launch_row_stats(x, "norm", config=c)),
        ("row_stats", "layernorm", "row_stats", lambda c: row_stats.launch_row_stats(x, "layernorm", 1e-5, config=c)),
        ("match_prepare", "", "match_prepare", match(None, 1)),
        ("bipartite_match", "", match_op, match(None, 1)),
        ("bipartite_match", "split", match_op, match(None, 4)),
        ("bipartite_match", "window", window_op, match(1, 1)),
        ("token_merge", "mean", "token_merge", lambda c: merging.launch_token_merge(x, **merge_tables, config=c)),
        (
            "token_merge",
            "mlerp",
            "token_merge",
            lambda c: merging.launch_token_merge(x, **merge_tables, mode="mlerp", config=c),
        ),
        (
            "token_merge",
            "prune",
            "token_merge",
            lambda c: merging.launch_token_merge(x, **merge_tables, mode="prune", config=c),
        ),
        (
            "token_merge",
            "adaLN",
            "token_merge",
            lambda c: merging.launch_token_merge(
                x, **merge_tables, norm=True, norm_weight=vector, norm_bias=vector, shift=rows, scale=rows, config=c
            ),
        ),
        ("token_unmerge", "", "token_unmerge", lambda c: merging.launch_token_unmerge(y, tables["slot"], config=c)),
        (
            "token_unmerge",
            "gate, residual",
            "token_unmerge",
            lambda c: merging.launch_token_unmerge(y, tables["slot"], x, rows, config=c),
        ),
        (
            "kv_downsample",
            "2 tensors",
            "kv_downsample",
            lambda c: kv_downsample.launch_kv_downsample([x, x], _GRID, (2, 2), 0.9, config=c),
        ),
    ] + [
        recipe
        for recipe in _plan_recipes(merge_plan)
        # Planning sees no tokens, so one dtype stands for all.
        if dtype == torch.bfloat16
    ]


def _plan_recipes(merge_plan: Any) -> list[tuple[str, str, str, Callable[[dict[str, Any] | None], Any]]]:
    # 16,384 tokens fill every block and take several of the smaller ones.
    batch, n, d, grid = 2, 16_384, 4096, (128, 128)
    score = torch.empty((batch, n), dtype=torch.float32, device="meta")
    match = torch.empty((batch, n), dtype=torch.int32, device="meta")
    packed = torch.empty((batch, n), dtype=torch.int64, device="meta")
    small = packed[:, :1024].contiguous()
    destinations = torch.empty((batch, d), dtype=torch.int32, device="meta")
    return [
        ("merge_plan", "packed", "merge_plan", lambda c: merge_plan.launch_merge_plan_packed(packed, 9000, config=c)),
        (
            "merge_plan",
            "packed, N=1024",
            "merge_plan",
            lambda c: merge_plan.launch_merge_plan_packed(small, 700, config=c),
        ),
        (
            "merge_plan",
            "",
            "merge_plan",
            lambda c: merge_plan.launch_merge_plan(score, match, destinations, 9000, config=c),
        ),
        (
            "block_merge_plan",
            "max",
            "merge_plan",
            lambda c: merge_plan.launch_block_merge_plan(score, grid, (2, 2), 3000, "max", config=c),
        ),
    ]


def cases(
    architecture: str,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
    default_only: bool = False,
) -> Iterator[Case]:
    """Every kernel in every config shipped for the architecture, or in the one chosen for large calls."""
    from bigain_kernels.triton_kernels import configs

    for dtype in dtypes:
        for kernel, variant, op, call in _recipes(dtype):
            if dtype == torch.float16 and kernel != "bipartite_match":
                continue  # moves the same bytes as bfloat16
            entry = configs.table(architecture)["ops"][op]
            chosen = [entry["candidates"][entry["choice"]["large"]]] if default_only else entry["candidates"]
            for config in chosen:
                with record_launches() as launches:
                    # match_prepare is launched by the matching launcher, which looks up its config itself.
                    call(None if kernel == "match_prepare" else config)
                (launch,) = (each for each in launches if each.name == kernel)
                if kernel == "match_prepare":
                    launch.arguments.update(config)
                if kernel == "bipartite_match" and architecture.startswith("gfx"):
                    # The launcher asks the PyTorch at hand, which is not the one of that GPU.
                    launch.arguments["PRECISION"] = "ieee"
                name = f"{kernel} ({variant})" if variant else kernel
                text = " ".join(f"{key.replace('BLOCK_', '').replace('num_', '')}={v}" for key, v in config.items())
                yield Case(name, _TYPES[dtype], text, launch)


def compile_case(launch: Launch, architecture: str) -> Any:
    """Compile a recorded launch for an architecture without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    signature, constants, attributes = specialize(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {key: launch.arguments[key] for key in _OPTIONS if key in launch.arguments}
    return triton.compile(source, target=target, options=options)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def _read_nvidia(compiled: Any) -> tuple[int, int, int, Counter[str]]:
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    sass = _cuobjdump(compiled.asm["cubin"], "-sass")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared, Counter(opcodes)


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
    if kernel == "bipartite_match":
        wanted = {"sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}.get(architecture, "v_mfma" if amd else "HMMA")
        if not _any(instructions, wanted):
            broken.append(f"no {wanted}")
    wide_in = r"(global|buffer)_load_dwordx4" if amd else r"LDG\.E\.128|LDG\.E\S*\.128|LDGSTS\S*\.128"
    wide_out = r"(global|buffer)_store_dwordx4" if amd else r"STG\.E\S*\.128|STG\.E\.128"
    if kernel in STREAMS_IN and not _any(instructions, wide_in):
        broken.append("no 16-byte loads")
    if kernel in STREAMS_OUT and not _any(instructions, wide_out):
        broken.append("no 16-byte stores")
    return broken


def examine(case: Case, architecture: str) -> Result:
    """Compile a case and judge the machine code."""
    compiled = compile_case(case.launch, architecture)
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    registers, spills, shared, instructions = read(compiled)
    return Result(
        registers, spills, shared, instructions, broken_rules(case, architecture, spills, shared, instructions)
    )


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


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 when a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m bigain_kernels.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--default-only", action="store_true", help="only the config chosen for large calls")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET: is set, expected unset: the interpreter compiles nothing")
    import triton

    print(f"triton {triton.__version__}, torch {torch.__version__}; x is {_SHAPE} on a {_GRID} grid")
    failures = 0
    seen: dict[str, Result] = {}
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
            failures += bool(result.broken)
            verdict = "; ".join(result.broken) or "ok"
            print(
                f"| {case.op} | {case.dtype} | {case.config} | {result.registers} | {result.spills} |"
                f" {result.shared} | {summary(result.instructions)} | {verdict} |",
                flush=True,
            )
    print(f"\n{failures} broken" if failures else "\nevery rule holds")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
