"""What pyproject.toml cannot say: where the Triton kernels lie, and how the native library of csrc/ is built."""

import atexit
import os
import shutil
import sys
import tempfile
from logging import INFO
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402
import build_native  # noqa: E402
from build_tools import CannotBuild, find_torch, version_of  # noqa: E402

# The libraries that can be built, and why one is not. Without a compiler the pure-Python package installs. A file says
# why; the import of the package and `python -m bigain_kernels.env` repeat it.
BUILDS = {"_native": build_native, "_native_cuda": build_cuda}
try:
    REASONS = {name: build.why_not() for name, build in BUILDS.items()}
except (CannotBuild, ValueError) as error:
    sys.exit(f"error: {error}")
EXTENSIONS = [f"bigain_kernels.{name}" for name, reason in REASONS.items() if not reason]


class EggInfo(egg_info):
    """As PyTorch names its own wheels: one with the CUDA library is another version than one without."""

    def finalize_options(self):
        if not REASONS["_native_cuda"]:
            self.tag_build = f"+cu{build_cuda.cuda_version()}"
        super().finalize_options()


class BuildNative(build_ext):
    """Hands the extensions, which are no Python modules, to ninja."""

    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        self.announce(f"building {name} with the headers of torch {version_of(find_torch())} in {find_torch()}", INFO)
        try:
            BUILDS[name].build(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / name)
        except CannotBuild as error:
            sys.exit(f"error: {error}; {BUILDS[name].SWITCH}=0 leaves it out")


class BuildPython(build_py):
    """Leaves nothing of earlier builds, and where a library is missing the reason beside the modules."""

    def run(self):
        if self.editable_mode:
            folder = ROOT / "bigain_kernels"
            for stale in folder.glob("_native*"):
                stale.unlink()
        else:
            # setuptools would pack modules that are gone from the sources as well.
            folder = Path(self.build_lib) / "bigain_kernels"
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        for name, reason in REASONS.items():
            if reason:
                self.warn(f"bigain_kernels is built without {name}: {reason}")
                (folder / f"{name}_missing.txt").write_text(reason, encoding="utf-8")


def options():
    """The folders that setuptools writes to: those of the source, or of a scratch folder where that is read-only."""
    wheel = {"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {}
    if not os.access(ROOT, os.W_OK):
        scratch = tempfile.mkdtemp(prefix="bigain_kernels-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        return {**wheel, "egg_info": {"egg_base": scratch}, "build": {"build_base": scratch}}
    if os.name == "posix":
        # Builds of one checkout share its folders, so they wait for each other. The lock belongs to this process and
        # ends with it; setuptools runs this file several times in one.
        import fcntl

        (ROOT / "build").mkdir(exist_ok=True)
        lock = os.open(ROOT / "build" / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.lockf(lock, fcntl.LOCK_EX)
    return wheel


setup(
    # The folder triton_kernels is installed inside the package: the Triton project has a module of that name.
    packages=[
        *find_packages(include=["bigain_kernels*"]),
        "bigain_kernels.triton_kernels",
        "bigain_kernels.triton_kernels.report",
    ],
    package_dir={"bigain_kernels.triton_kernels": "triton_kernels"},
    py_modules=["bigain_command"],
    # The libraries use no Python at all, so the wheel fits every Python from the oldest supported on.
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in EXTENSIONS],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "egg_info": EggInfo},
    options=options(),
)
