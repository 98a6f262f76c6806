"""What nvcc made of the CUDA kernels, read without a GPU: registers and spills of ptxas, and the instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ARCHS = ("sm_80", "sm_90a")
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
    "token_merge_kernel": r"I(NS_4HalfES1_|NS_8BFloat16ES1_|ff)Lb1E",
    "token_unmerge_kernel": rf"I{TYPES}Lb1E",
    "kv_downsample_kernel": rf"I{TYPES}Lb1E",
}


def cuobjdump() -> str:
    """The disassembler of the CUDA toolkit, or the one in the Triton wheel."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    for candidate in ("cuobjdump", "/usr/local/cuda/bin/cuobjdump", str(wheel)):
        if shutil.which(candidate):
            return candidate
    pytest.skip("no cuobjdump found: looked on PATH, in /usr/local/cuda and in the Triton wheel")


@pytest.fixture(scope="module", params=ARCHS)
def code(request, cuda_library) -> dict[str, set[str]]:
    """The opcodes of every kernel of one architecture, by mangled name."""
    command = [cuobjdump(), "-sass", "-arch", request.param, str(cuda_library)]
    kernels: dict[str, set[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "Function : " in line:
                opcodes = kernels.setdefault(line.split("Function : ")[1].strip(), set())
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", line):
                opcodes.add(match[1])
    assert process.returncode == 0
    assert len(kernels) > 80
    return kernels


def select(code: dict[str, set[str]], kernel: str, arguments: str) -> dict[str, set[str]]:
    found = {name: opcodes for name, opcodes in code.items() if re.search(rf"\d{kernel}{arguments}", name)}
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


def test_no_kernel_touches_local_memory(code):
    assert [name for name, opcodes in code.items() if any(re.match(r"(LDL|STL)\b", op) for op in opcodes)] == []


@pytest.mark.parametrize("kernel", READS_VECTORS)
def test_streaming_kernels_read_16_bytes_at_a_time(code, kernel):
    for name, opcodes in select(code, kernel, READS_VECTORS[kernel]).items():
        assert any(re.match(r"LDG\.E\.128", op) for op in opcodes), name
        assert not any(re.match(r"LDG\.E\.(U16|S16|U8)", op) for op in opcodes), name


@pytest.mark.parametrize("kernel", WRITES_VECTORS)
def test_streaming_kernels_write_16_bytes_at_a_time(code, kernel):
    for name, opcodes in select(code, kernel, WRITES_VECTORS[kernel]).items():
        assert any(re.match(r"STG\.E\.128", op) for op in opcodes), name


def test_matching_runs_on_tensor_cores(code):
    kernels = select(code, "bipartite_match_kernel", "I")
    for name, opcodes in kernels.items():
        expected = r"HMMA\.1688\.F32\.TF32" if "kernelIf" in name else r"HMMA\.16816\.F32"
        assert any(re.match(expected, op) for op in opcodes), name
    aligned = select(code, "bipartite_match_kernel", r"I.*(SmallTileE|LargeTileI(f|S1_)EE)Lb1E")
    for name, opcodes in aligned.items():
        assert any(re.match(r"LDGSTS\.E\..*128", op) for op in opcodes), name


def test_tables_use_atomics_on_integers_only(code):
    """Sums of floats in memory would depend on the order of threads."""
    for name, opcodes in code.items():
        assert not any(re.match(r"(RED|ATOM|ATOMS|ATOMG)\..*F(16|32|64)", op) for op in opcodes), name
