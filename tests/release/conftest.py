"""Releases, built once a session: by a compiler that does not optimize and an nvcc that takes what tests built."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.builds import FAST_COMPILER, IGNORED, ROOT, run, script
from tests.csrc.cuda.conftest import build_cuda, cuda_library, locked

__all__ = ["cuda_library"]


@dataclass(frozen=True)
class Release:
    """What `python -m release.wheels` wrote: a wheel of each kind, and the source distribution."""

    wheels: dict[str, Path]
    sdist: Path

    def wheel(self, kind: str) -> Path:
        if kind not in self.wheels:
            pytest.skip("there is no nvcc here")
        return self.wheels[kind]


def has_nvcc() -> bool:
    try:
        return bool(build_cuda.find_nvcc())
    except build_cuda.CannotBuild:
        return False


def taking(objects: Path, path: Path) -> Path:
    """An nvcc that links, and for an object takes the one of that name from a folder: they are tested already."""
    take = f'for last; do :; done; cp "{objects}/$last" "$last" && echo "$last: nothing" > "$last.d"'
    return script(path, f'case "$*" in *" -c "*) {take} ;; *) exec {build_cuda.find_nvcc()[0]} "$@" ;; esac')


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that is filled by the first process of a session that asks for it."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with locked(folder):
        if not (folder / "done").exists():
            build(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def switches(request, tmp_path_factory) -> dict[str, str]:
    """Variables for a build that takes seconds."""
    folder = tmp_path_factory.mktemp("compilers")
    found = {"CXX": str(script(folder / "c++", FAST_COMPILER)), "BIGAIN_CUDA_ARCHS": "80;90"}
    if has_nvcc():
        objects = request.getfixturevalue("cuda_library").parent
        found["CUDACXX"] = str(taking(objects, folder / "nvcc"))
    return found


@pytest.fixture(scope="session")
def release(switches, tmp_path_factory) -> Release:
    """Of a checkout without weights and without leftovers of other builds."""
    pytest.importorskip("abi3audit")
    pytest.importorskip("auditwheel")
    kinds = ["pure", "cpu", *(["cuda"] if has_nvcc() else [])]

    def build(folder: Path) -> None:
        checkout = shutil.copytree(ROOT, folder / "check out", ignore=IGNORED)
        run(sys.executable, "-m", "release.wheels", "--out", folder / "dist", *kinds, cwd=checkout, **switches)

    dist = once(tmp_path_factory, "a release", build) / "dist"
    (sdist,) = dist.glob("*.tar.gz")
    wheels = {}
    for path in dist.glob("*.whl"):
        kind = "pure" if "none-any" in path.name else "cuda" if "+cu" in path.name else "cpu"
        assert kind not in wheels
        wheels[kind] = path
    assert sorted(wheels) == sorted(kinds)
    return Release(wheels, sdist)
