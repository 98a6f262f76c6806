"""What pyproject.toml cannot say: where the Triton kernels lie, and how the native library of csrc/ is built."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_native  # noqa: E402

# Without a compiler the pure-Python package installs. A file says why, and `python -m bigain_kernels.env` repeats it.
REASON = build_native.why_not()
REASON_FILE = "_native_missing.txt"


class BuildNative(build_ext):
    """Hands the one extension, which is no Python module, to ninja."""

    def build_extension(self, ext):
        build_native.build(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp))


class BuildPython(build_py):
    """Leaves the reason beside the modules when there is no library, and nothing of earlier builds."""

    def run(self):
        super().run()
        folder = ROOT / "bigain_kernels" if self.editable_mode else Path(self.build_lib) / "bigain_kernels"
        for stale in folder.glob("_native*"):
            stale.unlink()
        if REASON:
            (folder / REASON_FILE).write_text(REASON)


setup(
    # The folder triton_kernels is installed inside the package: the Triton project has a module of that name.
    packages=[*find_packages(include=["bigain_kernels*"]), "bigain_kernels.triton_kernels"],
    package_dir={"bigain_kernels.triton_kernels": "triton_kernels"},
    # The library uses no Python at all, so the wheel fits every Python from the oldest supported on.
    ext_modules=[] if REASON else [Extension("bigain_kernels._native", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={} if REASON else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
