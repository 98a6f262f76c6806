"""`bigain env`."""

from __future__ import annotations

import json

from .options import JsonOption
from .text import say_lines


def env(as_json: JsonOption = False) -> None:
    """Show versions, devices, and which backend runs each op here, with the reason."""
    from ..env import facts, report

    say_lines(json.dumps(facts(), indent=2) if as_json else report())
