"""What pyproject.toml cannot say: where the Triton kernels lie, and how the native library of csrc/ is built."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402
import build_native  # noqa: E402

# The libraries that can be built, and why one is not. Without a compiler the pure-Python package installs. A file says
# why, and `python -m bigain_kernels.env` repeats it.
BUILDS = {"_native": build_native, "_native_cuda": build_cuda}
REASONS = {name: build.why_not() for name, build in BUILDS.items()}
EXTENSIONS = [f"bigain_kernels.{name}" for name, reason in REASONS.items() if not reason]


class BuildNative(build_ext):
    """Hands the extensions, which are no Python modules, to ninja."""

    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        BUILDS[name].build(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / name)


class BuildPython(build_py):
    """Leaves the reason beside the modules when a library is missing, and nothing of earlier builds."""

    def run(self):
        super().run()
        folder = ROOT / "bigain_kernels" if self.editable_mode else Path(self.build_lib) / "bigain_kernels"
        for stale in folder.glob("_native*"):
            stale.unlink()
        for name, reason in REASONS.items():
            if reason:
                (folder / f"{name}_missing.txt").write_text(reason)


setup(
    # The folder triton_kernels is installed inside the package: the Triton project has a module of that name.
    packages=[*find_packages(include=["bigain_kernels*"]), "bigain_kernels.triton_kernels"],
    package_dir={"bigain_kernels.triton_kernels": "triton_kernels"},
    # The libraries use no Python at all, so the wheel fits every Python from the oldest supported on.
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in EXTENSIONS],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
