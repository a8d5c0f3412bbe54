"""From scores to a selection: copies, repeats and bad images out, then the best K of every class.

Reads scores/part-*.parquet alone, so K, the assignment, the floor and the copy threshold can be changed
without the teacher. Writes rejected/part-*.parquet first and selection.parquet last: where
selection.parquet stands, all of it belongs together.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError, UsageError
from pipeline.pool.rejected import CANDIDATE, NEEDED, Lines, Verdicts, rejected_path, write_rejected
from pipeline.pool.repeats import Hashed, count_repeats, find_repeats, hash_texts
from pipeline.pool.scored import ScoredPool
from pipeline.pool.select.top_k import Assign, Selection, checked_assign, checked_k, select_top_k, upsample
from pipeline.pool.selection import read_selection, write_selection
from pipeline.storage.files import Location, discard, names_in, whole_file
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import fixed_numbers

SELECTION, REJECTED = "selection.parquet", "rejected"


@dataclass(frozen=True)
class Rules:
    """What is kept.

    Attributes:
        k: images per class.
        assign: "any" (an image may serve several classes) or "argmax" (its most probable one).
        min_probability: that the teacher must give the class; 0 is no floor.
        copy_threshold: images at least as similar to an evaluation image are left out; None keeps them.
        upsample: fill classes short of k by a repeat count.
    """

    k: int
    assign: Assign = "any"
    min_probability: float = 0.0
    copy_threshold: float | None = None
    upsample: bool = False

    def __post_init__(self) -> None:
        checked_k(self.k)
        checked_assign(self.assign)
        if not 0 <= self.min_probability < 1:
            raise UsageError(f"min_probability (={self.min_probability}) must be at least 0 and below 1")

    @property
    def min_log_odds(self) -> float | None:
        """The floor in nats; None where there is none."""
        p = self.min_probability
        return float(np.log(p) - np.log1p(-p)) if p > 0 else None


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
        classes: a count per class.
        repeated_keys: images whose key an earlier image has; only people are confused by it.
        fingerprint: of the rules and the scores.
    """

    images: int
    kept: int
    rows: int
    rejected: dict[str, int]
    classes: tuple[ClassCount, ...]
    repeated_keys: int
    fingerprint: str


def selection_fingerprint(pool: ScoredPool, rules: Rules) -> str:
    """Of the scores and the rules."""
    return fingerprint_of(["selection", pool.fingerprint(), asdict(rules)])


def is_filtered(pool: ScoredPool, folder: Location, rules: Rules) -> bool:
    """Whether `folder` holds the whole selection of these scores under these rules."""
    try:
        found = read_selection(folder / SELECTION).fingerprint
    except DataError:
        return False
    return found == selection_fingerprint(pool, rules)


def filter_pool(pool: ScoredPool, folder: Location, rules: Rules) -> Filtered:
    """Select, and write rejected/part-*.parquet and selection.parquet into `folder`.

    A class without a candidate keeps nothing, and its count says so. Memory: at most 18 bytes per class and k,
    the keys of what is kept, and buffers of bounded size.

    Raises:
        DataError: no image can serve any class; what befell each is in rejected/.
        RunError: a file cannot be written.
    """
    mark = selection_fingerprint(pool, rules)
    discard(folder / SELECTION)  # it never stands beside rejects of other rules
    verdicts = Verdicts(rules.copy_threshold, find_repeats(pool.rows, lambda: _pixel_hashes(pool)))
    chosen = select_top_k(_candidates(pool, verdicts), rules.k, rules.assign, min_log_odds=rules.min_log_odds)
    lines = _lines(chosen, rules)
    reasons, keys = _reject(pool, folder / REJECTED, verdicts, lines, mark)
    if len(lines.kept) + reasons.total() != pool.rows:
        raise AssertionError(f"{len(lines.kept)} kept and {reasons} rejected do not make {pool.rows}")
    if not len(lines.kept):
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"no image of the pool can be kept: of {pool.rows:,} images, {told}")
    counts = [len(rows) for rows in chosen.rows]
    write_selection(
        folder / SELECTION,
        pool,
        chosen,
        kept=lines.kept,
        keys=keys,
        repeats=upsample(counts, rules.k if rules.upsample else 1),
        fingerprint=mark,
        rules=asdict(rules),
    )
    return Filtered(
        images=pool.rows,
        kept=len(lines.kept),
        rows=sum(counts),
        rejected=dict(reasons),
        classes=class_counts(pool.class_names, chosen, rules.k),
        repeated_keys=_repeated_keys(pool),
        fingerprint=mark,
    )


def class_counts(names: tuple[str, ...], chosen: Selection, k: int) -> tuple[ClassCount, ...]:
    """Available, kept, short and threshold of each class."""
    return tuple(
        ClassCount(name, int(available), len(scores), k - len(scores), float(scores[-1]) if len(scores) else None)
        for name, available, scores in zip(names, chosen.available, chosen.scores, strict=True)
    )


def _lines(chosen: Selection, rules: Rules) -> Lines:
    floor = rules.min_log_odds
    return Lines(
        chosen=chosen,
        kept=np.unique(np.concatenate(chosen.rows)),
        k=rules.k,
        argmax=rules.assign == "argmax",
        floor=-np.inf if floor is None else floor,
    )


def _pixel_hashes(pool: ScoredPool) -> Iterator[Hashed]:
    for ordinals, batch in pool.stream(["status", "pixel_hash"]):
        ok = pc.equal(batch.column("status"), "ok").to_numpy(zero_copy_only=False)
        yield ordinals[ok], fixed_numbers(batch.column("pixel_hash"), "<u8")[ok]


def _repeated_keys(pool: ScoredPool) -> int:
    def keys() -> Iterator[Hashed]:
        for ordinals, batch in pool.stream(["key"]):
            yield ordinals, hash_texts(batch.column("key"))

    return count_repeats(pool.rows, keys)


def _candidates(pool: ScoredPool, verdicts: Verdicts) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    for ordinals, batch in pool.stream([*NEEDED, "log_odds"]):
        free = verdicts(ordinals, batch) == CANDIDATE
        yield ordinals[free], fixed_numbers(batch.column("log_odds"), "<f4")[free]


def _reject(
    pool: ScoredPool, folder: Location, verdicts: Verdicts, lines: Lines, mark: str
) -> tuple[Counter[str], pa.Array]:
    """Write all rejects; count the reasons, and gather the keys of what is kept, in order."""
    paths = [rejected_path(folder, part.shard) for part in pool.parts]
    names = {path.name for path in paths}
    discard(*(folder / name for name in names_in(folder) - names))  # of shards that the pool no longer has
    reasons: Counter[str] = Counter()
    keys: list[pa.Array] = []
    for at, path in enumerate(paths):
        with whole_file(path) as temporary:
            counts, found = write_rejected(temporary, pool, at, verdicts, lines, mark)
        reasons.update(counts)
        keys.extend(found)
    return reasons, pa.concat_arrays([pa.array([], pa.string()), *keys])
