"""A pool whose shards are all scored: its parts in order, as one stream of rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.pool.parts import PartInfo, part_path, part_shard, read_info, read_part
from pipeline.pool.score import is_scored, score_fingerprint
from pipeline.storage.files import Location, names_in
from pipeline.storage.files import fingerprint as fingerprint_of

LOOKING = 16  # footers read at a time: each is a few requests where they lie in object storage


class ScoredPool:
    """The parts of a pool in order. A row's ordinal is its place in the whole pool, from 0.

    Attributes:
        parts: one per shard.
        offsets: the ordinal of each part's first row, and after the last one the number of rows.
        rows: images, good or bad.
        class_names: of the teacher.
    """

    def __init__(self, parts: Sequence[PartInfo]):
        self.parts = tuple(parts)
        self.offsets = np.cumsum([0, *(part.rows for part in parts)]).astype(np.int64)
        self.rows = int(self.offsets[-1])
        self.class_names = self.parts[0].class_names
        self._first_rows = np.array([part.first_row for part in parts], np.int64)

    def fingerprint(self) -> str:
        """Of all scores, their order included."""
        return fingerprint_of([[part.shard, part.fingerprint] for part in self.parts])

    def stream(
        self, columns: Sequence[str], part: int | None = None
    ) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
        """Ordinals (n,) and these columns of all rows in order, or of one part's."""
        for at in range(len(self.parts)) if part is None else [part]:
            begin = int(self.offsets[at])
            for batch in read_part(self.parts[at], columns):
                yield np.arange(begin, begin + batch.num_rows), batch
                begin += batch.num_rows

    def place(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which part, (n,), and which row of its shard, (n,). Rows of a shard follow one another."""
        part = np.searchsorted(self.offsets, ordinals, side="right") - 1
        return part, self._first_rows[part] + ordinals - self.offsets[part]


def open_scored(shards: Sequence[Shard], folder: Location, fingerprint: str) -> ScoredPool:
    """The scores of these shards, in their order; `fingerprint` as given to `score_shard`.

    Raises:
        DataError: there is no shard or no row, or scores are missing, or of other settings or classes.
    """
    if not shards:
        raise DataError("the pool is empty: it has no shard")
    paths = [part_path(folder, shard.name) for shard in shards]
    if len(set(paths)) < len(paths):
        twice = Counter(shard.name for shard in shards).most_common(1)[0][0]
        raise DataError(f"the pool has two shards named {twice!r}; an image's identity is shard and row")
    present = names_in(folder)
    missing = [shard.name for shard, path in zip(shards, paths, strict=True) if path.name not in present]
    if missing:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise DataError(
            f"selecting needs the scores of {len(shards):,} shards, {len(missing):,} are missing in {folder} ({named})"
        )
    with ThreadPoolExecutor(LOOKING) as pool:
        parts = list(pool.map(read_info, paths))
        marks = list(pool.map(lambda shard: score_fingerprint(shard, fingerprint), shards))
    for shard, part, mark in zip(shards, parts, marks, strict=True):
        if (part.shard, part.fingerprint) != (shard.name, mark):
            raise DataError(
                f"{part.path} was made by another teacher or other settings, or its shard {shard.name} has "
                "changed since; score it again"
            )
        if part.class_names != parts[0].class_names:
            raise DataError(f"{part.path} has other classes than {parts[0].path}; score it again")
    scored = ScoredPool(parts)
    if not scored.rows:
        raise DataError(f"the pool is empty: {len(shards):,} shards without a row")
    return scored


def not_scored(shards: Sequence[Shard], folder: Location, fingerprint: str) -> list[Shard]:
    """Those shards whose scores are not in `folder`, or of other content or settings; in their order."""
    with ThreadPoolExecutor(LOOKING) as pool:
        done = pool.map(lambda shard: is_scored(shard, folder, fingerprint), shards)
        return [shard for shard, known in zip(shards, done, strict=True) if not known]


def gone_shards(shards: Sequence[Shard], folder: Location) -> list[str]:
    """Shards that have scores in `folder` but are no longer in the pool."""
    expected = {part_path(folder, shard.name).name for shard in shards}
    found = {name for name in names_in(folder) if name.startswith("part-")}
    return [part_shard(name) for name in sorted(found - expected)]
