"""One pass over a shard of the pool: decode, classify, compare with the evaluation images, write."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.pool.copies.index import CopyIndex, Matches, descriptor
from pipeline.pool.infer import Inferred, Scorer, infer_batches
from pipeline.pool.parts import PartWriter, Rows, part_is_done, part_path, part_schema
from pipeline.storage.files import Location, whole_file
from pipeline.storage.files import fingerprint as fingerprint_of

ADDRESS = re.compile(r" object at 0x[0-9a-fA-F]+")  # in Pillow's messages; it differs from run to run

Progress = Callable[[int], None]
"""Told how many images are done since the last call."""


@dataclass(frozen=True)
class ShardCounts:
    """What became of a shard.

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
class Seen:
    """What is looked up in the pixels of m images: descriptors (m, D), and matches where there is an index."""

    descriptors: NDArray[np.uint8]
    matches: Matches | None


@dataclass(frozen=True, eq=False)
class ScoreWork:
    """Scores shards; sent to workers, called with one shard at a time.

    Attributes:
        scorer: the teacher and how it wants its images.
        folder: the run's scores/.
        fingerprint: of all else that the scores depend on: the teacher, preprocessing, precision, and the
            evaluation images.
        copies: the evaluation images, or None where overlap is not looked for.
    """

    scorer: Scorer
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


def score_fingerprint(shard: Shard, fingerprint: str) -> str:
    """The fingerprint of a shard's scores: the shard's content, and the caller's `fingerprint` of the rest."""
    return fingerprint_of(["scores", shard.name, shard.fingerprint(), fingerprint])


def is_scored(shard: Shard, folder: Location, fingerprint: str) -> bool:
    """Whether `folder` holds the whole scores of this shard, content and settings unchanged."""
    rows = shard.rows() if shard.knows_its_rows else None
    return part_is_done(part_path(folder, shard.name), shard.name, score_fingerprint(shard, fingerprint), rows)


def score_shard(
    shard: Shard,
    scorer: Scorer,
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
    schema = part_schema(shard.name, mark, scorer.class_names, descriptor_bytes())
    status: Counter[str] = Counter()
    network = 0.0

    def look(pixels: NDArray[np.uint8]) -> Seen:
        return Seen(descriptor(pixels), copies.find(pixels) if copies else None)

    with whole_file(part_path(folder, shard.name)) as temporary:
        with PartWriter(temporary, schema) as writer:
            for batch in infer_batches(shard.read(), scorer, look):
                rows = score_rows(batch, copies)
                writer.add(rows)
                status.update(rows.status)
                network += batch.seconds
                if progress is not None:
                    progress(len(rows.row))
        if score_fingerprint(shard, fingerprint) != mark:
            raise DataError(f"shard {shard.name} changed while it was being scored; run the same command again")
    seconds = time.perf_counter() - began
    return ShardCounts(
        shard.name, sum(status.values()), dict(status), seconds, max(0.0, seconds - network / scorer.lanes)
    )


def score_rows(batch: Inferred[Seen], copies: CopyIndex | None) -> Rows:
    """The rows of one batch."""
    decoded, good = batch.decoded, batch.decoded.good
    status = list(decoded.status)
    detail = [text and ADDRESS.sub("", text) for text in decoded.detail]
    for place in good[np.isnan(batch.log_odds[:, 0])].tolist():
        status[place], detail[place] = "nonfinite", "the teacher's logits are not finite"
    matches = batch.more.matches if batch.more is not None else None
    return Rows(
        row=np.array([sample.row for sample in decoded.samples], np.int64),
        key=[sample.key for sample in decoded.samples],
        status=status,
        detail=detail,
        good=good,
        log_odds=batch.log_odds,
        pixel_hash=decoded.hashes,
        descriptor=batch.more.descriptors if batch.more is not None else np.empty((0, descriptor_bytes()), np.uint8),
        match=None if matches is None or copies is None else [copies.names[i] for i in matches.index.tolist()],
        similarity=None if matches is None else matches.similarity,
        mirrored=None if matches is None else matches.mirrored,
    )


def descriptor_bytes() -> int:
    """Bytes of one copy descriptor."""
    return int(descriptor(np.zeros((1, 8, 8, 3), np.uint8)).shape[1])
