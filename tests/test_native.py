"""Loading the compiled libraries: what is missing, foreign or there twice, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigain_kernels
from bigain_kernels import native

PACKAGE = Path(bigain_kernels.__file__).parent
SLOW = "RuntimeWarning: bigain_kernels: ops on CPU tensors run in plain PyTorch, which is slower"
IGNORED = shutil.ignore_patterns("__pycache__", "_native*", "assets")
# The copies are imported from their folders, not from where this installation is.
HERE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]; "
USE = (
    "import torch, bigain_kernels as bk; "
    "print(bk.native.REASON or 'none', bk.laplacian_score(torch.ones(1, 4, 2), (2, 2)).shape)"
)


def package(folder: Path, reason: str | None = None) -> Path:
    """A copy of the package without a library, in `folder`."""
    copy = shutil.copytree(PACKAGE, folder / "bigain_kernels", ignore=IGNORED)
    if reason is not None:
        (copy / "_native_missing.txt").write_text(reason)
    return folder


def python(code: str, path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "PYTHONPATH": str(path), **environment}
    command = [sys.executable, *options, "-c", HERE + code]
    return subprocess.run(command, cwd=path, env=merged, capture_output=True, text=True, check=False)


def library() -> Path:
    (found,) = PACKAGE.glob("_native.*so")
    return found


def test_a_missing_library_is_said_once_and_the_ops_work(tmp_path):
    done = python(f"{USE}; import bigain_kernels.native", package(tmp_path, "no C++ compiler found"), "-W", "always")
    assert done.stdout == "no C++ compiler found torch.Size([1, 4])\n"
    assert done.stderr.count(SLOW) == 1
    assert "was not built: no C++ compiler found. To have it, install again where torch and" in done.stderr


@pytest.mark.parametrize(
    ("reason", "options"),
    [("left out with BIGAIN_BUILD_CPU=0", []), ("no ninja", ["-W", "ignore::RuntimeWarning:bigain_kernels.native"])],
)
def test_whoever_left_it_out_or_knows_hears_nothing(reason, options, tmp_path):
    done = python(USE, package(tmp_path, reason), *options)
    assert (done.stdout, done.stderr) == (f"{reason} torch.Size([1, 4])\n", "")


def test_an_import_inside_compiled_code_warns_and_does_not_break_the_graph(tmp_path):
    code = """
import torch
def score(x):
    import bigain_kernels
    return bigain_kernels.laplacian_score(x, (2, 2))
print(torch.compile(score, fullgraph=True, backend="eager")(torch.ones(1, 4, 2)).shape)
"""
    done = python("\n" + code, package(tmp_path))
    assert done.stdout == "torch.Size([1, 4])\n", done.stderr
    assert done.stderr.count(SLOW) == 1


def test_a_file_that_is_no_library_of_ours_is_named(tmp_path):
    foreign = next((Path(torch.__file__).parent / "lib").glob("libtorch_global_deps.*"))
    broken = tmp_path / "broken.so"
    broken.write_text("no machine code")
    for path, expected in (
        (foreign, f"{foreign} is no library of bigain_kernels"),
        (broken, f"{broken} does not load: {broken}: file too short"),
        (tmp_path, f"{tmp_path} does not load: {tmp_path}: cannot read file data: Is a directory"),
    ):
        done = python(USE, PACKAGE.parent, BIGAIN_NATIVE_LIBRARY=str(path))
        assert done.stdout == f"{expected} torch.Size([1, 4])\n", done.stderr
        assert f"{SLOW}: {expected}" in done.stderr


@pytest.mark.skipif(bool(native.REASON), reason=f"no native library: {native.REASON}")
def test_a_second_build_of_the_library_is_refused_not_aborted_on(tmp_path):
    copy = shutil.copy(library(), tmp_path / "_native.so")
    done = python(f"import torch; torch.ops.load_library({str(copy)!r}); {USE}", PACKAGE.parent)
    reason = f"{library()} is not loaded: this process has another build of it already"
    assert done.stdout == f"{reason} torch.Size([1, 4])\n", done.stderr
    assert done.stderr.count(f"{SLOW}: {reason}") == 1
    done = python(f"import torch; torch.ops.load_library({str(library())!r}); {USE}", PACKAGE.parent)
    assert (done.stdout, done.stderr) == ("none torch.Size([1, 4])\n", "")


OTHER_SCHEMAS = """
#include <string>

#include <torch/csrc/stable/library.h>

std::string build_info() { return "an older build"; }
STABLE_TORCH_LIBRARY_FRAGMENT(bigain_cpp, m) {
  m.def("build_info() -> str");
  m.def("laplacian_score(Tensor x, int height, int width) -> Tensor");
  m.def("select_destinations(Tensor score, int height, int width, int sy, int sx) -> Tensor");
  m.def("token_merge(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(bigain_cpp, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
"""


def test_a_library_of_other_schemas_is_refused_when_it_is_loaded(tmp_path):
    """One that an older checkout left behind; each differing op is named, the one that is the same is not."""
    sys.path.insert(0, str(PACKAGE.parent / "csrc"))
    import build_tools

    try:
        compiler = build_tools.find_compiler()
    except build_tools.CannotBuild as error:
        pytest.skip(str(error))
    old = tmp_path / "old.so"
    (tmp_path / "old.cpp").write_text(OTHER_SCHEMAS)
    flags = shlex.split(f"-std=c++17 -fPIC -shared {build_tools.torch_flags()} old.cpp -o old.so")
    libraries = [*shlex.split(build_tools.torch_library()), *build_tools.DEFINED]
    subprocess.run([*compiler, *flags, *libraries], cwd=tmp_path, check=True)
    done = python(
        f"{USE}; import bigain_kernels.env as e; print(e.report())", PACKAGE.parent, BIGAIN_NATIVE_LIBRARY=str(old)
    )
    reason = f"{old} was built for other op schemas (laplacian_score, token_merge); build again: pip install "
    assert done.stdout.startswith(reason), done.stderr
    first, *report = done.stdout.splitlines()
    assert first.endswith(f"python csrc/build_native.py --output {old} torch.Size([1, 4])")
    assert done.stderr.count(f"{SLOW}: {reason}") == 1
    told = first.removesuffix(" torch.Size([1, 4])")
    assert f"native library   none: {told}" in report
    assert f"backend cpp      not here: {told}" in report


def test_a_second_build_of_the_cuda_library_is_refused(tmp_path):
    code = """
import torch
other = torch.library.Library("bigain_cuda", "DEF")
other.define("build_info() -> str")
torch.version.cuda = "13.0"
import bigain_kernels
print(bigain_kernels.native.CUDA_REASON)
"""
    done = python("\n" + code, PACKAGE.parent, BIGAIN_CUDA_LIBRARY="/elsewhere/_native_cuda.so")
    reason = "/elsewhere/_native_cuda.so is not loaded: this process has another build of it already"
    assert done.stdout == f"{reason}\n", done.stderr
    assert f"bigain_kernels: the CUDA library is not used: {reason}" in done.stderr


def test_a_second_copy_of_the_package_is_refused_in_one_line(tmp_path):
    copy = package(tmp_path)
    if not native.REASON:
        shutil.copy(library(), copy / "bigain_kernels")
    code = f"""
import torch, bigain_kernels as first
# In use: what a first call imports is there.
first.laplacian_score(torch.ones(1, 4, 2), (2, 2))
for name in [name for name in sys.modules if name.startswith("bigain_kernels")]:
    del sys.modules[name]
sys.path.insert(0, {str(copy)!r})
try:
    import bigain_kernels
except ImportError as error:
    print(error)
print(first.laplacian_score(torch.ones(1, 4, 2), (2, 2)).shape)
"""
    done = python("\n" + code, PACKAGE.parent)
    expected = f"bigain_kernels: got a second copy at {copy / 'bigain_kernels'}, expected one in a process: "
    expected += "another copy of the package has registered the ops torch.ops.bigain\ntorch.Size([1, 4])\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
