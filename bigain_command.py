"""What the command `bigain` starts: it imports the package, and with it torch, where Ctrl-C is already answered."""

from __future__ import annotations

import sys


def main() -> int:
    """`bigain_kernels.cli.main.main`; 130 when Ctrl-C comes before that could be imported."""
    try:
        from bigain_kernels.cli.main import main as run
    except KeyboardInterrupt:
        print("bigain: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
