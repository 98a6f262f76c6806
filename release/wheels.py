"""The source distribution and the wheels, built, tagged and checked: `make wheels`, or

    python -m release.wheels [--out dist] [pure] [cpu] [cuda]

All wheels are built from the unpacked source distribution, in the environment that this runs in: the one without
libraries (`pure`), the one with the CPU library for all instruction sets (`cpu`), and the one that has the CUDA library
as well (`cuda`; needs nvcc, and no GPU). auditwheel tells which runtimes a wheel needs, and gives it the tag that says
so; libtorch comes from the torch beside it. abi3audit tells whether the libraries are of every Python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {
    "pure": {"BIGAIN_BUILD_CPU": "0", "BIGAIN_BUILD_CUDA": "0"},
    "cpu": {"BIGAIN_BUILD_CPU": "1", "BIGAIN_BUILD_CUDA": "0"},
    "cuda": {"BIGAIN_BUILD_CPU": "1", "BIGAIN_BUILD_CUDA": "1"},
}
# In MiB: what is larger has something in it that nobody meant to send. Weights of the small models are 10 of them.
LARGEST = {"pure": 15, "cpu": 16, "cuda": 60}
BUILD = [sys.executable, "-m", "build", "--no-isolation"]


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Run a command, or end with the last lines of what it said."""
    merged = {**os.environ, **environment}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=merged,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\nerror: {' '.join(map(str, command))} failed")


def source_distribution(source: Path, out: Path, unpacked: Path) -> Path:
    """Build the source distribution into `out`; returns its folder, unpacked."""
    run(*BUILD, "--sdist", "--outdir", out, source, cwd=source, **SWITCHES["pure"])
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # From Python 3.11.4 on; before, an archive of our own is taken as it is.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(unpacked)
    (folder,) = unpacked.iterdir()
    return folder


def wheel(kind: str, source: Path, out: Path) -> Path:
    """Build one wheel from an unpacked source distribution, tag it for what it needs, check it; returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        run(*BUILD, "--wheel", "--outdir", folder, source, cwd=source, **SWITCHES[kind])
        (built,) = Path(folder).glob("*.whl")
        if built.stat().st_size > LARGEST[kind] * 2**20:
            raise SystemExit(
                f"error: {built.name} has {built.stat().st_size / 2**20:.1f} MiB, more than {LARGEST[kind]}"
            )
        if kind == "pure":
            return Path(shutil.copy2(built, out))
        tagged = Path(folder) / "tagged"
        # Nothing is copied into the wheel or changed in it, so no program that changes libraries is needed.
        keep = ["--patcher", "none", "--exclude", "libtorch*", "--exclude", "libc10*"]
        run(sys.executable, "-m", "auditwheel", "repair", *keep, "--wheel-dir", tagged, built, cwd=source)
        (tagged_wheel,) = tagged.glob("*.whl")
        run(sys.executable, "-m", "abi3audit", "--strict", tagged_wheel, cwd=source)
        return Path(shutil.copy2(tagged_wheel, out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to write to")
    parser.add_argument("kinds", nargs="*", help=f"{', '.join(SWITCHES)}; all of them by default")
    arguments = parser.parse_args()
    unknown = [kind for kind in arguments.kinds if kind not in SWITCHES]
    if unknown:
        parser.error(f"kinds: got {unknown[0]!r}, expected some of {', '.join(SWITCHES)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("bigain_kernels-*.whl"), *out.glob("bigain_kernels-*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        source = source_distribution(ROOT, out, Path(folder))
        for kind in arguments.kinds or SWITCHES:
            wheel(kind, source, out)
    for path in sorted(out.glob("bigain_kernels-*")):
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
