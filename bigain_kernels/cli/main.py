"""The `bigain` command: its sub-commands, and how errors and Ctrl-C end it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from ..backends import BackendUnavailable
from .text import printable, say

BAD_INPUT, INTERRUPTED = 2, 130
_NO_MEMORY = "DefaultCPUAllocator: "

try:
    import rich  # noqa: F401
    import typer
    from typer.exceptions import TyperException

    from .bench import bench
    from .classify import classify
    from .demo import demo
    from .env import env
    from .generate import generate
    from .method_options import with_method_options
    from .reproduce import reproduce
    from .search import search
    from .train_tiny import train_tiny
    from .tune import tune
except ModuleNotFoundError as missing:
    # They come with the extra; a traceback would not say so.
    if missing.name not in ("typer", "rich"):
        raise
    print('bigain: needs typer and rich: pip install "bigain-kernels[evaluation]"', file=sys.stderr)
    sys.exit(BAD_INPUT)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        say(f"bigain_kernels {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and nothing else.")
    ] = False,
) -> None:
    """What stands before every command."""


def make_app() -> typer.Typer:
    """The command line with the options of the methods that are registered now."""
    app = typer.Typer(
        name="bigain",
        help=(
            "BiGain: fewer tokens in the attention of diffusion models, for generation and for classification. "
            "Start with `bigain demo`."
        ),
        epilog="Bad input ends with one line and exit code 2; set BIGAIN_TRACEBACK=1 to see where it was found.",
        no_args_is_help=True,
        # Through the shell's own file of completions: `bigain --install-completion`.
        add_completion=True,
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    for command in (
        demo,
        with_method_options(classify),
        with_method_options(generate),
        bench,
        search,
        reproduce,
        train_tiny,
        env,
        tune,
    ):
        app.command(command.__name__.replace("_", "-"))(command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code.

    0 is success, 2 bad input (one line on stderr says what), 130 Ctrl-C, with finished results on disk.
    """
    try:
        return make_app()(args=argv, prog_name="bigain", standalone_mode=False) or 0
    except TyperException as error:
        message = error.format_message()
    # Our own checks raise ValueError and TypeError; OSError is a file or hub id that cannot be read, ImportError an
    # optional package that is not installed, BackendUnavailable a backend asked for by name that lacks an op.
    except (ValueError, TypeError, OSError, ImportError, BackendUnavailable) as error:
        if os.environ.get("BIGAIN_TRACEBACK"):
            raise
        message = str(error) or type(error).__name__
    except KeyboardInterrupt:
        print("bigain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        # torch says so with a class of its own on a GPU, and in words on a CPU.
        text = str(error)
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in text):
            raise
        message = f"batch_size: got out of memory ({text[:200] or 'MemoryError'}), expected a smaller --batch-size"
    # Without arguments the help has been shown, and there is no message.
    if message:
        print(f"bigain: {printable(' '.join(message.split()))}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
