"""The scores of a pool: scores/part-*.parquet, one file for each shard, and all of them as one stream of rows.

A file has one row for each image, good or bad. Columns: `row` int64, counted from 0 inside the shard · `key` ·
`status` (ok, empty, decode_error, too_large, nonfinite) · `detail`, why it is not ok · `log_odds`, C little-endian
float32 per row, z_c - logsumexp of the other logits, in nats; null unless ok (fixed-size binary: six times faster to
write than a nested list) · `pixel_hash`, 16 bytes of BLAKE2b of the decoded pixels, null where nothing was decoded ·
`descriptor`, the copy descriptor · `match`, `similarity`, `mirrored`: the most similar evaluation image, how similar
(0 to 1), and whether it had to be mirrored; null without an index.

The header tells shard, fingerprint and class names. A distribution is the sigmoid of its log-odds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, names_in
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import TableFormat, header_if_whole, open_table

SCORES = TableFormat(
    "mpl-scores",
    1,
    remedy="delete it and score its shard again",
    plain=frozenset({"log_odds", "pixel_hash", "descriptor"}),
    dictionary=("status", "detail", "match"),
)
GROUP_BYTES = 64 << 20  # of log-odds in one row group, and so in memory at a time
FOOTERS = 16  # read at a time: each is a few requests where it lies in object storage


@dataclass(frozen=True)
class ShardScores:
    """The scores of one shard, as the footer of their file tells of them.

    Attributes:
        path: of the file.
        shard: its name.
        fingerprint: see `score_fingerprint`.
        class_names: of the teacher.
        rows: images.
        first_row: of the first image inside the shard; the others follow one another, or, in a shard of chosen rows,
            with gaps, and then this is None.
    """

    path: Location
    shard: str
    fingerprint: str
    class_names: tuple[str, ...]
    rows: int
    first_row: int | None


def shard_file(folder: Location, shard: str) -> Location:
    """Where the table of a shard lies, in scores/ or rejected/: a name that stays when the pool gets more shards."""
    return folder / f"part-{quote(shard, safe='')}.parquet"


def shard_of_file(name: str) -> str:
    """The shard of a table, from its file's name."""
    return unquote(name.removeprefix("part-").removesuffix(".parquet"))


def score_fingerprint(shard: Shard, fingerprint: str) -> str:
    """The fingerprint of a shard's scores: the shard's content, and the caller's `fingerprint` of the rest."""
    return fingerprint_of(["scores", shard.name, shard.fingerprint(), fingerprint])


def is_scored(shard: Shard, folder: Location, fingerprint: str) -> bool:
    """Whether `folder` holds the whole scores of this shard, content and settings unchanged.

    Raises:
        RunError: the folder cannot be reached.
    """
    header = header_if_whole(shard_file(folder, shard.name), SCORES)
    if header is None or header.notes["shard"] != shard.name:
        return False
    if shard.knows_its_rows and shard.rows() != header.rows:
        return False
    return header.fingerprint == score_fingerprint(shard, fingerprint)


def score_schema(classes: int, descriptor_bytes: int) -> pa.Schema:
    """The columns of scores for so many classes."""
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("detail", pa.string()),
            pa.field("log_odds", pa.binary(4 * classes)),
            pa.field("pixel_hash", pa.binary(16)),
            pa.field("descriptor", pa.binary(descriptor_bytes)),
            pa.field("match", pa.string()),
            pa.field("similarity", pa.float32()),
            pa.field("mirrored", pa.bool_()),
        ]
    )


def group_rows(classes: int) -> int:
    """Rows of one row group."""
    return max(1024, min(1 << 16, GROUP_BYTES // (4 * classes)))


def read_shard_scores(path: Location) -> ShardScores:
    """What the footer tells.

    Raises:
        DataError: the file is missing, cut short, of another format, or its rows do not ascend.
        RunError: it cannot be reached.
    """
    with open_table(path, SCORES) as table:
        header = table.header
        return ShardScores(
            path=path,
            shard=header.notes["shard"],
            fingerprint=header.notes["fingerprint"],
            class_names=header.class_names,
            rows=header.rows,
            first_row=_first_row(path, table.file.metadata),
        )


def _first_row(path: Location, footer: Any) -> int | None:
    """From the footer's statistics: not 0 where a split begins inside a file; None where rows are left out."""
    groups = [group for i in range(footer.num_row_groups) if (group := footer.row_group(i)).num_rows]
    bounds = [(group.column(0).statistics.min, group.column(0).statistics.max, group.num_rows) for group in groups]
    first = expected = bounds[0][0] if bounds else 0
    gaps = False
    for low, high, rows in bounds:
        if low < expected or high < low + rows - 1:
            raise DataError(f"{path}: its rows do not ascend; {SCORES.remedy}")
        gaps |= (low, high) != (expected, expected + rows - 1)
        expected = high + 1
    return None if gaps else int(first)


def read_scores(scores: ShardScores, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a shard in order, in batches that fit in memory.

    Raises:
        DataError: the file is damaged, or another one by now.
        RunError: it cannot be reached.
    """
    with open_table(scores.path, SCORES) as table:
        yield from table.batches(columns, group_rows(len(scores.class_names)))


class ScoredPool:
    """The scores of all shards of a pool, in order. A row's ordinal is its place in the whole pool, from 0.

    Attributes:
        shards: the scores of each.
        offsets: the ordinal of each shard's first row, and after the last one the number of rows.
        rows: images, good or bad.
        class_names: of the teacher.
    """

    def __init__(self, shards: Sequence[ShardScores]):
        self.shards = tuple(shards)
        self.offsets = np.cumsum([0, *(scores.rows for scores in shards)]).astype(np.int64)
        self.rows = int(self.offsets[-1])
        self.class_names = self.shards[0].class_names
        self._first_rows = np.array([scores.first_row or 0 for scores in shards], np.int64)
        self._gaps = np.array([scores.first_row is None for scores in shards])
        self._rows: dict[int, NDArray[np.int64]] = {}  # of shards with gaps, as they are asked for

    def fingerprint(self) -> str:
        """Of all scores, their order included."""
        return fingerprint_of([[scores.shard, scores.fingerprint] for scores in self.shards])

    def stream(
        self, columns: Sequence[str], shard: int | None = None
    ) -> Iterator[tuple[NDArray[np.int64], pa.RecordBatch]]:
        """Ordinals (n,) and these columns of all rows in order, or of one shard's."""
        for number in range(len(self.shards)) if shard is None else [shard]:
            begin = int(self.offsets[number])
            for batch in read_scores(self.shards[number], columns):
                yield np.arange(begin, begin + batch.num_rows), batch
                begin += batch.num_rows

    def place(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The number of the shard, (n,), and the row in it, (n,).

        Raises:
            DataError: the file of a shard with gaps is damaged.
        """
        shard = np.searchsorted(self.offsets, ordinals, side="right") - 1
        places = ordinals - self.offsets[shard]
        rows = self._first_rows[shard] + places
        for number in np.unique(shard[self._gaps[shard]]).tolist():
            mine = shard == number
            rows[mine] = self._rows_of(number)[places[mine]]
        return shard, rows

    def _rows_of(self, number: int) -> NDArray[np.int64]:
        """The rows of a shard's images, in order."""
        if number not in self._rows:
            batches = read_scores(self.shards[number], ["row"])
            self._rows[number] = np.concatenate([batch.column("row").to_numpy() for batch in batches])
        return self._rows[number]


def open_scored(shards: Sequence[Shard], folder: Location, fingerprint: str) -> ScoredPool:
    """The scores of these shards, in their order; `fingerprint` as given to `score_shard`.

    Raises:
        DataError: there is no shard or no row, or scores are missing, or of other settings or classes.
        RunError: the folder cannot be reached.
    """
    if not shards:
        raise DataError("the pool is empty: it has no shard")
    paths = [shard_file(folder, shard.name) for shard in shards]
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
    with ThreadPoolExecutor(FOOTERS) as threads:
        pool = ScoredPool(list(threads.map(read_shard_scores, paths)))
        expected = list(threads.map(lambda shard: score_fingerprint(shard, fingerprint), shards))
    for shard, scores, mark in zip(shards, pool.shards, expected, strict=True):
        if (scores.shard, scores.fingerprint) != (shard.name, mark):
            raise DataError(
                f"{scores.path} was made by another teacher or other settings, or its shard {shard.name} has "
                "changed since; score it again"
            )
        if scores.class_names != pool.class_names:
            raise DataError(f"{scores.path} has other classes than {paths[0]}; score it again")
    if not pool.rows:
        raise DataError(f"the pool is empty: {len(shards):,} shards without a row")
    return pool


def not_scored(shards: Sequence[Shard], folder: Location, fingerprint: str) -> list[Shard]:
    """Those shards whose scores are not in `folder`, or of other content or settings; in their order."""
    with ThreadPoolExecutor(FOOTERS) as threads:
        done = threads.map(lambda shard: is_scored(shard, folder, fingerprint), shards)
        return [shard for shard, scored in zip(shards, done, strict=True) if not scored]


def gone_shards(shards: Sequence[Shard], folder: Location) -> list[str]:
    """Shards that have scores in `folder` but are no longer in the pool."""
    expected = {shard_file(folder, shard.name).name for shard in shards}
    files = {name for name in names_in(folder) if name.startswith("part-")}
    return [shard_of_file(name) for name in sorted(files - expected)]
