"""`python -m bigain_kernels.tune`: measure the launch configs of the Triton kernels on this GPU, as `bigain tune`.

It lives with the kernels, in triton_kernels/tune.py.
"""

from __future__ import annotations

import sys

from .backends.triton import TRITON


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 2 where this installation has no Triton kernels."""
    if TRITON.missing:
        print(f"tune: {TRITON.missing}", file=sys.stderr)
        return 2
    from .triton_kernels.tune import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
