"""The blocks of code of the documentation, and what each is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "integrations/**/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
_FENCE = re.compile(r"(?P<mark><!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n\n?|(?<=\n)\n)(?P<code>(?:    \S.*\n)+)")


@dataclass(frozen=True)
class Block:
    """A block of a page: "python", "shell" or another kind; `why` is its reason not to be run, or None."""

    page: str
    line: int
    kind: str
    code: str
    why: str | None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced and the indented blocks of a page, in order. Indented ones hold commands, unless they are marked."""
    text, page, found = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)), []

    def add(match: re.Match[str], kind: str, code: str) -> None:
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, kind, code, match["why"]))

    for match in _FENCE.finditer(text):
        add(match, match["kind"], match["code"])
    # Blank lines in place of fenced blocks, so that positions and lines stay.
    text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INDENTED.finditer(text):
        add(match, "shell", match["code"])
    return sorted(found, key=lambda block: block.line)


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
