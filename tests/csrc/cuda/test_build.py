"""The build of the CUDA library without a GPU: switches, what it is linked to, how it loads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.csrc.builds import run, script
from tests.csrc.cuda.conftest import ROOT, build_cuda

CODE = f"import sys; sys.path.insert(0, {str(ROOT / 'csrc')!r}); import build_cuda; print(build_cuda.why_not())"


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "CUDA_HOME": "", "CUDACXX": "", **environment}
    return subprocess.run([sys.executable, "-c", CODE], env=merged, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("switch", ["", "0"])
def test_left_out_unless_asked_for(switch):
    done = ask(BIGAIN_BUILD_CUDA=switch)
    assert done.stdout == "built only with BIGAIN_BUILD_CUDA=1 or BIGAIN_BUILD_CUDA=auto\n"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BIGAIN_BUILD_CUDA": "yes"}, "BIGAIN_BUILD_CUDA: got 'yes', expected 0, 1 or auto"),
        ({"BIGAIN_BUILD_CUDA": "auto", "BIGAIN_CUDA_ARCHS": "sm_90"}, "BIGAIN_CUDA_ARCHS: got 'sm_90'"),
        ({"BIGAIN_BUILD_CUDA": "auto", "BIGAIN_CUDA_ARCHS": "75"}, "BIGAIN_CUDA_ARCHS: got '75'"),
    ],
)
def test_bad_switches_raise(environment, message):
    done = ask(**environment)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.skipif(os.path.exists("/usr/local/cuda/bin/nvcc"), reason="there is an nvcc where the build looks last")
@pytest.mark.parametrize(("switch", "code"), [("auto", 0), ("1", 1)])
def test_without_nvcc(switch, code, tmp_path):
    done = ask(BIGAIN_BUILD_CUDA=switch, PATH=str(tmp_path))
    assert "no nvcc found: looked for $CUDACXX, $CUDA_HOME, nvcc and /usr/local/cuda" in done.stdout + done.stderr
    assert done.returncode == code


def test_a_missing_nvcc_is_a_reason_or_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    monkeypatch.setenv("BIGAIN_BUILD_CUDA", "auto")
    assert build_cuda.why_not() == "no nvcc found: looked for $CUDACXX, $CUDA_HOME, nvcc and /usr/local/cuda"
    monkeypatch.setenv("BIGAIN_BUILD_CUDA", "1")
    with pytest.raises(build_cuda.CannotBuild, match="no nvcc found"):
        build_cuda.why_not()


def test_a_named_nvcc_works_or_is_refused_in_one_line(monkeypatch, tmp_path):
    """Nothing else is tried in its place."""
    monkeypatch.setenv("BIGAIN_BUILD_CUDA", "auto")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    assert build_cuda.why_not() == "$CUDACXX: got 'no-such-nvcc', expected a program that exists"
    nvcc = script(tmp_path / "nvcc", "echo 'error: no license'; exit 1")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert build_cuda.why_not() == f"the CUDA compiler {nvcc} does not work: error: no license"


@pytest.mark.parametrize(
    ("archs", "ptx"),
    [
        (build_cuda.DEFAULT_ARCHS, "100"),
        ("90;100", "100"),
        ("80;90", "90"),
        ("90", "90"),
        ("120", "120"),
        ("90a;120", "120"),
        ("90a", None),
    ],
)
def test_the_ptx_runs_on_all_that_comes_later(archs, ptx):
    """That of 100 on 11.0, for which nothing is compiled, as on 12.x: PTX runs on what is not older than it."""
    found = build_cuda.targets(build_cuda.architectures(archs))
    expected = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs.split(";")]
    assert found == " ".join([*expected, *([f"-gencode arch=compute_{ptx},code=compute_{ptx}"] if ptx else [])])


@pytest.mark.parametrize("device", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
def test_the_default_build_runs_on_every_gpu_from_sm_80_on(device):
    """Code runs within its major version, from its minor one on, PTX on whatever is not older than it."""
    found = build_cuda.targets(build_cuda.architectures(build_cuda.DEFAULT_ARCHS))
    code = [int(arch) for arch in re.findall(r"code=sm_(\d+)\b", found)]
    ptx = [int(arch) for arch in re.findall(r"code=compute_(\d+)\b", found)]
    assert any(arch // 10 == device // 10 and arch <= device for arch in code) or min(ptx) <= device


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        (["/bin/g++"], ["-ccbin", "/bin/g++"]),
        (["/bin/ccache", "g++"], ["-ccbin", "g++"]),
        (["/bin/ccache", "g++", "-m64", "-pipe"], ["-ccbin", "g++", "-Xcompiler=-m64", "-Xcompiler=-pipe"]),
    ],
)
def test_nvcc_is_given_the_compiler_without_its_launcher(compiler, expected, monkeypatch):
    monkeypatch.setattr(build_cuda, "find_compiler", lambda: compiler)
    assert build_cuda.host_compiler() == expected


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_library_needs_only_the_stable_interface_of_torch(cuda_library):
    """And the C and C++ runtimes: the CUDA runtime is inside, hidden."""
    undefined = run("nm", "-D", "--undefined-only", cuda_library, cwd=ROOT).splitlines()
    names = [line.split()[-1] for line in undefined]
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_|__gmon_start__|__cxa_finalize)")
    assert [name for name in names if not system.search(name) and not re.match(r"(aoti_torch|torch)_", name)] == []
    assert "aoti_torch_get_current_cuda_stream" in names
    defined = run("nm", "-D", "--defined-only", cuda_library, cwd=ROOT)
    assert not re.search(r"\bcuda[A-Z]", defined)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf of binutils")
def test_the_library_names_no_folder_and_no_cuda_runtime(cuda_library):
    dynamic = run("readelf", "-d", cuda_library, cwd=ROOT)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert {name for name in needed if "cuda" in name} == {"libtorch_cuda.so"}
    assert not re.search(r"RPATH|RUNPATH", dynamic)


def report(**environment: str) -> str:
    return run(sys.executable, "-m", "bigain_kernels.env", cwd=ROOT, **environment)


def test_env_says_why_there_is_no_cuda_library(cuda_library):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA and loads the library")
    text = report(BIGAIN_CUDA_LIBRARY=str(cuda_library))
    assert f"CUDA library     none: torch {torch.__version__} is built without CUDA\n" in text


def test_env_names_the_cuda_library(cuda_library):
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA; the library needs one that has")
    assert "CUDA library     sm_80,90, CUDA " in report(BIGAIN_CUDA_LIBRARY=str(cuda_library))
