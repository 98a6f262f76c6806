"""The folder that a command writes into: one writer at a time, whole files, and nothing of anybody else's touched."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

# The files that we wrote here, a line each; what it does not list is not ours.
LIST = ".bigain-files"
LOCK = ".bigain-lock"
# Written and removed at the start, so that a full disk shows before the work, not after it.
_PROBE = 1 << 16


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write `path` as a whole: the block writes the path that it gets, which then takes the place of what was there.

    A block that fails, or a process that is killed, leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, see `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` as JSON on lines of its own; numbers that are none, which JSON has no words for, as null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class OutputFolder:
    """A context manager that holds a folder for one run.

    The lock is the operating system's: it goes with the process, however that ends.

    Args:
        path: the folder; made if missing.
        names: patterns of the files that the run will write, relative to the folder.
        again: what lets a run write into a folder that already holds results: --overwrite, or --resume.
        hint: the options that do so, for the message.

    Raises:
        ValueError: on entering: the folder is a file, is in use by another run, cannot be written to, holds results and
            `again` is false, holds files of those names that are not ours, or a list of ours that cannot be read.
    """

    def __init__(self, path: Path, names: Sequence[str], again: bool, hint: str = "--overwrite") -> None:
        self.path, self._names, self._again, self._hint = path, names, again, hint
        self._lock = FileLock(path / LOCK, timeout=0)
        self._ours: set[str] = set()
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: got {path}, a file, expected a folder")
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(f"out: got {path}, which another run writes to, expected another folder") from error
        except OSError as error:
            raise ValueError(f"out: got {path}, expected a folder that can be written to ({error})") from error
        try:
            self._start()
        except BaseException:
            self._leave()
            raise
        return self

    def _start(self) -> None:
        probe = self.path / f".{os.getpid()}-probe"
        try:
            with open(probe, "wb") as file:
                file.write(bytes(_PROBE))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"out: got {self.path}, expected a folder that can be written to ({error})") from error
        finally:
            probe.unlink(missing_ok=True)
        listed = self.path / LIST
        if listed.exists():
            try:
                self._ours = {line for line in listed.read_text(encoding="utf-8").split("\n") if line}
            except (OSError, UnicodeError) as error:
                raise ValueError(
                    f"out: got {self.path} with {LIST} that cannot be read, expected another folder ({error})"
                ) from error
        present = self._present()
        foreign = sorted(name for name in present if name not in self._ours or (self.path / name).is_dir())
        if foreign:
            raise ValueError(
                f"out: got {self.path} with {foreign[0]}, which bigain did not write there, expected another folder"
            )
        if present and not self._again:
            raise ValueError(f"out: got {self.path} with results in it, expected {self._hint} or another folder")

    def _present(self) -> list[str]:
        """What lies in the folder under the names of this run, relative to it."""
        return [path.relative_to(self.path).as_posix() for name in self._names for path in self.path.glob(name)]

    def claim(self, name: str) -> Path:
        """The path of a file of ours, listed before it is written."""
        if name not in self._ours:
            self._ours.add(name)
            with open(self.path / LIST, "a", encoding="utf-8") as file:
                file.write(name + "\n")
        return self.path / name

    def clear(self) -> None:
        """Remove what earlier runs wrote under the names of this one, summaries first: a kill leaves none of nothing.

        Results of other commands stay, and so does whatever else the list names: it may have come with the folder.
        """
        names = self._ours.intersection(self._present())
        for name in sorted(names, key=lambda name: ("/" in name, not name.endswith(".json"), name)):
            (self.path / name).unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of ours as a whole."""
        write_text(self.claim(name), text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        """Let go of the folder; one that this run made and left empty goes too."""
        if not any((self.path / name).exists() for name in self._ours):
            if self._ours:
                (self.path / LIST).unlink(missing_ok=True)
            if self._made:
                (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
