"""One pass over a shard of the pool: decode, classify, compare with the evaluation images, write."""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.pool.copies.index import CopyIndex, Matches, descriptor
from pipeline.pool.infer import Inferred, Source, infer_batches
from pipeline.pool.scores import SCORES, group_rows, is_scored, score_fingerprint, score_schema, shard_file
from pipeline.storage.files import Location, whole_file
from pipeline.storage.tables import fixed_binary, table_writer

ADDRESS = re.compile(r" object at 0x[0-9a-fA-F]+")  # in Pillow's messages; it differs from run to run

Progress = Callable[[int], None]
"""Told how many images are done since the last call."""


@dataclass(frozen=True)
class ShardCounts:
    """What a pass over a shard came to.

    Attributes:
        shard: its name.
        rows: images in it, good or bad.
        status: how many of each status.
        seconds: taken in all.
        waiting: of these, those in which the network waited for images to be read, decoded, compared, written.
    """

    shard: str
    rows: int
    status: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True, eq=False)
class Compared:
    """What is looked up in the pixels of m images: descriptors (m, D), and matches where there is an index."""

    descriptors: NDArray[np.uint8]
    matches: Matches | None


@dataclass(frozen=True, eq=False)
class ScoreWork:
    """Scores shards; sent to workers, called with one shard at a time.

    Attributes:
        scorer: the teacher, or its stored answers.
        folder: the run's scores/.
        fingerprint: of all else that the scores depend on: the teacher, preprocessing, precision, and the
            evaluation images.
        copies: the evaluation images, or None where overlap is not looked for.
    """

    scorer: Source
    folder: Location
    fingerprint: str
    copies: CopyIndex | None = None

    def placed(self, worker: int, threads: int) -> "ScoreWork":
        """For one of several workers."""
        return replace(self, scorer=self.scorer.placed(worker, threads))

    def __call__(self, shard: Shard, progress: Progress) -> ShardCounts:
        if is_scored(shard, self.folder, self.fingerprint):  # by a worker that died before it could say so
            return ShardCounts(shard.name, 0)
        return score_shard(
            shard, self.scorer, self.folder, fingerprint=self.fingerprint, copies=self.copies, progress=progress
        )


def score_shard(
    shard: Shard,
    scorer: Source,
    folder: Location,
    *,
    fingerprint: str,
    copies: CopyIndex | None = None,
    progress: Progress | None = None,
) -> ShardCounts:
    """Score every image of a shard and write scores/part-SHARD.parquet, whole or not at all.

    A bad image gets a row with its status; nothing is left out. The file depends on the arguments alone:
    batches begin at the shard's first row, whoever does the work. For the rest see `ScoreWork`.

    Args:
        progress: told after each batch.

    Raises:
        DataError: the shard is cut short or malformed, changed while it was read, or the teacher has
            another number of classes.
        RunError: the file cannot be written.
    """
    began = time.perf_counter()
    mark = score_fingerprint(shard, fingerprint)
    status: Counter[str] = Counter()
    network = 0.0

    def compare(pixels: NDArray[np.uint8]) -> Compared:
        return Compared(descriptor(pixels), copies.find(pixels) if copies else None)

    with whole_file(shard_file(folder, shard.name)) as temporary:
        with ScoreWriter(temporary, shard.name, mark, scorer.class_names) as writer:
            for batch in infer_batches(scorer.samples(shard), scorer, compare):
                rows = score_rows(batch, copies, writer.schema, scorer.missing)
                writer.add(rows)
                status.update(rows.column("status").to_pylist())
                network += batch.seconds
                if progress is not None:
                    progress(rows.num_rows)
        if score_fingerprint(shard, fingerprint) != mark:
            raise DataError(f"shard {shard.name} changed while it was being scored; run the same command again")
    seconds = time.perf_counter() - began
    return ShardCounts(
        shard.name, sum(status.values()), dict(status), seconds, max(0.0, seconds - network / scorer.lanes)
    )


def score_rows(
    batch: Inferred[Compared], copies: CopyIndex | None, schema: pa.Schema, missing: tuple[str, str]
) -> pa.RecordBatch:
    """The rows of one batch of n images, of which m decoded; `missing` as of a `Source`."""
    samples, good = batch.decoded.samples, batch.decoded.good
    status = list(batch.decoded.status)
    detail = [text and ADDRESS.sub("", text) for text in batch.decoded.detail]
    for place in good[np.isnan(batch.log_odds[:, 0])].tolist():
        status[place], detail[place] = missing
    source = np.full(len(samples), -1, np.int64)  # (n,) of each image among the m
    source[good] = np.arange(len(good))
    compared = batch.more or Compared(np.empty((0, descriptor_bytes()), np.uint8), None)
    matches, names = compared.matches, [] if copies is None else copies.names

    def of_decoded(column: str, values: Sequence[Any] | NDArray[Any] | None) -> pa.Array:
        """(m,) values as a column of n, null where nothing decoded."""
        kind = schema.field(column).type
        if values is None:
            return pa.nulls(len(samples), kind)
        return pa.array(values, kind).take(pa.array(source, mask=source < 0))

    columns = {
        "row": pa.array([sample.row for sample in samples], pa.int64()),
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "status": pa.array(status, pa.string()),
        "detail": pa.array(detail, pa.string()),
        "log_odds": fixed_binary(_scatter(batch.log_odds, source), np.array(status) == "ok"),
        "pixel_hash": fixed_binary(_scatter(batch.decoded.hashes, source), source >= 0),
        "descriptor": fixed_binary(_scatter(compared.descriptors, source), source >= 0),
        "match": of_decoded("match", None if matches is None else [names[i] for i in matches.index.tolist()]),
        "similarity": of_decoded("similarity", None if matches is None else matches.similarity),
        "mirrored": of_decoded("mirrored", None if matches is None else matches.mirrored),
    }
    return pa.record_batch([columns[field.name] for field in schema], schema=schema)


def _scatter(values: NDArray[Any], source: NDArray[np.int64]) -> NDArray[Any]:
    """(m, D) values as (n, D), zero where `source` is -1."""
    if len(values) == len(source):
        return values
    spread = np.zeros((len(source), values.shape[1]), values.dtype)
    spread[source >= 0] = values
    return spread


def descriptor_bytes() -> int:
    """Bytes of one copy descriptor."""
    return int(descriptor(np.zeros((1, 8, 8, 3), np.uint8)).shape[1])


class ScoreWriter:
    """Writes the scores of a shard in row groups of a fixed size, whatever the size of the batches that come in.

    Args:
        path: on disk, from `whole_file`.
        shard: its name.
        fingerprint: see `score_fingerprint`.
        class_names: of the teacher.
    """

    def __init__(self, path: Path, shard: str, fingerprint: str, class_names: Sequence[str]) -> None:
        self.schema, self.group = score_schema(len(class_names), descriptor_bytes()), group_rows(len(class_names))
        self._waiting: list[pa.RecordBatch] = []
        self._count = 0
        notes = {"shard": shard, "fingerprint": fingerprint, "class_names": list(class_names)}
        self._writer = table_writer(path, SCORES, self.schema, notes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush(everything=True)
        self._writer.close()

    def add(self, rows: pa.RecordBatch) -> None:
        """Append rows; order is kept."""
        self._waiting.append(rows)
        self._count += rows.num_rows
        self._flush(everything=False)

    def _flush(self, everything: bool) -> None:
        if not self._waiting or (self._count < self.group and not everything):
            return
        table = pa.Table.from_batches(self._waiting, self.schema)
        whole = self._count if everything else self._count // self.group * self.group
        self._writer.write_table(table.slice(0, whole), row_group_size=self.group)
        rest = table.slice(whole)
        self._waiting, self._count = rest.to_batches(), rest.num_rows
