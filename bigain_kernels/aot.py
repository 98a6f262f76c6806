"""`python -m bigain_kernels.aot`: what can be known about the Triton kernels without a GPU.

It lives with the kernels, in triton_kernels/aot.py.
"""

from __future__ import annotations

import sys

from .backends.triton import TRITON


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 where this installation has no Triton kernels."""
    if TRITON.missing:
        print(f"aot: {TRITON.missing}", file=sys.stderr)
        return 2
    from .triton_kernels.aot import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
