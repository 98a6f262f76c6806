"""Source distribution, wheels and plain installations: into empty environments, with and without a compiler."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from tests.csrc.builds import FAST_COMPILER, IGNORED, ROOT, run, script

pytestmark = pytest.mark.slow

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
WHEEL = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of this checkout, in a folder whose name needs quoting; what follows uses it."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = shutil.copytree(ROOT, folder / "checkout", ignore=IGNORED)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=copy)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # From Python 3.11.4 on; before, an archive of our own is taken as it is.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder / "it's an äöü $HOME")
    (unpacked,) = (folder / "it's an äöü $HOME").iterdir()
    return unpacked


def build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    source = shutil.copytree(sdist, folder / "source")
    run(*WHEEL, "-w", folder, ".", cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = f"{wheel.name.split('-')[0]}-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"bigain_kernels", "bigain_command.py", package}
    assert {"bigain_kernels/py.typed", f"{package}/licenses/LICENSE"} <= set(names)
    return wheel


def empty_environment(folder: Path) -> Path:
    """The Python of an environment that holds torch, by reference to ours, and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "a venv", cwd=folder)
    (site,) = (folder / "a venv" / "lib").glob("python*/site-packages")
    (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "a venv" / "bin" / "python"


def pip(python: Path, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=cwd, **environment)


def use_package(python: Path, folder: Path) -> dict[str, object]:
    """What the package says of itself when it is used."""
    answer = json.loads(run(python, "-I", "-c", USES_THE_PACKAGE, cwd=folder))
    assert Path(answer["file"]).is_relative_to(python.parents[1])
    assert answer["shape"] == [2, 64, 20]
    assert not answer["triton_kernels"]
    return answer


def index_is_reachable(folder: Path) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder / "index", "ninja"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.usefixtures("cpp")
def test_a_plain_install_beside_torch_brings_the_library(sdist, tmp_path):
    """`pip install .`, with the isolation that hides torch from the build."""
    if not index_is_reachable(tmp_path):
        pytest.skip("pip fetches setuptools for an isolated build, and reaches no index")
    python = empty_environment(tmp_path)
    compiler = script(tmp_path / "my c++", FAST_COMPILER)
    pip(python, "install", "--quiet", ".", cwd=sdist, CXX=str(compiler))
    answer = use_package(python, tmp_path)
    assert answer["reason"] == ""
    assert re.search(r"native library +(baseline|avx2|avx512|avx512_bf16|amx)\b.*, built by ", answer["env"])
    assert re.search(r"bipartite_match +cpu +cpp", answer["env"])


def test_without_a_compiler_the_pure_package_installs_and_says_so(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path, PATH=str(tmp_path), CXX="", BIGAIN_BUILD_CPU="")
    assert wheel.name.endswith("-py3-none-any.whl")
    python = empty_environment(tmp_path)
    pip(python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    answer = use_package(python, tmp_path)
    assert answer["reason"] == "no C++ compiler found: looked for $CXX, c++, g++ and clang++"
    assert f"none: {answer['reason']}" in answer["env"]
    assert re.search(r"bipartite_match +cpu +reference", answer["env"])


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ("exit 1", "error: the C++ compiler {} does not work: exit status 1\n"),
        (
            f'case "$*" in *isa.cpp*) echo no more memory; exit 1 ;; esac; {FAST_COMPILER}',
            "error: _native.abi3.so was not built, the compiler said why above; BIGAIN_BUILD_CPU=0 leaves it out\n",
        ),
    ],
    ids=["at once", "later"],
)
def test_a_compiler_that_fails_ends_in_one_line(compiler, expected, sdist, tmp_path):
    path = script(tmp_path / "fails", compiler)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", tmp_path / "build"]
    environment = {**os.environ, "CXX": str(path), "BIGAIN_BUILD_CPU": "1", "MAX_JOBS": "1"}
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(expected.format(path))


def test_a_read_only_source_builds(sdist, tmp_path):
    source = shutil.copytree(sdist, tmp_path / "source")
    command = [*WHEEL, "-w", str(tmp_path), "."]
    if os.geteuid() == 0:  # whom permissions do not stop
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(source), *command]
        if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False).returncode:
            pytest.skip("root needs unshare for a folder that it cannot write to")
    else:
        run("chmod", "-R", "a-w", source, cwd=tmp_path)
    run(*command, cwd=source, BIGAIN_BUILD_CPU="0")
    assert len([*tmp_path.glob("*.whl")]) == 1


def test_builds_of_one_source_wait_for_each_other(sdist, tmp_path):
    source = shutil.copytree(sdist, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    (source / "build").mkdir()
    with open(source / "build" / "lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "BIGAIN_BUILD_CPU": "0"}
        command = [sys.executable, "setup.py", "--quiet", "build"]
        build = subprocess.Popen(command, cwd=source, env=environment, stderr=subprocess.PIPE, text=True)
        time.sleep(2)
        assert build.poll() is None
        assert not (source / "build" / "lib").exists()
    # What is left out is said where whoever watches the build sees it.
    assert (
        "bigain_kernels is built without _native: left out with BIGAIN_BUILD_CPU=0" in build.communicate(timeout=60)[1]
    )
    assert build.returncode == 0
    assert (source / "build" / "lib" / "bigain_kernels" / "_native_missing.txt").exists()


def test_a_build_holds_nothing_of_an_earlier_one(sdist, tmp_path):
    package = tmp_path / "bigain_kernels"
    package.mkdir()
    (package / "gone.py").write_text("")
    (package / "_native.abi3.so").write_text("")
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", tmp_path]
    run(*command, cwd=sdist, BIGAIN_BUILD_CPU="0")
    assert (package / "native.py").exists()
    assert not (package / "gone.py").exists()
    assert {path.name for path in package.glob("_native*")} == {"_native_missing.txt", "_native_cuda_missing.txt"}


def test_the_sdist_holds_what_its_tests_need(sdist):
    """Some of the tests that read files beside the package, run from the sdist itself."""
    for folder in ("tests", "csrc", "triton_kernels", "benchmarks", "docs", "release"):
        files = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        kept = [path for path in files if path.suffix not in (".pyc", ".so")]
        assert len(kept) > 0
        assert [path for path in kept if not (sdist / path).exists()] == []
    tests = ["tests/test_goldens.py", "tests/benchmarks/test_published.py"]
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=sdist)
