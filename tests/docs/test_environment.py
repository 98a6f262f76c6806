"""The page of environment variables has those that the sources read, and no others of ours."""

from __future__ import annotations

import re

from .blocks import ROOT

# As sources name variables that are read: in quotes, or alone in the build's constants.
_READ = re.compile(r"""(?:environ(?:\.get\(|\[|\.pop\(|\.setdefault\()|getenv\(|not in os\.environ|in os\.environ)""")
_NAME = re.compile(r"\"((?:BIGAIN|TRITON_INTERPRET|DIFFUSERS|COMFYUI|FASTSDCPU)[A-Z_]*)\"")
# How the tests speak to processes that they start, and what compilers are told.
_INSIDE = {"BIGAIN_CAUGHT", "BIGAIN_INTERPRETER_PIPES", "BIGAIN_SHARD", "BIGAIN_EMULATED_LIBRARY", "BIGAIN_AMX"}


def test_the_page_is_whole():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", page, re.M))
    read = set()
    for folder in ("bigain_kernels", "csrc", "triton_kernels", "benchmarks", "tests", "examples", "integrations"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h") and path.name != "test_environment.py":
                text = path.read_text(encoding="utf-8")
                if _READ.search(text):
                    read |= set(_NAME.findall(text))
    ours = {name for name in listed if name.startswith("BIGAIN")}
    assert read - _INSIDE <= listed
    assert ours <= read
