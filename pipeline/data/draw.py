"""Fewer labels: a draw at random from the labelled split, the same part of every class; and the rest, for a pool."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.classes import SHOWN
from pipeline.data.readers.shard import Chosen, Shard
from pipeline.data.sources import Split
from pipeline.errors import DataError
from pipeline.seeds import permutation


def stratified(split: Split, count: int, seed: int) -> Split:
    """`count` rows of a split, drawn from the seed; each class has its part of them, and at least one.

    Of one seed, the rows of a class in a smaller draw are among those in a larger one.

    Raises:
        DataError: the split has fewer rows; `count` is less than one for each class; a class has no row.
    """
    labels = split.labels()  # (N,)
    if count > len(labels):
        raise DataError(f"data.labelled={count}: the {split.name} split has only {len(labels):,} rows")
    present = np.bincount(labels, minlength=len(split.class_names))  # (C,)
    if absent := [name for name, number in zip(split.class_names, present, strict=True) if not number]:
        raise DataError(f"the {split.name} split has no image of {_shown(absent)}, so no draw of it can have one")
    chosen = []
    parts = _parts(present, count, split.class_names)
    for label, (name, number) in enumerate(zip(split.class_names, parts, strict=True)):
        rows = np.flatnonzero(labels == label)
        chosen.append(rows[permutation(len(rows), seed, "labelled", name)[:number]])
    return replace(split, shards=tuple(_cut(split.shards, np.sort(np.concatenate(chosen)))))


def without(split: Split, other: Split) -> Split:
    """A split but for the rows that another has of the same shards; shards that the other lacks stay as they are.

    Raises:
        DataError: nothing is left.
    """
    taken = {shard.name: {row for row, _ in shard.identities()} for shard in other.shards}
    kept: list[Shard] = []
    for shard in split.shards:
        if shard.name not in taken:
            kept.append(shard)
            continue
        rows = [row for row, _ in shard.identities()]
        if places := tuple(place for place, row in enumerate(rows) if row not in taken[shard.name]):
            kept.append(shard if len(places) == len(rows) else Chosen(shard, places))
    if not kept:
        raise DataError(
            f"the {split.name} split has no image that is not in the {other.name} one; set data.labelled to fewer"
        )
    return replace(split, shards=tuple(kept))


def _parts(present: np.ndarray, count: int, names: Sequence[str]) -> np.ndarray:
    """How many of each class, int64 (C,): in proportion, rounded by the largest remainders, at least one."""
    if count < len(present):
        raise DataError(
            f"data.labelled={count} is less than one image for each of {len(present)} classes ({_shown(names)}); "
            f"give at least {len(present)}"
        )
    ideal = count * present / present.sum()
    parts = np.maximum(np.floor(ideal).astype(np.int64), 1)
    while (missing := count - parts.sum()) != 0:
        # One to, or from, each of those that are furthest from their part.
        free = parts < present if missing > 0 else parts > 1
        distance = np.where(free, (ideal - parts) * np.sign(missing), -np.inf)
        furthest = np.argsort(-distance, kind="stable")[: min(abs(missing), free.sum())]
        parts[furthest] += np.sign(missing)
    return parts


def _cut(shards: Sequence[Shard], rows: np.ndarray) -> list[Shard]:
    """The shards that hold some of these rows of the split, ascending, with them alone."""
    cut: list[Shard] = []
    before = 0
    for shard in shards:
        end = before + shard.rows()
        first, last = np.searchsorted(rows, [before, end])
        if first < last:
            cut.append(Chosen(shard, tuple((rows[first:last] - before).tolist())))
        before = end
    return cut


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", … ({len(names) - SHOWN:,} more)" if len(names) > SHOWN else "")
