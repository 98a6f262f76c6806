"""Results of the classifier on disk, one line for each image, so that a run can stop anywhere and go on later."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .classify import ClassificationResult, ImageResult
from .harness.deciding import changes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The hook of `json.loads` for objects whose names stand once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _whole_number(line: dict[str, Any], name: str, below: int | None) -> int:
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (below is not None and value >= below):
        raise ValueError(f"{name} is {value!r}, expected 0 <= {name}" + ("" if below is None else f" < {below}"))
    return value


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < float("inf")):
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least 0")
    return float(value)


def _image(line: Any, classes: int | None) -> ImageResult:
    """One line of a file, checked: what cannot come from a classifier raises ValueError, KeyError or TypeError."""
    if not isinstance(line, dict) or set(line) != {field.name for field in fields(ImageResult)}:
        raise ValueError("its names are not those of a result")
    if not isinstance(line["errors"], list):
        raise ValueError("errors is no list")
    count = len(line["errors"]) if classes is None else classes
    if len(line["errors"]) != count:
        raise ValueError(f"errors has {len(line['errors'])} values, expected one for each of {count} classes")
    return ImageResult(
        _whole_number(line, "index", None),
        _whole_number(line, "label", count),
        _whole_number(line, "prediction", count),
        tuple(_finite("errors", value) for value in line["errors"]),
        _whole_number(line, "evaluations", None),
        _finite("seconds", line["seconds"]),
    )


def _read(path: Path, classes: int | None) -> tuple[dict[str, Any], list[ImageResult], int]:
    """Settings, results, and the length in bytes of what is whole: a killed run may leave half a line at the end."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    settings: dict[str, Any] = {}
    images: dict[int, ImageResult] = {}
    for number, text in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text, object_pairs_hook=_once)
            if number == 1:
                settings = line["settings"]
                if set(line) != {"settings"} or not isinstance(settings, dict):
                    raise ValueError("it holds no settings")
                continue
            image = _image(line, classes)
            if image.index in images:
                raise ValueError(f"image {image.index} stands there a second time")
            images[image.index] = image
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"resume: got {path} with line {number} that `bigain classify` did not write ({error}), expected its "
                "results as they were"
            ) from error
    return settings, list(images.values()), whole


class ResultsFile:
    """A JSON-lines file: the settings of the run first, then one `ImageResult` a line. A context manager.

    The file is written from the first result on, so a run that fails before it has one leaves what there was.

    Args:
        path: the file; its folder is made if missing.
        settings: everything that decides the results; JSON values.
        resume: go on with a file that has the same settings. Otherwise an existing file is overwritten.
        classes: number of classes of the model, which results must fit; None takes any.
        before_first: called before the first result of a new file is written: what summarises older ones goes then.

    Raises:
        ValueError: `resume` with a file of other settings, or with lines that no classifier wrote: damaged (but for
            half a line at the end, which a kill leaves), of images that stand there already, or out of range.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        resume: bool = False,
        *,
        classes: int | None = None,
        before_first: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self._before_first = before_first
        self.images: list[ImageResult] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._settings = json.loads(json.dumps(settings))
        self._whole = 0
        self._file: BinaryIO | None = None
        if resume and path.exists():
            found, self.images, self._whole = _read(path, classes)
            now = self._settings
            if self.images and found != now:
                changed = ", ".join(changes(found, now))
                raise ValueError(f"resume: got {path} with other settings ({changed}), expected those of this run")
            if not self.images:
                self._whole = 0

    def _open(self) -> BinaryIO:
        if not self._whole:
            self._before_first()
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
