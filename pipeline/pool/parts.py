"""The format of scores/part-*.parquet: one file per shard of the pool, one row per image, good or bad.

Columns: `row` int64, counted from 0 inside the shard · `key` · `status` (ok, empty, decode_error,
too_large, nonfinite) · `detail`, why it is not ok · `log_odds`, C little-endian float32 per row,
z_c - logsumexp of the other logits, in nats; null unless ok (fixed-size binary: six times faster to
write than a nested list) · `pixel_hash`, 16 bytes of BLAKE2b of the decoded pixels, null where nothing
was decoded · `descriptor`, the copy descriptor · `match`, `similarity`, `mirrored`: the most similar
evaluation image, how similar (0 to 1), and whether it had to be mirrored; null without an index.

The schema's metadata tells version, fingerprint, shard and class names. A distribution is the sigmoid
of its log-odds.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.storage.files import Location
from pipeline.storage.tables import fixed_binary, open_parquet, require_absence

FORMAT, VERSION = "mpl-scores", "1"
GROUP_BYTES = 64 << 20  # of log-odds in one row group, and so in memory at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a part, in order; n rows, C classes.

    Attributes:
        row: places inside the shard, (n,), int64.
        key, status, detail: texts; detail is None where there is nothing to say.
        good: places, among the n, of the m images that decoded; the fields below are theirs.
        log_odds: (m, C), float32, nats; NaN where the status is not ok.
        pixel_hash: (m, 16), uint8.
        descriptor: (m, D), uint8.
        match, similarity, mirrored: the best evaluation image of each; None without an index.
    """

    row: NDArray[np.int64]
    key: Sequence[str]
    status: Sequence[str]
    detail: Sequence[str | None]
    good: NDArray[np.intp]
    log_odds: NDArray[np.float32]
    pixel_hash: NDArray[np.uint8]
    descriptor: NDArray[np.uint8]
    match: Sequence[str] | None
    similarity: NDArray[np.float32] | None
    mirrored: NDArray[np.bool_] | None


@dataclass(frozen=True)
class PartInfo:
    """What the footer of a part tells. `first_row`: the row of its first image; the others follow one another."""

    path: Location
    shard: str
    fingerprint: str
    class_names: tuple[str, ...]
    rows: int
    first_row: int


def part_path(folder: Location, shard: str) -> Location:
    """Where the scores of a shard lie: a name that stays when the pool gets more shards."""
    return folder / f"part-{quote(shard, safe='')}.parquet"


def part_shard(name: str) -> str:
    """The shard of a part, from its file's name."""
    return unquote(name.removeprefix("part-").removesuffix(".parquet"))


def part_schema(shard: str, fingerprint: str, class_names: Sequence[str], descriptor_bytes: int) -> pa.Schema:
    """The schema of a part, with its metadata."""
    metadata = {
        "mpl.format": FORMAT,
        "mpl.version": VERSION,
        "mpl.shard": shard,
        "mpl.fingerprint": fingerprint,
        "mpl.class_names": json.dumps(list(class_names), ensure_ascii=False),
    }
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("status", pa.string(), nullable=False),
            pa.field("detail", pa.string()),
            pa.field("log_odds", pa.binary(4 * len(class_names))),
            pa.field("pixel_hash", pa.binary(16)),
            pa.field("descriptor", pa.binary(descriptor_bytes)),
            pa.field("match", pa.string()),
            pa.field("similarity", pa.float32()),
            pa.field("mirrored", pa.bool_()),
        ],
        metadata=metadata,
    )


class PartWriter:
    """Writes a part in row groups of a fixed size, whatever the size of the batches that come in."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema, self.group = schema, group_rows(schema.field("log_odds").type.byte_width)
        self._held: list[pa.RecordBatch] = []
        self._count = 0
        plain = {"log_odds", "pixel_hash", "descriptor"}
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression={name: "none" if name in plain else "zstd" for name in schema.names},
            compression_level={name: 1 for name in schema.names if name not in plain},
            use_dictionary=["status", "detail", "match"],
            write_page_checksum=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush(everything=True)
        self._writer.close()

    def add(self, rows: Rows) -> None:
        """Append rows; order is kept."""
        self._held.append(record_batch(rows, self.schema))
        self._count += len(rows.row)
        self._flush(everything=False)

    def _flush(self, everything: bool) -> None:
        if not self._held or (self._count < self.group and not everything):
            return
        table = pa.Table.from_batches(self._held, self.schema)
        whole = self._count if everything else self._count // self.group * self.group
        self._writer.write_table(table.slice(0, whole), row_group_size=self.group)
        rest = table.slice(whole)
        self._held, self._count = rest.to_batches(), rest.num_rows


def group_rows(row_bytes: int) -> int:
    """Rows of one row group."""
    return max(1024, min(1 << 16, GROUP_BYTES // row_bytes))


def record_batch(rows: Rows, schema: pa.Schema) -> pa.RecordBatch:
    """`rows` as Arrow arrays of the schema's types."""
    n, good = len(rows.row), rows.good
    place = np.full(n, -1, np.int64)
    place[good] = np.arange(len(good))
    at = pa.array(place, mask=place < 0)  # null where nothing decoded

    def spread(column: str, values: Any) -> pa.Array:
        kind = schema.field(column).type
        return pa.nulls(n, kind) if values is None else pa.array(values, kind).take(at)

    ok = np.zeros(n, bool)
    ok[good] = ~np.isnan(rows.log_odds[:, 0])
    columns = {
        "row": pa.array(rows.row),
        "key": pa.array(rows.key, pa.string()),
        "status": pa.array(rows.status, pa.string()),
        "detail": pa.array(rows.detail, pa.string()),
        "log_odds": fixed_binary(_scatter(rows.log_odds, good, n), ok),
        "pixel_hash": fixed_binary(_scatter(rows.pixel_hash, good, n), place >= 0),
        "descriptor": fixed_binary(_scatter(rows.descriptor, good, n), place >= 0),
        "match": spread("match", rows.match),
        "similarity": spread("similarity", rows.similarity),
        "mirrored": spread("mirrored", rows.mirrored),
    }
    return pa.record_batch([columns[field.name] for field in schema], schema=schema)


def _scatter(values: NDArray[Any], places: NDArray[np.intp], n: int) -> NDArray[Any]:
    """(m, D) values at `places` of n rows, zero elsewhere."""
    if len(places) == n:
        return values
    spread = np.zeros((n, values.shape[1]), values.dtype)
    spread[places] = values
    return spread


def read_info(path: Location) -> PartInfo:
    """The footer of a part.

    Raises:
        DataError: the file is missing, cut short, or not a part of this version.
        RunError: it cannot be reached.
    """
    try:
        with open_parquet(path) as file:
            footer = file.metadata
    except (OSError, pa.ArrowInvalid) as error:
        require_absence(path, error)
        raise DataError(f"{path} is not a whole Parquet file ({error}); score its shard again") from error
    meta = {k.decode(): v.decode() for k, v in (footer.metadata or {}).items() if k.startswith(b"mpl.")}
    found = (meta.get("mpl.format"), meta.get("mpl.version"))
    if found != (FORMAT, VERSION):
        raise DataError(f"{path} is {found[0]} version {found[1]}, expected {FORMAT} version {VERSION}")
    return PartInfo(
        path=path,
        shard=meta["mpl.shard"],
        fingerprint=meta["mpl.fingerprint"],
        class_names=tuple(json.loads(meta["mpl.class_names"])),
        rows=footer.num_rows,
        first_row=_first_row(path, footer),
    )


def _first_row(path: Location, footer: Any) -> int:
    """From the footer's statistics: not 0 where a split begins inside a file."""
    groups = [footer.row_group(at) for at in range(footer.num_row_groups) if footer.row_group(at).num_rows]
    bounds = [(group.column(0).statistics.min, group.column(0).statistics.max, group.num_rows) for group in groups]
    first = expected = bounds[0][0] if bounds else 0
    for low, high, rows in bounds:
        if (low, high) != (expected, expected + rows - 1):
            raise DataError(f"{path}: its rows do not follow one another; score its shard again")
        expected += rows
    return int(first)


def part_is_done(path: Location, shard: str, fingerprint: str, rows: int | None = None) -> bool:
    """Whether the file is whole and holds this shard, of so many rows if that is known, scored under this fingerprint.

    Raises:
        RunError: its place cannot be reached.
    """
    try:
        info = read_info(path)
    except DataError:
        return False
    return (info.shard, info.fingerprint) == (shard, fingerprint) and rows in (None, info.rows)


def read_part(info: PartInfo, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part in order, in batches that fit in memory, with page checksums verified."""
    size = group_rows(4 * len(info.class_names))
    try:
        with open_parquet(info.path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=size, columns=list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{info.path} is damaged ({error}); delete it and score its shard again") from error
