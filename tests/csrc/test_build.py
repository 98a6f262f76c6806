"""What the build of the native library asks of its tools, and what the library is linked to."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path

import pytest

from bigain_kernels import native
from tests.csrc.builds import ROOT, run, script

sys.path.insert(0, str(ROOT / "csrc"))
import build_native
import build_tools


@pytest.fixture(autouse=True)
def asked_anew():
    """The build asks its tools once in a process."""
    cached = (build_tools.find_compiler, build_tools.find_ninja, build_tools.find_torch)
    for find in cached:
        find.cache_clear()
    yield
    for find in cached:
        find.cache_clear()


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ("0", "left out with BIGAIN_BUILD_CPU=0"),
        ("", "no C++ compiler found: looked for $CXX, c++, g++ and clang++"),
    ],
)
def test_without_a_compiler_the_reason_is_kept(switch, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("BIGAIN_BUILD_CPU", switch)
    assert build_native.why_not() == expected


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("BIGAIN_BUILD_CPU", "2", "BIGAIN_BUILD_CPU: got '2', expected 0 or 1"),
        ("MAX_JOBS", "many", "MAX_JOBS: got 'many', expected a positive number"),
        ("MAX_JOBS", "0", "MAX_JOBS: got '0', expected a positive number"),
        ("MAX_JOBS", "-1", "MAX_JOBS: got '-1', expected a positive number"),
        ("MAX_JOBS", "2.5", "MAX_JOBS: got '2.5', expected a positive number"),
    ],
)
def test_values_that_mean_nothing_are_refused(variable, value, expected, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_native.why_not()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("no-such-compiler", "$CXX: got 'no-such-compiler', expected a program that exists"),
        ("no-such-compiler -O2", "$CXX: got 'no-such-compiler -O2', expected a program that exists"),
        ("{folder}", "$CXX: got '{folder}', expected a program that exists"),
        ("{folder}/text", "$CXX: got '{folder}/text', expected a program that exists"),
        ("c++ '", '$CXX: got "c++ \'", expected a program and arguments (No closing quotation)'),
        ("{folder}/fails", "the C++ compiler {folder}/fails does not work: exit status 3"),
        ("{folder}/says", "the C++ compiler {folder}/says does not work: fatal error: no license"),
        ("{folder}/nothing", "the C++ compiler {folder}/nothing does not work: it makes no file"),
        ("{folder}/other", "the C++ compiler {folder}/other does not work: does not start: Exec format error"),
        ("c++ --no-such-flag", "c++ --no-such-flag does not work: ...--no-such-flag"),
        ("cc", "the C++ compiler ...cc does not work: ...undefined"),
        ("c++ -m32", "c++ -m32 does not work: "),
    ],
)
def test_a_compiler_that_is_named_works_or_is_refused_in_one_line(command, expected, monkeypatch, tmp_path):
    """Nothing else is tried in its place."""
    script(tmp_path / "fails", "exit 3")
    script(tmp_path / "says", "echo probe.cpp; echo 'fatal error: no license'; echo stopped; exit 1")
    script(tmp_path / "nothing", "exit 0")
    (tmp_path / "text").write_text("of no program")
    (tmp_path / "other").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "other").chmod(0o755)
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    reason = build_native.why_not()
    assert "\n" not in reason
    assert all(part in reason for part in expected.format(folder=tmp_path).split("..."))
    monkeypatch.setenv("BIGAIN_BUILD_CPU", "1")
    with pytest.raises(build_tools.CannotBuild, match=re.escape(reason)):
        build_native.why_not()


@pytest.mark.parametrize("name", ["c++", "my compiler", "launcher {} -pipe", "  "])
def test_compilers_with_arguments_and_in_folders_with_spaces(name, monkeypatch, tmp_path):
    launcher = script(tmp_path / "launcher", 'exec "$@"')
    script(tmp_path / "my compiler", 'exec c++ "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", name.format(shutil.which("c++")))
    found = build_tools.find_compiler()
    assert os.path.isabs(found[0])
    assert found[1:] == ([shutil.which("c++"), "-pipe"] if "launcher" in name else [])
    assert launcher.exists()


def test_a_ninja_that_does_not_start_is_a_reason(monkeypatch, tmp_path):
    moved = tmp_path / "ninja"
    moved.write_text(f"#!{tmp_path}/an/environment/that/was/moved/bin/python\n")
    moved.chmod(0o755)
    monkeypatch.setattr(build_tools.sys, "executable", str(tmp_path / "python"))
    assert build_native.why_not() == f"the ninja {moved} does not work: does not start: No such file or directory"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.10.1+cu130", "torch 2.10.1+cu130 is too old: the library needs 2.11 or later"),
        ("2.11.0a0+git1", "the torch in {} has no C++ headers"),
        (None, "no torch found in "),
    ],
)
def test_a_torch_that_cannot_be_built_against(version, expected, monkeypatch, tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    if version:
        (torch / "__init__.py").write_text("raise RuntimeError('imported')")
        (torch / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
        monkeypatch.setattr(build_tools.importlib.util, "find_spec", lambda name: Spec(torch))
    else:
        monkeypatch.setattr(build_tools.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(build_tools.sys, "executable", str(script(tmp_path / "python", "echo")))
        monkeypatch.setattr(build_tools, "other_pythons", list)
    monkeypatch.setenv("CXX", "c++")
    assert build_native.why_not().startswith(expected.format(torch))


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """As in a build that sees no torch: the folder of PATH for Pythons, of which the first one has none."""
    monkeypatch.setattr(build_tools.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_tools.sys, "executable", str(script(tmp_path / "of the build", "echo")))
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    script(folders[0] / "python3", "echo; exit 1")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    return folders[1]


def python_with_torch(path: Path, folder: Path) -> Path:
    """What answers as a Python does that is started by itself, and not as one that the variables of a build mislead."""
    return script(path, f'[ -n "$PYTHONPATH$PYTHONNOUSERSITE" ] || echo "{folder}"')


def test_an_isolated_build_finds_the_torch_of_the_active_environment(isolated, monkeypatch, tmp_path):
    """uv and `python -m build` put their own Python in front of PATH, pip runs that of the environment."""
    monkeypatch.setenv("PYTHONPATH", "/what/isolates/the/build")
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert build_tools.locate_torch() == ""
    python_with_torch(isolated / "python3", tmp_path / "its torch")
    assert build_tools.locate_torch() == str(tmp_path / "its torch")
    python_with_torch(tmp_path / "of the build", tmp_path / "beside pip")
    assert build_tools.locate_torch() == str(tmp_path / "beside pip")


def test_a_python_that_is_named_has_the_torch_or_is_refused(isolated, monkeypatch, tmp_path):
    named = script(tmp_path / "named python", "exit 1")
    python_with_torch(isolated / "python3", tmp_path / "another")
    monkeypatch.setenv("BIGAIN_BUILD_PYTHON", str(named))
    assert build_native.why_not() == f"$BIGAIN_BUILD_PYTHON: got {str(named)!r}, expected a Python that has torch"
    python_with_torch(named, tmp_path / "its torch")
    assert build_tools.locate_torch() == str(tmp_path / "its torch")
    monkeypatch.setenv("BIGAIN_BUILD_PYTHON", "no-such-python")
    assert build_native.why_not() == ("$BIGAIN_BUILD_PYTHON: got 'no-such-python', expected a program that exists")


class Spec:
    """What importlib says of a package."""

    def __init__(self, folder: Path):
        self.submodule_search_locations = [str(folder)]


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
@pytest.mark.skipif(shutil.which("readelf") is None or platform.system() != "Linux", reason="needs readelf of binutils")
def test_the_library_loads_beside_old_runtimes():
    """Those of manylinux_2_28, as torch: csrc/portable.cpp has what the headers of newer compilers refer to."""
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    text = run("readelf", "--wide", "--version-info", library(), cwd=ROOT)
    found = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", text)
    assert {name for name, _ in found} >= {"GLIBC", "GLIBCXX"}
    assert [each for each in found if tuple(map(int, each[1].split("."))) > limits[each[0]]] == []


@pytest.mark.usefixtures("cpp")
@pytest.mark.skipif(shutil.which("objdump") is None or platform.machine() != "x86_64", reason="reads x86 assembly")
def test_the_loops_are_vectorised():
    assembly = run("objdump", "-d", "--no-show-raw-insn", "--no-addresses", library(), cwd=ROOT)
    for instruction in ("vfmadd231ps .*%zmm", "vfmadd231ps .*%ymm", "vfmadd231pd .*%zmm", "mulps .*%xmm"):
        assert len(re.findall(instruction, assembly)) >= 8, instruction
