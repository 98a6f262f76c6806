"""The wheels of a release: what is in them, what they need, and that they come and go without a trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.csrc.builds import run
from tests.csrc.test_install import empty_environment, pip, use_package

pytestmark = pytest.mark.slow

KINDS = ("pure", "cpu", "cuda")
LIBRARIES = {"pure": [], "cpu": ["_native"], "cuda": ["_native", "_native_cuda"]}
# Alone in its Python, beside the libtorch of another: there is no Python in the library, so none can be wrong.
LOADS = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]; print('loaded')"


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_contents(kind, release):
    """abi3 for every Python from 3.10 on, and runtimes as old as those that torch itself needs."""
    wheel = release.wheel(kind)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    version, python, abi, platforms = wheel.stem.removeprefix("bigain_kernels-").split("-")
    found = sorted(Path(name).name.removesuffix(".abi3.so") for name in names if name.endswith(".so"))
    assert found == LIBRARIES[kind]
    assert f"Version: {version}\n" in metadata
    assert re.findall(r"Requires-Dist: (.*)", metadata.split("Provides-Extra")[0]) == ["torch>=2.11"]
    if kind == "pure":
        assert (python, abi, platforms) == ("py3", "none", "any")
        return
    assert (python, abi) == ("cp310", "abi3")
    assert re.fullmatch(r"0\.\d+\.\d+\+cu\d+" if kind == "cuda" else r"0\.\d+\.\d+", version)
    # The CUDA runtime inside asks for the glibc of the machine that links it.
    oldest = min(int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", platforms))
    assert oldest <= (28 if kind == "cpu" else int(os.confstr("CS_GNU_LIBC_VERSION").split(".")[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_installs_works_and_leaves_nothing(kind, release, tmp_path):
    python = empty_environment(tmp_path)
    before = files_of(python.parents[1])
    pip(python, "install", "--quiet", "--no-deps", "--no-index", release.wheel(kind), cwd=tmp_path)
    answer = use_package(python, tmp_path)
    assert answer["reason"] == ("left out with BIGAIN_BUILD_CPU=0" if kind == "pure" else "")
    backend = "reference" if kind == "pure" else "cpp"
    assert re.search(rf"bipartite_match +cpu +{backend}", answer["env"])
    if kind == "cuda" and torch.version.cuda is None:
        assert f"CUDA library     none: torch {torch.__version__} is built without CUDA\n" in answer["env"]
    assert run(python.parent / "bigain", "--version", cwd=tmp_path).startswith("bigain_kernels 0.")
    pip(python, "uninstall", "--quiet", "--yes", "bigain-kernels", cwd=tmp_path)
    assert files_of(python.parents[1]) == before


def test_the_source_distribution_builds_the_same_package(release, tmp_path):
    """`pip install` of the archive itself, as an index would hand it out."""
    python = empty_environment(tmp_path)
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", release.sdist]
    # The build runs in the environment that is installed into, which shows the setuptools of ours.
    pip(python, *command, cwd=tmp_path, BIGAIN_BUILD_CPU="0")
    assert use_package(python, tmp_path)["reason"] == "left out with BIGAIN_BUILD_CPU=0"


def other_python(version: str) -> str:
    """A Python of another version that has pip's target folder to install into; skips where there is none."""
    own = Path.home() / ".pyenv" / "versions"
    found = [*sorted(own.glob(f"{version}.*/bin/python{version}")), shutil.which(f"python{version}")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return str(python)
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_the_library_of_one_wheel_loads_in_every_python(version, release, tmp_path):
    """Where torch is missing the import says that; the library itself loads beside libtorch, ops and all."""
    python = Path(other_python(version))
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        pytest.skip("that is the Python of these tests")
    run(python, "-m", "venv", "--without-pip", tmp_path / "an environment", cwd=tmp_path)
    inside = tmp_path / "an environment" / "bin" / "python"
    pip(inside, "install", "--quiet", "--no-deps", "--no-index", release.wheel("cpu"), cwd=tmp_path)
    done = subprocess.run(
        [inside, "-I", "-c", "import bigain_kernels"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")
    where = "import sysconfig, json; print(json.dumps(sysconfig.get_path('platlib')))"
    library = Path(json.loads(run(inside, "-I", "-c", where, cwd=tmp_path))) / "bigain_kernels" / "_native.abi3.so"
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert run(inside, "-I", "-c", LOADS, libtorch, library, cwd=tmp_path) == "loaded\n"
