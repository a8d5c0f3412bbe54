"""Why an image was left out: the verdict on each row, and rejected/part-*.parquet.

Columns: `key`, `shard`, `row`, `reason`, `detail`, `similarity`, `match`. An image has one reason, the
first that holds in the order of REASONS.
"""

from collections import Counter
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.pool.repeats import Repeats
from pipeline.pool.scored import ScoredPool
from pipeline.pool.select.top_k import Selection
from pipeline.storage.files import Location
from pipeline.storage.tables import fixed_numbers

FORMAT, VERSION = "mpl-rejected", "1"
REASONS = (
    "decode_error",
    "empty",
    "too_large",
    "nonfinite",
    "eval_copy",
    "repeat_of",
    "below_probability",
    "below_k",
)
CANDIDATE = -1  # the verdict on an image that may be selected
EVAL_COPY, REPEAT_OF, BELOW_PROBABILITY, BELOW_K = (
    REASONS.index(reason) for reason in ("eval_copy", "repeat_of", "below_probability", "below_k")
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("row", pa.int64()),
        ("reason", pa.dictionary(pa.int8(), pa.string())),
        ("detail", pa.string()),
        ("similarity", pa.float32()),
        ("match", pa.string()),
    ]
)
NEEDED = ("status", "similarity")  # columns that a verdict rests on

Codes = NDArray[np.int8]


@dataclass(frozen=True)
class Verdicts:
    """The verdict on rows, before selecting.

    Attributes:
        copy_threshold: rows at least as similar to an evaluation image are copies; None: none is.
        repeats: rows with the pixels of an earlier one.
    """

    copy_threshold: float | None
    repeats: Repeats

    def __call__(self, ordinals: NDArray[np.int64], batch: pa.RecordBatch) -> Codes:
        """CANDIDATE or a place in REASONS, (n,). `batch` has at least the columns NEEDED."""
        codes = np.full(len(ordinals), CANDIDATE, np.int8)
        codes[self.repeats.first_of(ordinals) >= 0] = REPEAT_OF
        if self.copy_threshold is not None:
            codes[np.nan_to_num(floats(batch.column("similarity")), nan=-1) >= self.copy_threshold] = EVAL_COPY
        known = pc.index_in(batch.column("status"), pa.array(REASONS))  # null for ok
        bad = known.is_valid().to_numpy(zero_copy_only=False)
        codes[bad] = known.drop_null().to_numpy()
        return codes


@dataclass(frozen=True, eq=False)
class Lines:
    """Where the selection drew its lines.

    Attributes:
        chosen: the selection.
        kept: ordinals of the images in it, increasing, each once.
        k: images wanted per class.
        argmax: whether an image could serve its most probable class only.
        floor: in nats; minus infinity where there is none.
    """

    chosen: Selection
    kept: NDArray[np.int64]
    k: int
    argmax: bool
    floor: float

    def is_kept(self, ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each image serves some class, (n,)."""
        at = np.minimum(np.searchsorted(self.kept, ordinals), max(0, len(self.kept) - 1))
        return self.kept[at] == ordinals if len(self.kept) else np.zeros(len(ordinals), bool)

    def explain(self, log_odds: NDArray[np.float32], names: pa.Array) -> tuple[Codes, pa.Array]:
        """For images that no class took: the reason, (n,), and how far they were from being kept."""
        best = log_odds.argmax(axis=1)
        highest = np.take_along_axis(log_odds, best[:, None], 1)[:, 0]
        low = highest < self.floor
        full = np.array([len(rows) == self.k for rows in self.chosen.rows])
        gap = np.where(full & (log_odds >= self.floor), log_odds - self.chosen.threshold, -np.inf)  # (n, C)
        near = best if self.argmax else np.where(low, best, gap.argmax(axis=1))
        own = np.take_along_axis(log_odds, near[:, None], 1)[:, 0]
        line = np.where(low, self.floor, self.chosen.threshold[near])
        detail = pc.binary_join_element_wise(
            names.take(pa.array(near)), ": log-odds ", texts(own), ", needs ", texts(line), ""
        )
        return np.where(low, BELOW_PROBABILITY, BELOW_K).astype(np.int8), detail


def rejected_path(folder: Location, shard: str) -> Location:
    """Where the rejects of a shard lie."""
    return folder / f"part-{quote(shard, safe='')}.parquet"


def write_rejected(
    path: Location, pool: ScoredPool, part: int, verdicts: Verdicts, lines: Lines, mark: str
) -> tuple[Counter[str], list[pa.Array]]:
    """Write one part's rejects to `path`.

    Returns:
        How many images per reason; and the keys of the kept ones, in order.
    """
    schema = SCHEMA.with_metadata({"mpl.format": FORMAT, "mpl.version": VERSION, "mpl.fingerprint": mark})
    counts, keys = np.zeros(len(REASONS), np.int64), []
    columns = ["row", "key", "detail", "log_odds", "match", "mirrored", *NEEDED]
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=1) as writer:
        for ordinals, batch in pool.stream(columns, part):
            kept = lines.is_kept(ordinals)
            keys.append(batch.column("key").filter(pa.array(kept)))
            out = np.flatnonzero(~kept)
            table, codes = _rejects(pool, part, ordinals[out], batch.take(pa.array(out)), verdicts, lines)
            writer.write_table(table.cast(schema))
            counts += np.bincount(codes, minlength=len(REASONS))
    return Counter({reason: int(n) for reason, n in zip(REASONS, counts, strict=True) if n}), keys


def _rejects(
    pool: ScoredPool,
    part: int,
    ordinals: NDArray[np.int64],
    batch: pa.RecordBatch,
    verdicts: Verdicts,
    lines: Lines,
) -> tuple[pa.Table, Codes]:
    """The rejected rows of one batch as a table, and their codes, (n,)."""
    codes = verdicts(ordinals, batch)
    lost = np.flatnonzero(codes == CANDIDATE)
    log_odds = fixed_numbers(batch.column("log_odds"), "<f4")[lost]
    codes[lost], missed = lines.explain(log_odds, pa.array(pool.class_names, pa.string()))
    copy, repeat = codes == EVAL_COPY, codes == REPEAT_OF
    similarity = np.where(repeat, 1.0, np.where(copy, floats(batch.column("similarity")), np.nan))
    detail = spread(missed, lost, len(codes))
    detail = pc.coalesce(detail, pc.if_else(pa.array(copy & flags(batch.column("mirrored"))), "mirrored", None))
    detail = pc.coalesce(pc.if_else(pa.array(codes < EVAL_COPY), batch.column("detail"), None), detail)
    first = verdicts.repeats.first_of(ordinals[repeat])
    match = pc.coalesce(
        spread(_places(pool, first), np.flatnonzero(repeat), len(codes)),
        pc.if_else(pa.array(copy), batch.column("match"), None),
    )
    table = pa.table(
        {
            "key": batch.column("key"),
            "shard": pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(len(codes), np.int32)), pa.array([pool.parts[part].shard])
            ),
            "row": batch.column("row"),
            "reason": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(REASONS)),
            "detail": detail,
            "similarity": pa.array(similarity.astype(np.float32), from_pandas=True),  # NaN becomes null
            "match": match,
        }
    )
    return table, codes


def _places(pool: ScoredPool, ordinals: NDArray[np.int64]) -> pa.Array:
    """SHARD/ROW of each image."""
    part, row = pool.place(ordinals)
    shards = pa.array([info.shard for info in pool.parts], pa.string()).take(pa.array(part))
    return pc.binary_join_element_wise(shards, pa.array(row).cast(pa.string()), "/")


def spread(values: pa.Array, places: NDArray[np.intp], n: int) -> pa.Array:
    """`values` at `places` of n texts, null elsewhere."""
    at = np.full(n, -1, np.int64)
    at[places] = np.arange(len(places))
    return values.take(pa.array(at, mask=at < 0))


def texts(values: NDArray[np.floating]) -> pa.Array:
    """Numbers with four decimals as texts."""
    return pa.array(np.round(values.astype(np.float64), 4)).cast(pa.string())


def floats(column: pa.Array) -> NDArray[np.float32]:
    """A float column with NaN for null."""
    result: NDArray[np.float32] = column.to_numpy(zero_copy_only=False).astype(np.float32)
    return result


def flags(column: pa.Array) -> NDArray[np.bool_]:
    """A Boolean column with False for null."""
    result: NDArray[np.bool_] = column.fill_null(False).to_numpy(zero_copy_only=False)
    return result
