"""Text that came from files and arguments, on its way to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, every character that is not printable written as its escape.

    Names of files and classes may hold line ends, the codes that move a terminal's cursor, and bytes that are no UTF-8,
    on which printing fails.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
