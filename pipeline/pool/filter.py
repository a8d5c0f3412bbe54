"""From scores to a selection: copies, repeats and bad images out, then the best K of every class.

Reads scores/part-*.parquet alone, so K, the assignment, the floor and the copy threshold can be changed
without the teacher. Writes rejected/part-*.parquet first and selection.parquet last: where
selection.parquet stands, all of it belongs together.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.correction import Correction
from pipeline.errors import DataError
from pipeline.pool.copies.calibration import Calibration
from pipeline.pool.rejected import CANDIDATE, JUDGED_BY, REJECTED, Lines, Rejects, Verdicts
from pipeline.pool.repeats import Hashed, count_repeats, find_repeats
from pipeline.pool.scores import ScoredPool, shard_file
from pipeline.pool.select.top_k import Selection, select_top_k
from pipeline.pool.selection import SELECTION, Kept, Rules, selection_fingerprint, write_selection
from pipeline.storage.files import Location, discard, names_in, whole_file
from pipeline.storage.ours import is_ours, remove_ours
from pipeline.storage.tables import fixed_numbers, header_if_whole
from pipeline.storage.texts import hash_texts

SELECTION_FILE, REJECTED_FOLDER = "selection.parquet", "rejected"


@dataclass(frozen=True)
class ClassCount:
    """One class: its candidates, images kept, images missing to k, and the last one's log-odds (nats)."""

    name: str
    available: int
    kept: int
    short: int
    threshold: float | None


@dataclass(frozen=True)
class Filtered:
    """The outcome in numbers.

    Attributes:
        images: in the pool, good or bad: kept plus all rejected.
        kept: distinct images.
        rows: of selection.parquet, one per image and class.
        rejected: images by reason.
        copies: images that are copies of evaluation images, whether they were rejected for it or not.
        classes: a count per class.
        repeated_keys: images whose key an earlier image has; only people are confused by it.
        fingerprint: of the rules and the scores.
    """

    images: int
    kept: int
    rows: int
    rejected: dict[str, int]
    copies: int
    classes: tuple[ClassCount, ...]
    repeated_keys: int
    fingerprint: str


def is_filtered(pool: ScoredPool, folder: Location, rules: Rules) -> bool:
    """Whether `folder` holds the whole selection of these scores under these rules, and its rejects.

    Raises:
        RunError: the folder cannot be reached.
    """
    files = [(folder / SELECTION_FILE, SELECTION)]
    files += [(shard_file(folder / REJECTED_FOLDER, scores.shard), REJECTED) for scores in pool.shards]
    headers = (header_if_whole(path, kind) for path, kind in files)
    mark = selection_fingerprint(pool, rules)
    return all(header is not None and header.fingerprint == mark for header in headers)


def filter_pool(
    pool: ScoredPool,
    folder: Location,
    rules: Rules,
    calibration: Calibration | None = None,
    correction: Correction | None = None,
) -> Filtered:
    """Select, and write rejected/part-*.parquet and selection.parquet into `folder`.

    Without a calibration the rules' threshold alone says what a copy is; without a correction the teacher's classes are
    those of the selection.

    A class without a candidate keeps nothing, and its count says so. Memory: at most 18 bytes per class and k,
    the keys of what is kept, and buffers of bounded size.

    Raises:
        DataError: no image can serve any class; what happened to each is in rejected/.
        RunError: a file cannot be written.
    """
    discard(folder / SELECTION_FILE)  # it never stands beside rejects of other rules
    if calibration is None and rules.copy_threshold is not None:
        calibration = Calibration(rules.copy_threshold)
    correction = correction or Correction.identity(pool.class_names)
    repeats = find_repeats(pool.rows, lambda: _pixel_hashes(pool))
    verdicts = Verdicts(calibration, repeats, rules.keep_copies)
    chosen = select_top_k(
        _candidates(pool, verdicts, correction), rules.k, rules.assign, min_log_odds=rules.min_log_odds
    )
    lines = Lines(chosen, rules)
    reasons, keys = _reject(Rejects(pool, rules, verdicts, lines, correction), folder / REJECTED_FOLDER)
    if len(lines.kept) + reasons.total() != pool.rows:
        raise AssertionError(f"{len(lines.kept)} kept and {reasons} rejected do not make {pool.rows}")
    if not len(lines.kept):
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"no image of the pool can be kept: of {pool.rows:,} images, {counted}")
    write_selection(folder / SELECTION_FILE, pool, rules, chosen, Kept(lines.kept, keys, correction.class_names))
    return Filtered(
        images=pool.rows,
        kept=len(lines.kept),
        rows=sum(len(rows) for rows in chosen.rows),
        rejected=dict(reasons),
        copies=_count_copies(pool, verdicts),
        classes=class_counts(correction.class_names, chosen, rules.k),
        repeated_keys=_repeated_keys(pool),
        fingerprint=selection_fingerprint(pool, rules),
    )


def class_counts(names: tuple[str, ...], chosen: Selection, k: int) -> tuple[ClassCount, ...]:
    """Available, kept, short and threshold of each class."""
    return tuple(
        ClassCount(name, int(available), len(scores), k - len(scores), float(scores[-1]) if len(scores) else None)
        for name, available, scores in zip(names, chosen.available, chosen.scores, strict=True)
    )


def _pixel_hashes(pool: ScoredPool) -> Iterator[Hashed]:
    for ordinals, batch in pool.stream(["status", "pixel_hash"]):
        ok = pc.equal(batch.column("status"), "ok").to_numpy(zero_copy_only=False)
        yield ordinals[ok], fixed_numbers(batch.column("pixel_hash"), "<u8")[ok]


def _count_copies(pool: ScoredPool, verdicts: Verdicts) -> int:
    if verdicts.calibration is None:
        return 0
    return sum(int(verdicts.copies(batch).sum()) for _, batch in pool.stream(["similarity", "match"]))


def _repeated_keys(pool: ScoredPool) -> int:
    def keys() -> Iterator[Hashed]:
        for ordinals, batch in pool.stream(["key"]):
            yield ordinals, hash_texts(batch.column("key"))

    return count_repeats(pool.rows, keys)


def _candidates(
    pool: ScoredPool, verdicts: Verdicts, correction: Correction
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    for ordinals, batch in pool.stream([*JUDGED_BY, "log_odds"]):
        free = verdicts(ordinals, batch) == CANDIDATE
        yield ordinals[free], correction.log_odds(fixed_numbers(batch.column("log_odds"), "<f4")[free])


def _reject(rejects: Rejects, folder: Location) -> tuple[Counter[str], pa.Array]:
    """Write all rejects; count the reasons, and gather the keys of what is kept, in order."""
    paths = [shard_file(folder, scores.shard) for scores in rejects.pool.shards]
    names = {path.name for path in paths}
    remove_ours(*(folder / name for name in names_in(folder) - names if is_ours(folder / name)))  # of shards now gone
    reasons: Counter[str] = Counter()
    keys = [pa.array([], pa.string())]
    for shard, path in enumerate(paths):
        with whole_file(path) as temporary:
            counts, kept = rejects.write(temporary, shard)
        reasons.update(counts)
        keys.extend(kept)
    return reasons, pa.concat_arrays(keys)
