"""One pass over a shard of the pool: decode, classify, compare with the evaluation images, write."""

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.files import fingerprint as fingerprint_of
from pipeline.files import whole_file
from pipeline.pool.copies import CopyIndex, Matches, descriptor
from pipeline.pool.infer import Decoded, Scorer, decoded_batches
from pipeline.pool.parts import PartWriter, Rows, part_is_done, part_path, part_schema

ADDRESS = re.compile(r" object at 0x[0-9a-fA-F]+")  # in Pillow's messages; it differs from run to run


class Progress(Protocol):
    """Told how many images are done since the last call."""

    def __call__(self, images: int) -> None: ...


@dataclass(frozen=True)
class ShardCounts:
    """What became of a shard.

    Attributes:
        shard: its name.
        rows: images in it, good or bad.
        status: how many of each status.
        seconds: taken in all.
        waiting: of these, spent waiting for decoded images.
    """

    shard: str
    rows: int
    status: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    waiting: float = 0.0


def score_fingerprint(shard: Shard, fingerprint: str) -> str:
    """The fingerprint of a shard's scores: the shard's content, and the caller's `fingerprint` of the rest."""
    return fingerprint_of(["scores", shard.name, shard.fingerprint(), fingerprint])


def is_scored(shard: Shard, folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds the whole scores of this shard, content and settings unchanged."""
    return part_is_done(part_path(folder, shard.name), shard.name, score_fingerprint(shard, fingerprint))


def score_shard(
    shard: Shard,
    scorer: Scorer,
    folder: Path,
    *,
    fingerprint: str,
    copies: CopyIndex | None = None,
    progress: Progress | None = None,
) -> ShardCounts:
    """Score every image of a shard and write scores/part-SHARD.parquet, whole or not at all.

    A bad image gets a row with its status; nothing is left out. The file depends on the arguments alone:
    batches begin at the shard's first row, whoever does the work.

    Args:
        shard: the images.
        scorer: the teacher and how it wants its images.
        folder: the run's scores/.
        fingerprint: of all else that the scores depend on: the teacher, preprocessing, precision, and
            the evaluation images.
        copies: the evaluation images, or None where overlap is not looked for.
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
    waiting = 0.0
    scorer.model.eval()
    with whole_file(part_path(folder, shard.name)) as temporary:
        with PartWriter(temporary, schema) as writer:
            batches = decoded_batches(shard.read(), scorer.size, scorer.batch, scorer.workers)
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                waiting += time.perf_counter() - asked
                if batch is None:
                    break
                rows = score_batch(batch, scorer, copies)
                writer.add(rows)
                status.update(rows.status)
                if progress is not None:
                    progress(len(rows.row))
        if score_fingerprint(shard, fingerprint) != mark:
            raise DataError(f"shard {shard.name} changed while it was being scored; run the same command again")
    seconds = time.perf_counter() - began
    return ShardCounts(shard.name, sum(status.values()), dict(status), seconds, waiting)


def score_batch(batch: Decoded, scorer: Scorer, copies: CopyIndex | None) -> Rows:
    """The rows of one decoded batch."""
    total = len(batch.samples)
    status = list(batch.status)
    detail = [text and ADDRESS.sub("", text) for text in batch.detail]
    log_odds = np.full((total, len(scorer.class_names)), np.nan, np.float32)
    pixel_hash: list[bytes | None] = [None] * total
    described: list[bytes | None] = [None] * total
    match: list[str | None] = [None] * total
    similarity: list[float | None] = [None] * total
    mirrored: list[bool | None] = [None] * total
    if batch.good.size:
        log_odds[batch.good] = scorer.log_odds(batch.pixels)
        found = copies.find(batch.pixels) if copies else None
        descriptors = descriptor(batch.pixels)
        for at, place in enumerate(batch.good):
            pixel_hash[place] = batch.hashes[at]
            described[place] = descriptors[at].tobytes()
            if np.isnan(log_odds[place, 0]):
                status[place], detail[place] = "nonfinite", "the teacher's logits are not finite"
            if found is not None and copies is not None:
                match[place] = copies.names[found.index[at]]
                similarity[place] = float(found.similarity[at])
                mirrored[place] = bool(found.mirrored[at])
    return Rows(
        row=np.array([sample.row for sample in batch.samples], np.int64),
        key=[sample.key for sample in batch.samples],
        status=status,
        detail=detail,
        log_odds=log_odds,
        pixel_hash=pixel_hash,
        descriptor=described,
        match=match,
        similarity=similarity,
        mirrored=mirrored,
    )


def descriptor_bytes() -> int:
    """Bytes of one copy descriptor."""
    return int(descriptor(np.zeros((1, 8, 8, 3), np.uint8)).shape[1])


__all__ = ["Matches", "Progress", "ShardCounts", "is_scored", "score_fingerprint", "score_shard"]
