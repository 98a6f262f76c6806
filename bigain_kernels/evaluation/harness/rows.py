"""Denoising errors on disk: Parquet files, one for each shard of the images, that are written whole and never changed.

A row is one class of one image at one noise sample. Every file carries all that decides its numbers, so files of two
runs can be put together, or are refused with what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..output import replacing
from .deciding import changes, digest
from .engine import Answer
from .errors import METRICS, ImageErrors

_SETTINGS = b"bigain"


def _schema(settings: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    fields = [
        ("path", pa.dictionary(pa.int32(), pa.string())),
        ("labels", pa.list_(pa.int32())),
        ("class", pa.int32()),
        ("timestep", pa.int32()),
        ("sample", pa.int32()),
        *((name, pa.float32()) for name in METRICS),
        ("seconds", pa.float32()),
        ("decided_by", pa.dictionary(pa.int8(), pa.string())),
    ]
    return pa.schema(fields, metadata={_SETTINGS: json.dumps(settings, sort_keys=True).encode()})


def write_rows(
    path: Path,
    settings: Mapping[str, Any],
    classes: np.ndarray,
    images: Sequence[tuple[str, tuple[int, ...]]],
    answers: Iterable[Answer],
) -> None:
    """Write one shard.

    Args:
        path: the file; a process that is killed leaves it as it was.
        settings: everything that decides the numbers; JSON values.
        classes: (K,) label of each place of the answers.
        images: path and labels of each image of the answers.
        answers: of an `Engine`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "class", "timestep", "sample", "seconds")}
    values: list[np.ndarray] = []
    for answer in answers:
        s, k = answer.values.shape[1:]
        columns["image"].append(np.full(s * k, answer.image, dtype=np.int32))
        columns["class"].append(np.tile(classes[answer.places], s))
        columns["timestep"].append(np.repeat(answer.timesteps, k))
        columns["sample"].append(np.repeat(np.arange(answer.first, answer.first + s), k))
        columns["seconds"].append(np.repeat(answer.seconds, k))
        values.append(answer.values.reshape(len(METRICS), s * k))
    none = [np.zeros(0, dtype=np.int32)]
    of = {name: np.concatenate(parts or none) for name, parts in columns.items()}
    errors = np.concatenate(values or [np.zeros((len(METRICS), 0), dtype=np.float32)], axis=1)
    count = len(of["image"])
    labels = [np.asarray(found, dtype=np.int32) for _, found in images]
    sizes = np.asarray([len(found) for found in labels], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes[of["image"]])]).astype(np.int32)
    flat = np.concatenate([labels[i] for i in of["image"]]) if count else np.zeros(0, dtype=np.int32)
    schema = _schema(settings)
    table = pa.Table.from_arrays(
        [
            pa.DictionaryArray.from_arrays(pa.array(of["image"], pa.int32()), [name for name, _ in images]),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            *(pa.array(of[name], pa.int32()) for name in ("class", "timestep", "sample")),
            *(pa.array(row, pa.float32()) for row in errors),
            pa.array(of["seconds"], pa.float32()),
            pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int8)), [digest(settings)]),
        ],
        schema=schema,
    )
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_settings(path: Path) -> dict[str, Any]:
    """What decided the numbers of a shard.

    Raises:
        ValueError: the file is none that `write_rows` wrote.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads((pq.read_schema(path).metadata or {})[_SETTINGS])
    except (pa.ArrowInvalid, KeyError, ValueError, OSError) as error:
        raise ValueError(f"rows: got {path}, expected a shard that bigain wrote ({error})") from error


def read_rows(path: Path) -> Iterator[tuple[str, tuple[int, ...], ImageErrors, float]]:
    """Path, labels, errors and seconds of each image of a shard."""
    import pyarrow.parquet as pq

    classes = np.asarray(read_settings(path)["classes"], dtype=np.int64)
    place_of = {int(c): place for place, c in enumerate(classes)}
    table = pq.read_table(path)
    paths = table["path"].combine_chunks()
    names, image = paths.dictionary.to_pylist(), paths.indices.to_numpy()
    number = {name: table[name].to_numpy() for name in ("class", "timestep", "sample", "seconds", *METRICS)}
    order = np.argsort(image, kind="stable")
    bounds = np.searchsorted(image[order], np.arange(len(names) + 1))
    for i, name in enumerate(names):
        rows = order[bounds[i] : bounds[i + 1]]
        if not len(rows):
            continue
        sample = number["sample"][rows]
        values = np.full((len(METRICS), int(sample.max()) + 1, len(classes)), np.nan, dtype=np.float32)
        places = np.asarray([place_of[int(c)] for c in number["class"][rows]])
        values[:, sample, places] = np.stack([number[metric][rows] for metric in METRICS])
        timesteps = np.zeros(values.shape[1], dtype=np.int64)
        timesteps[sample] = number["timestep"][rows]
        labels = tuple(table["labels"][int(rows[0])].as_py())
        yield name, labels, ImageErrors(classes, timesteps, values), float(number["seconds"][rows].sum())


def shards_of(folders: Sequence[Path]) -> list[Path]:
    """The shards of some runs, all decided by the same.

    Raises:
        ValueError: settings differ; the message says what in.
    """
    # A process that was killed while it wrote leaves a hidden file.
    found = sorted(path for folder in folders for path in folder.glob("rows/[!.]*.parquet"))
    if not found:
        raise ValueError(f"rows: got {', '.join(map(str, folders))} without any, expected folders of runs")
    first = read_settings(found[0])
    for path in found[1:]:
        now = read_settings(path)
        if now != first:
            raise ValueError(
                f"rows: got {path} with other settings than {found[0]} ({', '.join(changes(first, now))}), expected "
                "runs that differ in their images alone"
            )
    return found


def read_all(folders: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...], ImageErrors, float]]:
    """The images of some runs, each once; of an image that several have, what the first of them says.

    Raises:
        ValueError: settings differ, or two runs say different things about one image.
    """
    seen: dict[str, np.ndarray] = {}
    several = len(folders) > 1
    for path in shards_of(folders):
        for name, labels, errors, seconds in read_rows(path):
            if several:
                # Batches of other images round differently; anything more is another number.
                if name in seen:
                    ours = errors.values[0, 0]
                    if not np.allclose(seen[name], ours, rtol=1e-2, atol=1e-5, equal_nan=True):
                        raise ValueError(f"rows: got {name} in {path} with other errors than before, expected the same")
                    continue
                seen[name] = errors.values[0, 0].copy()
            yield name, labels, errors, seconds
