"""Wheel and sdist, with and without a compiler, installed into empty environments; what the library is linked to."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from bigain_kernels import native

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "_native*", "assets")
USES_THE_PACKAGE = """
import importlib.util, json, torch, bigain_kernels as bk
from bigain_kernels import env, native
x = torch.randn(2, 64, 20)
plan = bk.lgtm_plan(x, (8, 8), 0.5)
print(json.dumps({
    "file": bk.__file__,
    "shape": list(bk.token_unmerge(bk.token_merge(x, plan), plan).shape),
    "triton_kernels": importlib.util.find_spec("triton_kernels") is not None,
    "reason": native.REASON,
    "env": env.report(),
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    merged = {**os.environ, "MAX_JOBS": "2", **environment}
    merged.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=merged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution of this checkout: what follows is built from it, so it must be complete."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = shutil.copytree(ROOT, folder / "checkout", ignore=IGNORED)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=copy)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    source = shutil.copytree(sdist, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    run(*command, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.split("/")[0] for name in archive.namelist()}
    assert top_level == {"bigain_kernels", f"{wheel.name.split('-')[0]}-{wheel.name.split('-')[1]}.dist-info"}
    return wheel


def use_wheel(wheel: Path, folder: Path) -> dict[str, object]:
    """What the package says of itself in an environment that holds the wheel, and torch by reference to ours."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    answer = json.loads(run(python, "-I", "-c", USES_THE_PACKAGE, cwd=folder))
    assert Path(answer["file"]).is_relative_to(site)
    assert answer["shape"] == [2, 64, 20]
    assert not answer["triton_kernels"]
    return answer


@pytest.mark.usefixtures("cpp")
def test_a_wheel_built_from_the_sdist_brings_the_library(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path)
    assert "-cp310-abi3-" in wheel.name
    answer = use_wheel(wheel, tmp_path)
    assert answer["reason"] == ""
    assert re.search(r"native library +(baseline|avx2|avx512|amx).*, built by ", answer["env"])
    assert re.search(r"bipartite_match +cpu +cpp", answer["env"])


def test_without_a_compiler_the_pure_package_installs_and_says_so(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path, PATH=str(tmp_path), CXX="", BIGAIN_BUILD_CPU="")
    assert wheel.name.endswith("-py3-none-any.whl")
    answer = use_wheel(wheel, tmp_path)
    assert answer["reason"] == "no C++ compiler found: looked for $CXX, c++, g++ and clang++"
    assert f"none: {answer['reason']}" in answer["env"]
    assert re.search(r"bipartite_match +cpu +reference", answer["env"])


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ("0", "left out with BIGAIN_BUILD_CPU=0"),
        ("1", "CannotBuild: no C\\+\\+ compiler"),
        ("2", "got '2', expected 0 or"),
    ],
)
def test_switch(switch, expected, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'csrc')!r}); import build_native; print(build_native.why_not())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": str(tmp_path), "CXX": "", "BIGAIN_BUILD_CPU": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(expected, done.stdout + done.stderr)
    assert done.returncode == (0 if switch == "0" else 1)


def library() -> Path:
    (found,) = Path(native.__file__).parent.glob("_native.*so")
    return found


@pytest.mark.usefixtures("cpp")
@pytest.mark.skipif(shutil.which("nm") is None or platform.system() != "Linux", reason="needs nm of binutils")
def test_the_library_needs_only_the_stable_interface_of_torch():
    symbols = run("nm", "-D", "--undefined-only", library(), cwd=ROOT).splitlines()
    names = [line.split()[-1] for line in symbols]
    system = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(_ITM_|__gmon_start__|__cxa_finalize)")
    foreign = [name for name in names if not system.search(name) and not re.match(r"(aoti_torch|torch)_", name)]
    assert foreign == []
    assert "torch_parallel_for" in names


@pytest.mark.usefixtures("cpp")
@pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="reads x86 assembly")
def test_the_loops_are_vectorised():
    assembly = run("objdump", "-d", "--no-show-raw-insn", "--no-addresses", library(), cwd=ROOT)
    for instruction in ("vfmadd231ps .*%zmm", "vfmadd231ps .*%ymm", "vfmadd231pd .*%zmm", "mulps .*%xmm"):
        assert len(re.findall(instruction, assembly)) >= 8, instruction
