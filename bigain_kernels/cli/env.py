"""`bigain env`."""

from __future__ import annotations

import typer


def env() -> None:
    """Show versions, devices, and which backend runs each op here, with the reason."""
    from ..env import report

    typer.echo(report())
