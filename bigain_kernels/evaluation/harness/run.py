"""A run over a data set: shards of images, claimed by file, by any number of processes at any time.

A process takes the next shard that has no rows and that no other holds, and writes its rows at once when it is done. So
a process that dies costs the shard that it was at, and who comes later, or is still there, does it again. A shard goes
through the model in the same batches whoever does it, and its rows are the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout

from ..images import DamagedImage
from ..output import write_text
from .deciding import changes
from .engine import Answer, Engine
from .rows import write_rows

# Seconds between looks at the shards that others are at.
_PATIENCE = 0.2
_SETTINGS, _DAMAGED = "settings.json", "damaged"


class Images(Protocol):
    """A data set, in an order that does not change.

    Attributes:
        paths: of each image, what it goes by: relative to the data set, with "/".
        labels: of each image its true classes.
    """

    paths: Sequence[str]
    labels: Sequence[tuple[int, ...]]

    def read(self, i: int) -> torch.Tensor:
        """Image i, (C, H, W) float32 in the space of pixels, [-1, 1].

        Raises:
            DamagedImage: it cannot be read.
        """
        ...


def key_of(path: str) -> int:
    """What the noise of an image is drawn for: a number from its path, whatever else is in the data set."""
    return int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:15], 16)


class RunFolder:
    """A run on disk: `settings.json`, `rows/*.parquet`, `damaged/*.json`, and locks while somebody is at work.

    Args:
        path: the folder; made if missing.
        settings: everything that decides the numbers; JSON values.
        shards: how many the work is cut into.
        name: of the file that a finished shard leaves, from its number.

    Raises:
        ValueError: the folder holds a run with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], shards: int, name: str = "rows/{:06d}.parquet") -> None:
        self.path, self.shards, self._name = path, shards, name
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        path.mkdir(parents=True, exist_ok=True)
        file = path / _SETTINGS
        if file.exists():
            try:
                there = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"resume: got {file} that cannot be read ({error}), expected settings") from error
            if there != self.settings:
                raise ValueError(
                    f"resume: got {path} with other settings ({', '.join(changes(there, self.settings))}), expected "
                    "those of this run"
                )
        else:
            write_text(file, json.dumps(self.settings, indent=2) + "\n")

    def rows_of(self, shard: int) -> Path:
        """The file that a shard leaves, whole, when it is finished."""
        return self.path / self._name.format(shard)

    def mark(self, shard: int) -> None:
        """Say that a shard is finished which leaves other files than rows."""
        write_text(self.rows_of(shard), "")

    def done(self) -> int:
        """Shards that are finished."""
        return sum(self.rows_of(shard).exists() for shard in range(self.shards))

    @contextmanager
    def _held(self, shard: int) -> Iterator[bool]:
        """Whether the shard is ours inside. The lock is the operating system's and goes with the process."""
        lock = FileLock(self.path / "claims" / f"{shard:06d}", timeout=0)
        (self.path / "claims").mkdir(exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield not self.rows_of(shard).exists()
        finally:
            lock.release()

    def claims(self, rank: int = 0) -> Iterator[int]:
        """Shards to do, each held until the next is asked for, until all are done by whomever.

        Args:
            rank: where to begin; processes that begin apart meet late.
        """
        left = [(rank + shard) % self.shards for shard in range(self.shards)]
        while left:
            worked, others = False, []
            for shard in left:
                if self.rows_of(shard).exists():
                    continue
                with self._held(shard) as ours:
                    if ours:
                        worked = True
                        yield shard
                if not self.rows_of(shard).exists():
                    others.append(shard)
            left = others
            if left and not worked:
                time.sleep(_PATIENCE)

    def write_damaged(self, shard: int, damaged: Sequence[DamagedImage]) -> None:
        text = json.dumps([{"path": str(each.path), "reason": each.reason} for each in damaged])
        write_text(self.path / _DAMAGED / f"{shard:06d}.json", text + "\n")

    def damaged(self) -> list[tuple[str, str]]:
        """Path and reason of every image that was left out."""
        found = []
        for file in sorted((self.path / _DAMAGED).glob("[!.]*.json")):
            found += [(each["path"], each["reason"]) for each in json.loads(file.read_text(encoding="utf-8"))]
        return found


def shard_slices(images: int, size: int) -> list[slice]:
    """The images of each shard."""
    return [slice(first, min(first + size, images)) for first in range(0, images, size)]


def run_shards(
    folder: RunFolder,
    images: Images,
    engine: Engine,
    encode: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    *,
    rank: int = 0,
    record: Callable[[int, int], None] = lambda done, seconds: None,
) -> None:
    """Do all shards that are left.

    Args:
        folder: of the run, with as many shards as there are.
        images: the data set.
        engine: entered already.
        encode: pixels (n, C, H, W) to what the model denoises, on its device.
        size: images of a shard.
        rank: of this process.
        record: called with the images of each shard that this process finished, and the rows that they took.
    """
    slices = shard_slices(len(images.paths), size)
    for shard in folder.claims(rank):
        chosen, pixels, damaged = [], [], []
        for i in range(slices[shard].start, slices[shard].stop):
            try:
                pixels.append(images.read(i))
                chosen.append(i)
            except DamagedImage as error:
                damaged.append(error)
        answers: list[Answer] = []
        if chosen:
            engine.ask(encode(torch.stack(pixels)), [key_of(images.paths[i]) for i in chosen], answers.append)
        if damaged:
            folder.write_damaged(shard, damaged)
        of = [(images.paths[i], tuple(images.labels[i])) for i in chosen]
        write_rows(folder.rows_of(shard), folder.settings, engine.classes, of, answers)
        record(slices[shard].stop - slices[shard].start, int(np.sum([answer.values[0].size for answer in answers])))
