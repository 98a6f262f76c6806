"""Results of the classifier on disk, one line for each image, so that a run can stop anywhere and go on later."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .classify import ClassificationResult, ImageResult


def _read(path: Path) -> tuple[dict[str, Any], list[ImageResult], int]:
    """Settings, results, and the length in bytes of what is whole: a killed run may leave half a line at the end."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in content[:whole].splitlines()]
        images = [ImageResult(**{**line, "errors": tuple(line["errors"])}) for line in lines[1:]]
        settings = lines[0]["settings"] if lines else {}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"resume: got {path}, expected results written by `bigain classify` ({error})") from error
    return settings, images, whole


class ResultsFile:
    """A JSON-lines file: the settings of the run first, then one `ImageResult` a line. A context manager.

    The file is written from the first result on, so a run that fails before it has one leaves what there was.

    Args:
        path: the file; its folder is made if missing.
        settings: everything that decides the results; JSON values.
        resume: go on with a file that has the same settings. Otherwise an existing file is overwritten.

    Raises:
        ValueError: `resume` with a file of other settings, or one that is no results file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.images: list[ImageResult] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._settings = json.loads(json.dumps(settings))
        self._whole = 0
        self._file: BinaryIO | None = None
        if resume and path.exists():
            found, self.images, self._whole = _read(path)
            now = self._settings
            if self.images and found != now:
                names = sorted(n for n in {*found, *now} if found.get(n) != now.get(n))
                changed = ", ".join(f"{n} {found.get(n)!r} there and {now.get(n)!r} now" for n in names)
                raise ValueError(f"resume: got {path} with other settings ({changed}), expected those of this run")
            if not self.images:
                self._whole = 0

    def _open(self) -> BinaryIO:
        file = open(self.path, "r+b" if self._whole else "wb")  # noqa: SIM115 closed by __exit__
        file.truncate(self._whole)
        file.seek(self._whole)
        if not self._whole:
            file.write(json.dumps({"settings": self._settings}).encode() + b"\n")
        return file

    def add(self, image: ImageResult) -> None:
        """Write one result; it is on disk when this returns."""
        if self._file is None:
            self._file = self._open()
        self.images.append(image)
        self._file.write(json.dumps(asdict(image)).encode() + b"\n")
        self._file.flush()

    @property
    def result(self) -> ClassificationResult:
        """All results so far, in the order of their image index."""
        return ClassificationResult(sorted(self.images, key=lambda image: image.index))

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
