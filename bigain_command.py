"""What the command `bigain` starts: it imports the package, and with it torch, where Ctrl-C is already answered."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

BAD_INPUT, INTERRUPTED = 2, 130


def main() -> int:
    """`bigain_kernels.cli.main.main`; 130 when Ctrl-C comes before that could be imported.

    Libraries that Ctrl-C hits while they are imported may swallow it and end in errors of their own, at once or later:
    once it has come, all that is an interrupt.
    """
    seen: list[int] = []
    imported = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not imported:
            # torch goes on without NumPy if that is interrupted; here there is nothing yet that could be lost.
            os.write(2, b"bigain: interrupted\n")
            os._exit(INTERRUPTED)
        seen.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from bigain_kernels.cli.main import main as run

        imported = True
        code = run()
    except (Exception, KeyboardInterrupt) as error:
        if not seen and not isinstance(error, KeyboardInterrupt):
            raise
        print("bigain: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
    return INTERRUPTED if seen and code == BAD_INPUT else code


if __name__ == "__main__":
    sys.exit(main())
