"""Why an image was left out: the verdict on each row, and rejected/part-*.parquet.

Columns: `key` · `shard`, `row`: the image's identity · `reason`: one of REASONS, the first that holds · `class`,
`log_odds`, `needed`: of an image below a line, the class (its index) whose line it missed by least, its log-odds there,
and those of the line, nats, float32 · `similarity`, `match`, `mirrored`: of a copy, the evaluation image that it is
like, how much (0 to 1), and whether it had to be mirrored; of a repeat, SHARD/ROW of the earlier image · `detail`: what
the decoder said. Null where a column does not apply. The header has the class names and the selection's fingerprint.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.correction import Correction
from pipeline.pool.copies.calibration import Calibration
from pipeline.pool.repeats import Repeats
from pipeline.pool.scores import ScoredPool
from pipeline.pool.select.top_k import Selection, float32_floor
from pipeline.pool.selection import Rules, selection_fingerprint
from pipeline.storage.tables import TableFormat, fixed_numbers, table_writer

REJECTED = TableFormat(
    "mpl-rejected",
    2,
    remedy="run mpl filter, which makes rejected/ again from the same scores, without the teacher",
    plain=frozenset({"log_odds"}),
    dictionary=("shard", "reason", "class", "needed", "match", "detail"),
)
REASONS = (
    "decode_error",
    "empty",
    "too_large",
    "nonfinite",
    "no_prediction",
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
        ("class", pa.int32()),
        ("log_odds", pa.float32()),
        ("needed", pa.float32()),
        ("similarity", pa.float32()),
        ("match", pa.string()),
        ("mirrored", pa.bool_()),
        ("detail", pa.string()),
    ]
)
JUDGED_BY = ("status", "similarity", "match")  # columns that a verdict rests on

Codes = NDArray[np.int8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Verdicts:
    """The verdict on rows, before selecting.

    Attributes:
        calibration: tells which rows are copies of evaluation images; None: none is.
        repeats: rows with the pixels of an earlier one.
        keep_copies: whether copies may be selected.
    """

    calibration: Calibration | None
    repeats: Repeats
    keep_copies: bool = False

    def __call__(self, ordinals: NDArray[np.int64], batch: pa.RecordBatch) -> Codes:
        """CANDIDATE or a place in REASONS, (n,). `batch` has at least the columns JUDGED_BY."""
        codes = np.full(len(ordinals), CANDIDATE, np.int8)
        codes[self.repeats.first_of(ordinals) >= 0] = REPEAT_OF
        if not self.keep_copies:
            codes[self.copies(batch)] = EVAL_COPY
        known = pc.index_in(batch.column("status"), pa.array(REASONS))  # null for ok
        bad = known.is_valid().to_numpy(zero_copy_only=False)
        codes[bad] = known.drop_null().to_numpy()
        return codes

    def copies(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        """Which rows are copies of evaluation images, (n,)."""
        if self.calibration is None:
            return np.zeros(batch.num_rows, bool)
        similarity = np.nan_to_num(floats(batch.column("similarity")), nan=-1)
        found = similarity >= self.calibration.threshold
        names = batch.column("match").filter(pa.array(found)).to_pylist()  # few: only these are looked up
        found[found] = self.calibration.are_copies(similarity[found], names)
        return found


@dataclass(frozen=True, eq=False)
class Missed:
    """The lines that n images missed.

    Attributes:
        reason: BELOW_PROBABILITY or BELOW_K, (n,).
        label: the class whose line was missed by least, (n,), int32.
        log_odds: of that class, (n,), nats.
        needed: where the line is, (n,), nats.
    """

    reason: Codes
    label: NDArray[np.int32]
    log_odds: Floats
    needed: Floats


class Lines:
    """Where a selection drew its lines.

    Attributes:
        kept: ordinals of the images in it, increasing, each once.
        floor: in nats; minus infinity where there is none.
        full: classes that have as many images as were wanted, (C,).
    """

    def __init__(self, chosen: Selection, rules: Rules) -> None:
        self.kept = np.unique(np.concatenate(chosen.rows))
        self.floor = float32_floor(rules.min_log_odds)
        self.full = np.array([len(rows) == rules.k for rows in chosen.rows])
        self._threshold, self._argmax = chosen.threshold, rules.assign == "argmax"

    def is_kept(self, ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each image serves some class, (n,)."""
        place = np.minimum(np.searchsorted(self.kept, ordinals), max(0, len(self.kept) - 1))
        return self.kept[place] == ordinals if len(self.kept) else np.zeros(len(ordinals), bool)

    def missed(self, log_odds: Floats) -> Missed:
        """The lines that images (n, C) missed which no class took."""
        likeliest = log_odds.argmax(axis=1)
        low = np.take_along_axis(log_odds, likeliest[:, None], 1)[:, 0] < self.floor
        gap = np.where(self.full & (log_odds >= self.floor), log_odds - self._threshold, -np.inf)  # (n, C)
        label = likeliest if self._argmax else np.where(low, likeliest, gap.argmax(axis=1))
        return Missed(
            reason=np.where(low, BELOW_PROBABILITY, BELOW_K).astype(np.int8),
            label=label.astype(np.int32),
            log_odds=np.take_along_axis(log_odds, label[:, None], 1)[:, 0],
            needed=np.where(low, self.floor, self._threshold[label]),
        )


@dataclass(frozen=True, eq=False)
class Rejects:
    """Writes down what a selection left out.

    Attributes:
        pool: the scores.
        rules: of the selection.
        verdicts: before selecting.
        lines: that were drawn.
        correction: from the teacher's classes to those of the selection.
    """

    pool: ScoredPool
    rules: Rules
    verdicts: Verdicts
    lines: Lines
    correction: Correction

    def write(self, path: Path, shard: int) -> tuple[Counter[str], list[pa.Array]]:
        """Write the rejects of one shard to `path`, on disk.

        Returns:
            How many images per reason; and the keys of the kept ones, in order.
        """
        notes = {
            "fingerprint": selection_fingerprint(self.pool, self.rules),
            "class_names": self.correction.class_names,
        }
        counts, keys = np.zeros(len(REASONS), np.int64), []
        columns = ["row", "key", "detail", "log_odds", "match", "mirrored", *JUDGED_BY]
        with table_writer(path, REJECTED, SCHEMA, notes) as writer:
            for ordinals, batch in self.pool.stream(columns, shard):
                kept = self.lines.is_kept(ordinals)
                keys.append(batch.column("key").filter(pa.array(kept)))
                out = np.flatnonzero(~kept)
                table, reasons = self._table(shard, ordinals[out], batch.take(pa.array(out)))
                writer.write_table(table.cast(writer.schema))
                counts += np.bincount(reasons, minlength=len(REASONS))
        return Counter({reason: int(n) for reason, n in zip(REASONS, counts, strict=True) if n}), keys

    def _table(self, shard: int, ordinals: NDArray[np.int64], batch: pa.RecordBatch) -> tuple[pa.Table, Codes]:
        """The rejected rows of a batch, n of them, and their reasons, (n,)."""
        codes = self.verdicts(ordinals, batch)
        below = np.flatnonzero(codes == CANDIDATE)
        missed = self.lines.missed(self.correction.log_odds(fixed_numbers(batch.column("log_odds"), "<f4")[below]))
        codes[below] = missed.reason
        copy, repeat = codes == EVAL_COPY, np.flatnonzero(codes == REPEAT_OF)
        similarity = np.where(copy, floats(batch.column("similarity")), np.where(codes == REPEAT_OF, 1.0, np.nan))
        earlier = self._places(self.verdicts.repeats.first_of(ordinals[repeat]))
        columns = {
            "key": batch.column("key"),
            "shard": pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(len(codes), np.int32)), pa.array([self.pool.shards[shard].shard])
            ),
            "row": batch.column("row"),
            "reason": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(REASONS)),
            "class": spread(pa.array(missed.label), below, len(codes)),
            "log_odds": spread(pa.array(missed.log_odds), below, len(codes)),
            "needed": spread(pa.array(missed.needed), below, len(codes)),
            "similarity": pa.array(similarity.astype(np.float32), from_pandas=True),  # NaN becomes null
            "match": pc.coalesce(spread(earlier, repeat, len(codes)), only(copy, batch.column("match"))),
            "mirrored": only(copy, batch.column("mirrored")),
            "detail": only(codes < EVAL_COPY, batch.column("detail")),
        }
        return pa.table(columns), codes

    def _places(self, ordinals: NDArray[np.int64]) -> pa.Array:
        """SHARD/ROW of each image."""
        shard, row = self.pool.place(ordinals)
        names = pa.array([scores.shard for scores in self.pool.shards], pa.string()).take(pa.array(shard))
        return pc.binary_join_element_wise(names, pa.array(row).cast(pa.string()), "/")


def spread(values: pa.Array, places: NDArray[np.intp], n: int) -> pa.Array:
    """`values` at `places` of n rows, null elsewhere."""
    source = np.full(n, -1, np.int64)
    source[places] = np.arange(len(places))
    return values.take(pa.array(source, mask=source < 0))


def only(where: NDArray[np.bool_], values: pa.Array) -> pa.Array:
    """`values` (n,) at the rows `where`, null elsewhere."""
    return pc.if_else(pa.array(where), values, pa.scalar(None, values.type))


def floats(column: pa.Array) -> Floats:
    """A float column with NaN for null."""
    result: Floats = column.to_numpy(zero_copy_only=False).astype(np.float32)
    return result
