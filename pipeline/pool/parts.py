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
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dense import fixed_binary
from pipeline.errors import DataError

FORMAT, VERSION = "mpl-scores", "1"
GROUP_BYTES = 64 << 20  # of log-odds in one row group, and so in memory at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a part, in order; n rows, C classes.

    Attributes:
        row: places inside the shard, (n,), int64.
        key, status, detail: texts; detail is None where there is nothing to say.
        log_odds: (n, C), float32, nats; NaN where the status is not ok.
        pixel_hash: 16 bytes each, or None.
        descriptor: bytes of equal length, or None.
        match, similarity, mirrored: the best evaluation image, or None.
    """

    row: NDArray[np.int64]
    key: Sequence[str]
    status: Sequence[str]
    detail: Sequence[str | None]
    log_odds: NDArray[np.float32]
    pixel_hash: Sequence[bytes | None]
    descriptor: Sequence[bytes | None]
    match: Sequence[str | None]
    similarity: Sequence[float | None]
    mirrored: Sequence[bool | None]


@dataclass(frozen=True)
class PartInfo:
    """What the footer of a part tells."""

    path: Path
    shard: str
    fingerprint: str
    class_names: tuple[str, ...]
    rows: int


def part_path(folder: Path, shard: str) -> Path:
    """Where the scores of a shard lie: a name that stays when the pool gets more shards."""
    return folder / f"part-{quote(shard, safe='')}.parquet"


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
    ok = np.array([status == "ok" for status in rows.status], bool)
    columns: dict[str, Any] = {field.name: getattr(rows, field.name) for field in schema}
    arrays = [
        fixed_binary(rows.log_odds, ok) if field.name == "log_odds" else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


def read_info(path: Path) -> PartInfo:
    """The footer of a part.

    Raises:
        DataError: the file is missing, cut short, or not a part of this version.
    """
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
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
    )


def part_is_done(path: Path, shard: str, fingerprint: str) -> bool:
    """Whether the file is whole and holds this shard scored under this fingerprint."""
    if not path.exists():
        return False
    try:
        info = read_info(path)
    except DataError:
        return False
    return (info.shard, info.fingerprint) == (shard, fingerprint)


def read_part(info: PartInfo, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part in order, in batches that fit in memory, with page checksums verified."""
    with pq.ParquetFile(info.path, page_checksum_verification=True) as file:
        size = group_rows(4 * len(info.class_names))
        try:
            yield from file.iter_batches(batch_size=size, columns=list(columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{info.path} is damaged ({error}); delete it and score its shard again") from error
