"""What nvcc made of the CUDA kernels, read without a GPU: registers and spills of ptxas, and the instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ARCHS = ("sm_80", "sm_90")
# Kernels and the start of their template arguments, mangled; Lb1E is kAligned, what runs on aligned tensors.
TYPES = r"(f|NS_4HalfE|NS_8BFloat16E)"
READS_VECTORS = {
    "laplacian_score_kernel": rf"I{TYPES}Lb1E",
    "row_norms_kernel": rf"I{TYPES}Lb1E",
    "row_moments_kernel": rf"I{TYPES}Lb1E",
    "token_merge_kernel": rf"I{TYPES}(f|S1_)Lb1E",
    "merge_rescale_kernel": rf"I{TYPES}Lb1E",
    "token_unmerge_kernel": rf"I{TYPES}Lb1E",
    "kv_downsample_kernel": rf"I{TYPES}Lb1E",
}
WRITES_VECTORS = {
    "laplacian_score_kernel": rf"I{TYPES}Lb1ELNS_9ScoreModeE3E",  # the mean of rows that share a plan
    "token_merge_kernel": rf"I{TYPES}(f|S1_)Lb1E",
    "token_unmerge_kernel": rf"I{TYPES}Lb1E",
    "kv_downsample_kernel": rf"I{TYPES}Lb1E",
}
# 16-byte loads that are on their way before the first is used, and rounds of loads that wait for loads.
IN_FLIGHT = {
    ("laplacian_score_kernel", rf"I{TYPES}Lb1ELNS_9ScoreModeE2E"): (14, 2),  # the last four take used registers
    ("laplacian_score_kernel", rf"I{TYPES}Lb1ELNS_9ScoreModeE[01]E"): (14, 5),  # and frames, column by column
    ("laplacian_score_kernel", r"INS_(4Half|8BFloat16)ELb1ELNS_9ScoreModeE3E"): (14, None),  # share decides
    ("row_norms_kernel", r"INS_(4Half|8BFloat16)ELb1E"): (4, 1),
    ("row_moments_kernel", rf"I{TYPES}Lb1E"): (4, 2),  # two passes
    ("token_merge_kernel", rf"I{TYPES}(f|S1_)Lb1ELb0ENS_6NoNorm"): (16, 3),  # slots, members, tokens
    ("token_merge_kernel", rf"I{TYPES}(f|S1_)Lb1ELb1ENS_6NoNorm"): (8, 3),
    ("token_merge_kernel", rf"I{TYPES}(f|S1_)Lb1ELb[01]ENS_9MergeNorm"): (8, 4),  # and the affine parts
    ("merge_rescale_kernel", rf"I{TYPES}Lb1E"): (4, None),
    ("token_unmerge_kernel", rf"I{TYPES}Lb1E"): (2, 2),  # the residual beside the index, then y
    ("kv_downsample_kernel", rf"I{TYPES}Lb1ELi2E"): (5, 2),  # the window waits for alpha
    ("kv_downsample_kernel", rf"I{TYPES}Lb1ELi0E"): (4, None),
}
GLOBAL = re.compile(r"(LDG|STG|LD|ST|RED|REDG|ATOM|ATOMG|LDGSTS)\b")


class Instruction(NamedTuple):
    opcode: str
    operands: str
    predicate: str

    @property
    def written(self) -> set[int]:
        """Registers of a load, or the one of another instruction."""
        first = re.match(r"R(\d+)", self.operands)
        if first is None or self.opcode.startswith(("ST", "RED")):
            return set()
        wide = re.search(r"\.(64|128)$", self.opcode) if self.opcode.startswith("LD") else None
        return set(range(int(first[1]), int(first[1]) + (int(wide[1]) // 32 if wide else 1)))

    @property
    def read(self) -> set[int]:
        operands = self.operands
        if re.match(r"R\d", operands) and not self.opcode.startswith(("ST", "RED")):
            operands = operands.partition(",")[2]
        found: set[int] = set()
        for number, wide in re.findall(r"\bR(\d+)(\.64)?", operands):
            found |= {int(number), int(number) + 1} if wide else {int(number)}
        return found


Code = dict[str, list[Instruction]]


def cuobjdump() -> str:
    """The disassembler of the CUDA toolkit, or the one in the Triton wheel."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    for candidate in ("cuobjdump", "/usr/local/cuda/bin/cuobjdump", str(wheel)):
        if shutil.which(candidate):
            return candidate
    pytest.skip("no cuobjdump found: looked on PATH, in /usr/local/cuda and in the Triton wheel")


def read_code(library: Path, arch: str) -> Code:
    """The instructions of every kernel of one architecture, by mangled name."""
    command = [cuobjdump(), "-sass", "-arch", arch, str(library)]
    line_of_code = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+) )?([A-Z0-9_.]+)\s*([^;]*);")
    kernels: Code = {}
    instructions: list[Instruction] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := line_of_code.match(line):
                instructions.append(Instruction(match[2], match[3].strip(), match[1] or ""))
            elif "Function : " in line:
                # Several objects may have the same kernel.
                instructions = kernels[line.split("Function : ")[1].strip()] = []
    assert process.returncode == 0
    assert len(kernels) > 80
    return kernels


@pytest.fixture(scope="session", params=ARCHS)
def code(request, cuda_library) -> Code:
    return read_code(cuda_library, request.param)


@pytest.fixture(scope="session")
def opcodes(code) -> dict[str, set[str]]:
    return {name: {each.opcode for each in instructions} for name, instructions in code.items()}


def select(code: dict, kernel: str, arguments: str) -> dict:
    found = {name: rest for name, rest in code.items() if re.search(rf"\d{kernel}{arguments}", name)}
    assert found, f"no {kernel} with {arguments}"
    return found


def test_no_kernel_spills_or_has_a_stack(cuda_library):
    logs = {path.name: path.read_text() for path in cuda_library.parent.glob("*.o.log")}
    properties = re.findall(
        r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        "".join(logs.values()),
    )
    assert len(properties) > 160
    assert [row for row in properties if row[1:] != ("0", "0", "0")] == []
    assert [name for name, log in logs.items() if re.search(r"\b(warning|Warning)\b", log)] == []


def test_no_kernel_touches_local_memory(opcodes):
    assert [name for name, found in opcodes.items() if any(re.match(r"(LDL|STL)\b", op) for op in found)] == []


@pytest.mark.parametrize("kernel", READS_VECTORS)
def test_streaming_kernels_read_16_bytes_at_a_time(opcodes, kernel):
    for name, found in select(opcodes, kernel, READS_VECTORS[kernel]).items():
        assert any(re.match(r"LDG\.E\.128", op) for op in found), name
        assert not any(re.match(r"LDG\.E\.(U16|S16|U8)", op) for op in found), name


@pytest.mark.parametrize("kernel", WRITES_VECTORS)
def test_streaming_kernels_write_16_bytes_at_a_time(opcodes, kernel):
    for name, found in select(opcodes, kernel, WRITES_VECTORS[kernel]).items():
        assert any(re.match(r"STG\.E\.128", op) for op in found), name


def loads_before_use(instructions: list[Instruction]) -> tuple[int, int]:
    """The most 16-byte loads between whose first and the first use of one stands no use, and rounds of loads that wait
    for loads: a warp issues in order, so that what follows the use of a load waits with it."""
    under_way: dict[int, int] = {}  # register -> the round of its load
    ahead = most = waited = depth = 0
    for each in instructions:
        used = each.read & under_way.keys()
        if used:
            waited = max(waited, *(under_way[register] for register in used))
            ahead = 0
            under_way = {register: at for register, at in under_way.items() if at > waited}
        for register in each.written:
            under_way.pop(register, None)
        if each.opcode.startswith("LDG"):
            depth = max(depth, waited + 1)
            under_way |= dict.fromkeys(each.written, waited + 1)
            ahead += each.opcode.endswith("128")
            most = max(most, ahead)
    return most, depth


@pytest.mark.parametrize(("kernel", "arguments"), IN_FLIGHT)
def test_streaming_kernels_issue_their_loads_before_the_first_use(code, kernel, arguments):
    least, deepest = IN_FLIGHT[kernel, arguments]
    for name, instructions in select(code, kernel, arguments).items():
        ahead, depth = loads_before_use(instructions)
        assert ahead >= least, name
        assert deepest is None or depth <= deepest, name


def test_no_kernel_divides_integers(opcodes):
    """Divisors that a launch fixes are multiplied with (divisor.cuh): a full division takes a float's reciprocal."""
    assert [name for name, found in opcodes.items() if any(re.match(r"I2F.*\.RP$", op) for op in found)] == []


def test_kernels_wait_for_the_launches_ahead_before_they_touch_memory(request, code):
    """From sm_90 on; ACQBULK is griddepcontrol.wait, PREEXIT is griddepcontrol.launch_dependents."""
    for name, instructions in code.items():
        if "probe_kernel" in name:
            continue
        opcodes = [each.opcode for each in instructions]
        if "sm_80" in request.node.callspec.id:
            assert not {"ACQBULK", "PREEXIT"} & set(opcodes), name
            continue
        assert opcodes.count("ACQBULK") == opcodes.count("PREEXIT") == 1, name
        wait = opcodes.index("ACQBULK")
        assert opcodes.index("PREEXIT") < wait, name
        # No way leads past the wait.
        assert instructions[wait].predicate == "", name
        assert not any(op.startswith(("BRA", "EXIT", "CALL", "BRX")) for op in opcodes[:wait]), name
        assert not any(GLOBAL.match(op) for op in opcodes[:wait]), name


def test_no_kernel_reads_past_the_wait(opcodes):
    """Lines of the read-only path may be older than the wait for the launches ahead."""
    assert [name for name, found in opcodes.items() if any("CONSTANT" in op for op in found)] == []


def test_matching_runs_on_tensor_cores(opcodes):
    kernels = select(opcodes, "bipartite_match_kernel", "I")
    for name, found in kernels.items():
        expected = r"HMMA\.1688\.F32\.TF32" if "kernelIf" in name else r"HMMA\.16816\.F32"
        assert any(re.match(expected, op) for op in found), name
    aligned = select(opcodes, "bipartite_match_kernel", r"I.*(SmallTileE|LargeTileI(f|S1_)EE)Lb1E")
    for name, found in aligned.items():
        assert any(re.match(r"LDGSTS\.E\..*128", op) for op in found), name


def test_tables_use_atomics_on_integers_only(opcodes):
    """Sums of floats in memory would depend on the order of threads."""
    for name, found in opcodes.items():
        assert not any(re.match(r"(RED|ATOM|ATOMS|ATOMG)\..*F(16|32|64)", op) for op in found), name
