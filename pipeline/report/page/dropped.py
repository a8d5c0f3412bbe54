"""Examples out of rejected/part-*.parquet: those just below each line, copies, repeats, and a few of the rest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.pool.parts import part_shard
from pipeline.pool.rejected import BELOW_K, BELOW_PROBABILITY, EVAL_COPY, FORMAT, REASONS, REPEAT_OF, rejected_path
from pipeline.report.page.examples import Best, scramble
from pipeline.report.page.kept import codes, reading
from pipeline.storage.files import Location, storage_errors

BATCH = 1 << 16  # rows in memory at a time
DETAIL = r"(?s)^(?P<name>.*): log-odds (?P<own>\S+), needs \S+$"  # as pool/rejected.py writes it
LEAST_ALIKE = len(REASONS)  # a group of its own: the copies that are nearest to being honest images
FIELDS = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("similarity", pa.float32()),
        ("match", pa.string()),
        ("log_odds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Dropped:
    """An image that was left out.

    Attributes:
        key, shard, row: of the image.
        reason, detail: why, one of REASONS; and in words, or None.
        similarity, match: to the evaluation image or the earlier image of the pool that it repeats, or None.
        log_odds: where it missed a line, of the class that it missed by least; nats, to four decimals.
    """

    key: str
    shard: str
    row: int
    reason: str
    detail: str | None
    similarity: float | None
    match: str | None
    log_odds: float | None


@dataclass(frozen=True)
class DroppedExamples:
    """What was found.

    Attributes:
        counts: images by reason, in the shards looked at.
        below: per class, those nearest to its line, nearest first. An image stands at the class that it missed
            by least.
        least_alike: removed copies with the lowest similarity, lowest first.
        samples: by reason, drawn evenly.
        missing: shards whose rejects are not there, or belong to another selection.
    """

    counts: Counter[str]
    below: list[tuple[Dropped, ...]]
    least_alike: tuple[Dropped, ...]
    samples: dict[str, tuple[Dropped, ...]]
    missing: tuple[str, ...]


def rejected_shards(folder: Location) -> list[str]:
    """The shards of the pool, sorted, as the files in `folder` name them.

    Raises:
        DataError: object storage does not answer.
    """
    try:
        with storage_errors():
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from error
    return sorted(part_shard(name) for name in names if name.startswith("part-"))


def find_dropped(
    folder: Location,
    shards: Sequence[str],
    class_names: Sequence[str],
    lines: NDArray[np.float64],
    fingerprint: str,
    *,
    below: int,
    samples: int,
) -> DroppedExamples:
    """Read the rejects of `shards` once, in batches.

    Args:
        folder: rejected/.
        shards: to look into.
        class_names: of the teacher.
        lines: log-odds that each class needed, (C,), nats; NaN where it took all that there are.
        fingerprint: of the selection that the rejects must belong to.
        below: examples per class below its line.
        samples: examples per reason.
    """
    near, rest = Best(len(class_names), below, FIELDS), Best(len(REASONS) + 1, samples, FIELDS)
    counts, missing = np.zeros(len(REASONS), np.int64), []
    for number, shard in enumerate(shards):
        try:
            with reading(rejected_path(folder, shard)) as file:
                meta = file.schema_arrow.metadata or {}
                if (meta.get(b"mpl.format"), meta.get(b"mpl.fingerprint")) != (FORMAT.encode(), fingerprint.encode()):
                    missing.append(shard)
                    continue
                for batch in file.iter_batches(BATCH, columns=FIELDS.names[:7]):
                    reason = codes(batch.column("reason"), REASONS)
                    counts += np.bincount(reason, minlength=len(REASONS))
                    _offer_lines(near, batch, reason, class_names, lines)
                    _offer_rest(rest, batch, reason, number)
        except DataError:
            missing.append(shard)
    return DroppedExamples(
        counts=Counter({name: int(n) for name, n in zip(REASONS, counts, strict=True) if n}),
        below=[_examples(near, c) for c in range(len(class_names))],
        least_alike=_examples(rest, LEAST_ALIKE),
        samples={name: found for code, name in enumerate(REASONS) if (found := _examples(rest, code))},
        missing=tuple(missing),
    )


def _offer_lines(
    best: Best,
    batch: pa.RecordBatch,
    reason: NDArray[np.int64],
    names: Sequence[str],
    lines: NDArray[np.float64],
) -> None:
    """Offer those that missed a line, by how little."""
    at = np.flatnonzero((reason == BELOW_K) | (reason == BELOW_PROBABILITY))
    found = pc.extract_regex(batch.column("detail").take(pa.array(at)), DETAIL)
    label = pc.fill_null(pc.index_in(pc.struct_field(found, "name"), pa.array(names, pa.string())), -1).to_numpy()
    known = np.flatnonzero(label >= 0)
    log_odds = pc.cast(pc.struct_field(found.take(pa.array(known)), "own"), pa.float64())
    gap = log_odds.to_numpy() - lines[label[known]]
    best.add(label[known].astype(np.int64), gap, _rows(batch, at[known], log_odds))


def _offer_rest(best: Best, batch: pa.RecordBatch, reason: NDArray[np.int64], shard: int) -> None:
    """Offer all others by chance, and copies also by how little they are alike."""
    at = np.flatnonzero((reason != BELOW_K) & (reason != BELOW_PROBABILITY))
    if not len(at):
        return
    rows = _rows(batch, at)
    best.add(reason[at], scramble(shard, batch.column("row").to_numpy()[at]), rows)
    copy = np.flatnonzero(reason[at] == EVAL_COPY)
    alike = rows.column("similarity").to_numpy().astype(np.float64)[copy]
    best.add(np.full(len(copy), LEAST_ALIKE), -alike, rows.take(pa.array(copy)))


def _rows(batch: pa.RecordBatch, at: NDArray[np.int64], log_odds: pa.Array | None = None) -> pa.Table:
    """The rows `at` of a batch with the columns FIELDS."""
    part = batch.take(pa.array(at))
    columns: dict[str, Any] = {name: part.column(name) for name in FIELDS.names[:7]}
    columns["log_odds"] = pa.nulls(len(at), pa.float64()) if log_odds is None else log_odds
    return pa.table(columns).cast(FIELDS)


def _examples(best: Best, group: int) -> tuple[Dropped, ...]:
    return tuple(Dropped(**row) for row in best.of(group)[1])


def match_place(dropped: Dropped) -> tuple[str, str, int] | None:
    """Where the image lies that a copy or a repeat matches: split, shard, row; None where that is not told."""
    split, rest = "unlabelled", dropped.match or ""
    if dropped.reason == REASONS[EVAL_COPY]:
        split, _, rest = rest.partition("/")
    elif dropped.reason != REASONS[REPEAT_OF]:
        return None
    shard, _, row = rest.rpartition("/")
    return (split, shard, int(row)) if shard and row.isdigit() else None
