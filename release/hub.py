"""The package as a kernel for the hub of `kernels`: `make hub`, or

    python -m release.hub [--out build/hub] [universal] [cpu] [cuda]

Each variant is a folder of its own with what runs the ops, the methods and the integrations; all its imports are
relative. Its ops are called as the kernel is, torch.ops.<id> (and <id>_cpp, <id>_cuda for those of the libraries), and
the id ends with a digest of the sources: versions share a process. The libraries are on the stable ABI of torch, so one
build serves torch 2.11 and later; `cuda` needs nvcc, and no GPU. docs/hub.md says how a kernel is used.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402
import build_native  # noqa: E402
from build_tools import NAMESPACE, TORCH_TARGET  # noqa: E402

sys.path.insert(0, str(ROOT))
import bigain_kernels  # noqa: E402

NAME = "bigain-kernels"
# What a program does not call: commands, the evaluation, and tools for those who write the kernels.
LEFT_OUT = {"evaluation", "cli", "report", "aot.py", "aot_recipes.py", "machine_code.py", "tune.py", "__pycache__"}
MINIMUM_KERNELS = "0.17.0"


def sources() -> dict[str, bytes]:
    """The Python files and tables of a variant, by their place in it, still with the names of the package."""
    found = {}
    for folder, place in ((ROOT / "bigain_kernels", Path()), (ROOT / "triton_kernels", Path("triton_kernels"))):
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(folder).parts
            if path.suffix in (".py", ".json") and not LEFT_OUT.intersection(parts):
                found[str(place.joinpath(*parts))] = path.read_bytes()
    return found


def digest_of_all() -> str:
    """Eight digits that tell this version of the sources, of the C++ ones too, from all others."""
    content = hashlib.sha256()
    files = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    for name, data in sorted({**sources(), **files}.items()):
        if "__pycache__" not in name:
            content.update(f"{name}\0{len(data)}\0".encode() + data)
    return content.hexdigest()[:8]


def renamed(place: str, data: bytes, identifier: str) -> bytes:
    """A source file as the kernel has it: relative imports, and the names of ops that are the kernel's own."""
    if not place.endswith(".py"):
        return data
    text = data.decode()
    if place.startswith("triton_kernels/"):
        # A folder beside the package in the sources, and inside of it once it is installed.
        text = re.sub(r"^from bigain_kernels\.", "from ..", text, flags=re.MULTILINE)
    if place == "declaration.py":
        text, times = re.subn(rf'^NAMESPACE = "{NAMESPACE}"$', f'NAMESPACE = "{identifier}"', text, flags=re.MULTILINE)
        if times != 1:
            raise SystemExit("error: declaration.py says the names of the ops in another way than this file knows")
    for node in ast.walk(ast.parse(text)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] in ("bigain_kernels", "triton_kernels") for name in names):
            raise SystemExit(f"error: {place} imports {names[0]} by name, where a kernel imports in relation to itself")
    return text.encode()


def capabilities(archs: list[str]) -> list[str]:
    """GPU architectures as the metadata has them: "90" is 9.0, and what PTX there is of runs on newer ones too."""
    ptx = re.search(r"code=compute_(\d+)", build_cuda.targets(archs))
    named = [re.sub(r"(\d)([af]?)$", r".\1\2", arch) for arch in archs]
    return [f"{name}+PTX" if ptx and arch == ptx[1] else name for name, arch in zip(named, archs, strict=True)]


def variant_of(kind: str) -> str:
    """What the folder of a variant is called, which is what a program's machine is compared with."""
    if kind == "universal":
        return "torch-universal"
    backend = f"cu{build_cuda.cuda_version()}" if kind == "cuda" else "cpu"
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    return f"torch-stable-abi{TORCH_TARGET[0]}{TORCH_TARGET[1]}-{backend}-{machine}-{platform.system().lower()}"


def write_variant(kind: str, build: Path, objects: Path) -> Path:
    """Write one variant below `build`; objects of compilers are kept in `objects`. Returns its folder."""
    identifier = f"_{NAME.replace('-', '_')}_{kind}_{digest_of_all()}"
    folder = build / variant_of(kind)
    shutil.rmtree(folder, ignore_errors=True)
    for place, data in sources().items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(renamed(place, data, identifier))
    shutil.copy2(ROOT / "LICENSE", folder)
    backend: dict[str, object] = {"type": "cpu" if kind == "cpu" else "cuda"}
    libraries: dict[str, Callable[[Path], None]] = {}
    if kind != "universal":
        libraries["_native"] = lambda path: build_native.build(path, objects / "cpu", namespace=identifier)
    if kind == "cuda":
        archs = build_cuda.architectures()
        backend["archs"] = capabilities(archs)
        libraries["_native_cuda"] = lambda path: build_cuda.build(
            path, objects / "cuda", archs, namespace=identifier, runtime="shared"
        )
    for stem in ("_native", "_native_cuda"):
        if stem in libraries:
            libraries[stem](folder / f"{stem}.abi3.so")
        else:
            (folder / f"{stem}_missing.txt").write_text(f"left out of the variant {folder.name}", encoding="utf-8")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    metadata = {
        "name": NAME,
        "id": identifier,
        # Raised where a program that runs with one version may not with an older one; 0 is for what still changes.
        "version": int(bigain_kernels.__version__.split(".")[0]),
        "license": "Apache-2.0",
        "kernels-minver": MINIMUM_KERNELS,
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": {str(path.relative_to(folder)): _hash(path) for path in files}},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def _hash(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernels, diffusers, token-merging]
---

"""


def main() -> int:
    kinds = ("universal", "cpu", "cuda")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="the folder to write to")
    parser.add_argument("kinds", nargs="*", help=f"{', '.join(kinds)}; all of them by default")
    arguments = parser.parse_args()
    unknown = [kind for kind in arguments.kinds if kind not in kinds]
    if unknown:
        parser.error(f"kinds: got {unknown[0]!r}, expected some of {', '.join(kinds)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(CARD + (ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), encoding="utf-8")
    for kind in arguments.kinds or kinds:
        folder = write_variant(kind, out / "build", out.with_name(f"{out.name}.objects"))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{size / 2**20:6.2f} MiB  {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
