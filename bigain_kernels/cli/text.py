"""Text that came from files and arguments, on its way to a terminal."""

from __future__ import annotations

import os
import sys


def printable(text: str) -> str:
    """`text` on one line, every character that is not printable written as its escape.

    Names of files and classes may hold line ends, the codes that move a terminal's cursor, and bytes that are no UTF-8,
    on which printing fails.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(count: int, what: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {what}{'s' * (count != 1)}"


def say(text: str, aside: bool = False) -> None:
    """Print a line, made printable, to stdout, or, `aside`, to stderr. A reader that went away ends no work."""
    stream = sys.stderr if aside else sys.stdout
    try:
        print(printable(text), file=stream, flush=True)
    except BrokenPipeError:
        # Nobody reads on; without this Python would fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_lines(text: str) -> None:
    """Print lines to stdout: a table, or JSON."""
    for line in text.splitlines():
        say(line)
