"""What was measured, on disk turn by turn, so that a search can stop anywhere and go on later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from ..harness.deciding import changes


class TurnFile:
    """JSON lines: the settings of the search, then a line for each turn of each stage.

    Args:
        path: the file; it is written from the first turn on.
        settings: everything that decides the numbers; JSON values.
        resume: go on with what is there. Otherwise it is overwritten.

    Raises:
        ValueError: `resume` with a file of other settings, or with lines that no search wrote, but for half a line at
            the end, which a kill leaves.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._turns: dict[tuple[str, int], dict[str, Any]] = {}
        self._whole = 0
        if not resume or not path.exists():
            return
        content = path.read_bytes()
        self._whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._whole].split(b"\n")[:-1], start=1):
            try:
                self._read(number, json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"resume: got {path} with line {number} that `bigain search` did not write ({error}), expected it "
                    "as it was"
                ) from error

    def _read(self, number: int, line: Any) -> None:
        if number > 1:
            turn = {name: line[name] for name in ("errors", "times", "seconds")}
            self._turns[str(line["stage"]), int(line["turn"])] = turn
        elif line["settings"] != self._settings:
            changed = ", ".join(changes(line["settings"], self._settings))
            raise ValueError(f"other settings: {changed}")

    def get(self, stage: str, turn: int, names: Set[str]) -> dict[str, Any] | None:
        """A turn that was measured with configs of these names, or None."""
        found = self._turns.get((stage, turn))
        return found if found is not None and set(found["times"]) == names else None

    def add(self, stage: str, turn: int, value: Mapping[str, Any]) -> None:
        """Write a turn; it is on disk when this returns."""
        line = json.dumps({"stage": stage, "turn": turn, **value}).encode() + b"\n"
        with open(self.path, "r+b" if self._whole else "wb") as file:
            file.seek(self._whole)
            file.truncate()
            if not self._whole:
                line = json.dumps({"settings": self._settings}).encode() + b"\n" + line
            file.write(line)
        self._whole += len(line)
