"""The kernel for the hub: its layout, and that it is found, loaded and used as `kernels` does, beside the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.builds import ROOT, run
from tests.release.conftest import has_nvcc, once

sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda

kernels = pytest.importorskip("kernels")
from release import hub as release_hub  # noqa: E402

pytestmark = pytest.mark.slow

REPOSITORY = "someone/bigain-kernels"
# What every op makes of its own samples, as the kernel and as the package, and what a program does with a kernel.
COMPARES = """
import importlib, json, sys, torch, kernels
kernel = kernels.get_kernel({repository!r}, version=0, trust_remote_code=True)
config = importlib.import_module(".diffusers", kernel.__name__).LGTMConfig(ratio=0.5)
assert type(config).__module__.split(".")[0] == kernel.__name__
alone = sorted(name for name in sys.modules if name.split(".")[0] == "bigain_kernels")
x = torch.randn(2, 64, 20, requires_grad=True)
plan = kernel.lgtm_plan(x, (8, 8), 0.5)
there_and_back = lambda x: kernel.token_unmerge(kernel.token_merge(x, plan), plan)
torch.compile(there_and_back, fullgraph=True, backend="eager")(x).sum().backward()

import bigain_kernels
from bigain_kernels import testing
from bigain_kernels.declaration import OPS
compared = 0
for op in OPS.values():
    for sample in op.samples(testing.Inputs()).values():
        names = torch.ops.bigain, getattr(torch.ops, kernel.__name__)
        ours, theirs = (getattr(each, op.name)(*op.flatten(*sample)) for each in names)
        torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5)
        compared += 1
print(json.dumps({{
    "name": kernel.__name__, "file": kernel.__file__, "alone": alone, "compared": compared,
    "gradient": x.grad.shape == x.shape, "reason": kernel.backends.get("cpp").missing,
}}))
"""
SEVERAL = """
import torch, kernels
found = [kernels.get_kernel(name, version=0) for name in ("someone/one", "someone/other")]
import bigain_kernels
x = torch.randn(1, 64, 8)
slots = [each.lgtm_plan(x, (8, 8), 0.5).slot for each in (*found, bigain_kernels)]
assert all(torch.equal(slots[0], other) for other in slots)
print(len({each.__name__ for each in (*found, bigain_kernels)}))
"""
# In Triton's interpreter, as there may be no GPU.
RUNS_TRITON = """
import torch, kernels
kernel = kernels.get_kernel("someone/one", version=0)
import bigain_kernels
x, both = torch.randn(1, 64, 8), (kernel, bigain_kernels)
with kernel.use_backend("triton"), bigain_kernels.use_backend("reference"):
    plans = [each.lgtm_plan(x, (8, 8), 0.5) for each in both]
    assert torch.equal(plans[0].slot, plans[1].slot)
    torch.testing.assert_close(*(each.token_merge(x, plan) for each, plan in zip(both, plans)))
    torch.testing.assert_close(*(each.kv_downsample(x, (8, 8), 2, 0.9) for each in both))
print("done")
"""


@pytest.fixture(scope="module")
def hub(switches, tmp_path_factory) -> Path:
    """A repository of the hub with all variants that can be built here."""
    kinds = ["universal", "cpu", *(["cuda"] if "CUDACXX" in switches else [])]

    def build(folder: Path) -> None:
        run(sys.executable, "-m", "release.hub", "--out", folder / "bigain-kernels", *kinds, cwd=ROOT, **switches)

    return once(tmp_path_factory, "it's a hub", build) / "bigain-kernels"


def variant(hub: Path, kind: str) -> Path:
    if kind == "cuda" and not has_nvcc():
        pytest.skip("there is no nvcc here")
    return hub / "build" / release_hub.variant_of(kind)


def compared(folder: Path, **environment: str) -> dict[str, object]:
    program = COMPARES.format(repository=REPOSITORY)
    return json.loads(run(sys.executable, "-c", program, cwd=folder, **environment).splitlines()[-1])


@pytest.mark.parametrize("kind", ["universal", "cpu", "cuda"])
def test_the_layout_of_a_variant(kind, hub):
    """What the requirements of the hub ask for: metadata with a digest, and a name of its own."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    folder = variant(hub, kind)
    metadata = Metadata.read_from_file(folder / "metadata.json")
    assert re.fullmatch(rf"_bigain_kernels_{kind}_[0-9a-f]{{8}}", metadata.id)
    assert str(metadata.backend.backend_type).lower() == ("cpu" if kind == "cpu" else "cuda")
    assert metadata.backend.archs == (["8.0", "9.0+PTX"] if kind == "cuda" else None)
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    libraries = {path.name.split(".")[0] for path in folder.glob("*.so")}
    assert libraries == {"universal": set(), "cpu": {"_native"}, "cuda": {"_native", "_native_cuda"}}[kind]
    assert f'NAMESPACE = "{metadata.id}"\n' in (folder / "declaration.py").read_text()
    assert (hub / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads symbols of ELF files")
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_libraries_need_no_more_than_manylinux_2_28(kind, hub):
    """Nor any library but torch's, those that torch brings, and the runtimes of C and C++."""
    limits = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    for library in variant(hub, kind).glob("*.so"):
        text = run("readelf", "--wide", "--version-info", "--dynamic", library, cwd=hub)
        for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", text):
            assert tuple(map(int, version.split("."))) <= limits[name], (library.name, name, version)
        needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", text))
        known = {"libtorch_cpu", "libtorch_cuda", "libcudart", "libstdc++", "libgcc_s", "libc", "libm"}
        assert needed <= known | {"ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.mark.parametrize("kind", ["universal", "cpu"])
def test_a_local_kernel_computes_what_the_package_computes(kind, hub, tmp_path):
    """By LOCAL_KERNELS, which names a variant or a repository."""
    found = compared(tmp_path, LOCAL_KERNELS=f"{REPOSITORY}={variant(hub, kind)}")
    assert found["name"] == json.loads((variant(hub, kind) / "metadata.json").read_text())["id"]
    assert Path(found["file"]).parent == variant(hub, kind)
    assert found["alone"] == []
    assert found["gradient"]
    assert found["compared"] >= 20
    assert found["reason"] == ("" if kind == "cpu" else "left out of the variant torch-universal")


def test_get_kernel_takes_the_variant_of_this_machine(hub, tmp_path):
    """Without LOCAL_KERNELS, from a cache that is laid out as a download leaves it: the hub itself is not asked."""
    import torch

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / f"kernels--{REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v0").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(hub)
    found = compared(tmp_path, KERNELS_CACHE=str(tmp_path), HF_HUB_OFFLINE="1", LOCAL_KERNELS="another/kernel=/")
    kind = "cpu" if torch.version.cuda is None else "cuda"
    assert Path(found["file"]).parent.name == variant(hub, kind).name


def test_kernels_and_the_package_share_a_process(hub, tmp_path):
    local = ":".join(f"someone/{name}={variant(hub, kind)}" for name, kind in (("one", "cpu"), ("other", "universal")))
    assert run(sys.executable, "-c", SEVERAL, cwd=tmp_path, LOCAL_KERNELS=local).splitlines()[-1] == "3"


def test_the_kernels_of_triton_are_inside(hub, tmp_path):
    pytest.importorskip("triton")
    local = f"someone/one={variant(hub, 'universal')}"
    assert run(sys.executable, "-c", RUNS_TRITON, cwd=tmp_path, LOCAL_KERNELS=local, TRITON_INTERPRET="1") == "done\n"


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [("13.0", "torch-stable-abi211-cu130"), ("13.2", "torch-stable-abi211-cu130"), ("12.8", "torch-universal")],
)
def test_the_variant_that_a_machine_with_cuda_is_given(cuda, expected):
    """By the rules of `kernels`: the library where the CUDA of torch is as new, else the kernels of Triton."""
    from kernels import variants
    from kernels.backends import CUDA
    from packaging.version import Version

    names = ["torch-universal", "torch-stable-abi211-cpu-x86_64-linux", "torch-stable-abi211-cu130-x86_64-linux"]
    accepted, _ = variants._resolve_variant_for_system(
        variants=[variants.parse_variant(name) for name in names],
        selected_backend=CUDA(version=Version(cuda)),
        cpu="x86_64",
        os="linux",
        torch_version=Version("2.13"),
        torch_cxx11_abi=True,
        tvm_ffi_version=None,
    )
    assert accepted[0].variant_str.startswith(expected)


def test_the_cuda_library_has_names_of_its_own(tmp_path):
    """One source, compiled with the name in front of it; the linked library of the other tests takes what is built."""
    try:
        text = build_cuda.ninja_file(tmp_path / "library.so", ["90"], namespace="_a_kernel_1", runtime="shared")
    except build_cuda.CannotBuild as error:
        pytest.skip(str(error))
    (tmp_path / "build.ninja").write_text(text)
    subprocess.run([build_cuda.find_ninja(), "-C", str(tmp_path), "info.o"], check=True, capture_output=True)
    data = (tmp_path / "info.o").read_bytes()
    assert b"\0_a_kernel_1_cuda\0" in data
    assert b"bigain_cuda" not in data


@pytest.mark.parametrize(
    ("archs", "expected"),
    [(["80", "90", "100", "120"], ["8.0", "9.0", "10.0+PTX", "12.0"]), (["90a", "100f"], ["9.0a", "10.0f"])],
)
def test_architectures_as_the_metadata_has_them(archs, expected):
    assert release_hub.capabilities(archs) == expected


def test_an_import_by_name_is_refused():
    with pytest.raises(SystemExit, match=r"error: ops/an\.py imports bigain_kernels by name"):
        release_hub.renamed("ops/an.py", b"def f():\n    import bigain_kernels\n", "_a_kernel_1")
    assert release_hub.renamed("triton_kernels/an.py", b"from bigain_kernels.plan import x\n", "_a") == (
        b"from ..plan import x\n"
    )
