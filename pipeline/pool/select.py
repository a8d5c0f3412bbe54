"""Exact top-K per class over a stream of scores, in memory that does not grow with the stream.

Rows are ranked by (score, row id): a higher score first, and of equal scores the lower id. That is a
total order, so the result does not depend on the order of the rows, on how they are cut into chunks,
or on how many workers saw them. Rank float32 log-odds, never float16 or a saturated softmax, or ties
would decide who is kept.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError, UsageError

Assign = Literal["any", "argmax"]
Ids = NDArray[np.int64]
Scores = NDArray[np.float32]

BLOCK = 1 << 18  # scores compared at a time: 1 MiB, so that mask and thresholds stay in the cache
PENDING = 1 << 19  # candidates gathered before they are dealt out to their classes
ALL_LESS = np.uint64(0x0101010101010101)  # eight booleans, all of them true


@dataclass(frozen=True, eq=False)
class Selection:
    """The best rows of each class.

    Attributes:
        rows: per class the row ids, best first, ties to the lower id; at most k, int64.
        scores: per class the scores of those rows, float32.
        available: per class the number of rows that could serve it: all of them for "any", those
            whose best class it is for "argmax", and no row below the floor; int64, (C,).
        threshold: per class the score of the last row kept, NaN where none is; float32, (C,).
    """

    rows: tuple[Ids, ...]
    scores: tuple[Scores, ...]
    available: Ids
    threshold: Scores


def select_top_k(
    chunks: Iterable[tuple[Any, Any]],
    k: int,
    assign: Assign = "any",
    *,
    min_log_odds: float | None = None,
) -> Selection:
    """The k best rows of every class, exactly.

    Args:
        chunks: pairs of row ids (n,), int64, each id once in the whole stream, and scores (n, C),
            float32, such as log-odds; any order, any chunking, empty chunks too.
        k: rows wanted per class, at least 1; a class with fewer keeps what there is.
        assign: "any" lets a row serve several classes (the paper's wording); "argmax" only the class of
            its highest score, the first of equal ones (NoisyStudent).
        min_log_odds: a floor; lower scores are never kept.

    Returns:
        A `Selection` with as many classes as the chunks have columns; with none if there is no chunk.

    Raises:
        UsageError: k, assign or min_log_odds makes no sense.
        DataError: a score is NaN, shapes differ between chunks, or an id occurs twice.
    """
    state: TopK | None = None
    k, assign = checked_k(k), checked_assign(assign)
    for rows, scores in chunks:
        scores = np.asarray(scores)
        if scores.ndim != 2:
            raise DataError(f"scores must have the shape (rows, classes), found {scores.shape}")
        if state is None:
            state = TopK(k, scores.shape[1], assign, min_log_odds=min_log_odds)
        state.add(rows, scores)
    return (state or TopK(k, 0, assign, min_log_odds=min_log_odds)).selection()


class TopK:
    """The running state of `select_top_k`: add chunks, merge states of other workers, read it out.

    Memory: at most 24·k·C bytes, and a few MiB.
    """

    def __init__(self, k: int, classes: int, assign: Assign = "any", *, min_log_odds: float | None = None):
        self.k, self.assign, self.classes = checked_k(k), checked_assign(assign), classes
        self.floor = float32_floor(min_log_odds)
        self.available = np.zeros(classes, np.int64)
        self.best = [_Best(self.k) for _ in range(classes)]
        self.thresholds = np.full(classes, self.floor, np.float32)  # (C,) a lower score cannot be kept
        self._pending: list[tuple[NDArray[np.intp], Scores, Ids]] = []
        self._pending_count = 0
        self._refresh()

    def add(self, rows: Any, scores: Any) -> None:
        """Take in row ids (n,) and their scores (n, C); see `select_top_k`."""
        rows, scores = self._checked(rows, scores)
        if scores.size == 0:
            return
        if self.assign == "argmax":
            self._add_argmax(rows, scores)
        else:
            self._add_any(rows, scores)

    def merge(self, other: "TopK") -> None:
        """Take in the state of another part of the same stream, with no row in common."""
        mine = (self.k, self.assign, self.classes, self.floor)
        theirs = (other.k, other.assign, other.classes, other.floor)
        if mine != theirs:
            raise UsageError(f"cannot merge selections of different settings: {mine} and {theirs}")
        other._deal()
        for own, best in zip(self.best, other.best, strict=True):
            own.add(*best.filled())
        self.available += other.available
        self._deal()

    def selection(self) -> Selection:
        """What is kept so far; more may be added afterwards."""
        self._deal()
        kept = [best.ranked() for best in self.best]
        for c, (_, rows) in enumerate(kept):
            ids, times = np.unique(rows, return_counts=True)
            if ids.size < rows.size:
                raise DataError(
                    f"row id {ids[times.argmax()]} occurs more than once in the scores (seen in class {c}); "
                    "an image's identity is its shard and row: look for a shard that was given twice"
                )
        last = [scores[-1] if scores.size else np.float32(np.nan) for scores, _ in kept]
        return Selection(
            rows=tuple(rows for _, rows in kept),
            scores=tuple(scores for scores, _ in kept),
            available=self.available.copy(),
            threshold=np.array(last, np.float32),
        )

    def _checked(self, rows: Any, scores: Any) -> tuple[Ids, Scores]:
        rows, scores = np.asarray(rows), np.asarray(scores)
        if scores.ndim != 2 or scores.shape[1] != self.classes or rows.shape != scores.shape[:1]:
            raise DataError(
                f"a chunk has row ids of shape {rows.shape} and scores of shape {scores.shape}; "
                f"expected (n,) and (n, {self.classes})"
            )
        if rows.size and rows.dtype.kind not in "iu":
            raise DataError(f"row ids must be integers, found {rows.dtype}")
        if scores.dtype.kind != "f":
            raise DataError(f"scores must be float32, found {scores.dtype}")
        return rows.astype(np.int64, copy=False), np.ascontiguousarray(scores, np.float32)

    def _add_any(self, rows: Ids, scores: Scores) -> None:
        flat = scores.reshape(-1)  # (n * C,)
        if self.floor == -np.inf:
            self.available += len(rows)
        else:
            self.available += np.count_nonzero(scores >= self.floor, axis=0)
        step = max(1, BLOCK // self.classes) * self.classes  # whole rows
        for start in range(0, flat.size, step):
            hits = self._candidates(flat[start : start + step]) + start
            if hits.size:
                row, column = np.divmod(hits, self.classes)
                self._hold(column, flat[hits], rows[row])

    def _add_argmax(self, rows: Ids, scores: Scores) -> None:
        column = scores.argmax(axis=1)  # NaN counts as the highest, so that it is seen
        highest = scores[np.arange(len(rows)), column]  # (n,)
        enough = ~(highest < self.floor)
        self.available += np.bincount(column[enough], minlength=self.classes)
        hits = np.flatnonzero(~(highest < self.thresholds[column]))
        self._hold(column[hits], highest[hits], rows[hits])

    def _candidates(self, flat: Scores) -> NDArray[np.intp]:
        """Positions in `flat` (whole rows) of scores that are not below their class's threshold.

        "Not below" rather than "at least": a NaN is then a candidate, and is found at no cost.
        """
        size = flat.size
        padded = -(-size // 8) * 8
        self._less[size:padded] = True
        np.less(flat, self._tiled[:size], out=self._less[:size])
        words = np.flatnonzero(self._less[:padded].view(np.uint64) != ALL_LESS)
        if 8 * words.size > size:  # many: the detour over words does not pay
            return np.flatnonzero(~self._less[:size])
        word, byte = np.nonzero(~self._less[:padded].reshape(-1, 8)[words])
        return words[word] * 8 + byte

    def _hold(self, column: NDArray[np.intp], scores: Scores, rows: Ids) -> None:
        nan = np.isnan(scores)
        if nan.any():
            at = int(nan.argmax())
            raise DataError(
                f"the score of row {rows[at]} for class {column[at]} is NaN; such a row has no rank. "
                "Leave rows with non-finite logits out before selecting"
            )
        self._pending.append((column, scores, rows))
        self._pending_count += scores.size
        if self._pending_count >= PENDING:
            self._deal()

    def _deal(self) -> None:
        """Hand the pending candidates to their classes and raise the thresholds."""
        if self._pending:
            narrow = np.uint16 if self.classes <= 1 << 16 else np.int64  # 16 bits: a radix sort
            column = np.concatenate([c.astype(narrow) for c, _, _ in self._pending])
            scores = np.concatenate([s for _, s, _ in self._pending])
            rows = np.concatenate([r for _, _, r in self._pending])
            self._pending, self._pending_count = [], 0
            order = np.argsort(column, kind="stable")
            scores, rows = scores[order], rows[order]
            ends = np.cumsum(np.bincount(column, minlength=self.classes))
            for c in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
                part = slice(ends[c - 1] if c else 0, ends[c])
                self.best[c].add(scores[part], rows[part])
        for c, best in enumerate(self.best):
            self.thresholds[c] = max(best.threshold, self.floor)
        self._refresh()

    def _refresh(self) -> None:
        rows = max(1, BLOCK // max(1, self.classes))
        self._tiled = np.tile(self.thresholds, rows)
        self._less = np.empty(-(-self._tiled.size // 8) * 8, bool)


class _Best:
    """The k best (score, row id) of one class: a buffer that is cut back to k when 2k are in it."""

    def __init__(self, k: int):
        self.k, self.count, self.threshold = k, 0, np.float32(-np.inf)
        self.scores, self.rows = np.empty(0, np.float32), np.empty(0, np.int64)

    def filled(self) -> tuple[Scores, Ids]:
        return self.scores[: self.count], self.rows[: self.count]

    def add(self, scores: Scores, rows: Ids) -> None:
        at = 0
        while at < scores.size:
            self._make_room(scores.size - at)
            take = min(scores.size - at, self.scores.size - self.count)
            self.scores[self.count : self.count + take] = scores[at : at + take] + np.float32(0)  # no -0.0
            self.rows[self.count : self.count + take] = rows[at : at + take]
            self.count += take
            at += take

    def ranked(self) -> tuple[Scores, Ids]:
        """Scores and ids, best first, ties to the lower id."""
        self._cut()
        scores, rows = self.filled()
        order = np.lexsort((rows, -scores))
        return scores[order], rows[order]

    def _make_room(self, wanted: int) -> None:
        """Leave room for at least one more: grow up to 2k, then cut back to k."""
        size = min(2 * self.k, max(self.count + wanted, 2 * self.scores.size))
        if size > self.scores.size:
            self.scores = np.concatenate([self.scores, np.empty(size - self.scores.size, np.float32)])
            self.rows = np.concatenate([self.rows, np.empty(size - self.rows.size, np.int64)])
        elif self.count == self.scores.size:
            self._cut()

    def _cut(self) -> None:
        """Keep the k best: all above the k-th score, and of its equals the lowest ids."""
        if self.count < self.k:
            return
        scores, rows = self.filled()
        kth = np.partition(scores, self.count - self.k)[self.count - self.k]
        above = np.flatnonzero(scores > kth)
        equal = np.flatnonzero(scores == kth)
        missing = self.k - above.size
        if equal.size > missing:
            equal = equal[np.argpartition(rows[equal], missing - 1)[:missing]]
        keep = np.concatenate([above, equal])
        self.scores[: self.k], self.rows[: self.k] = scores[keep], rows[keep]
        self.count, self.threshold = self.k, kth


def upsample(counts: Sequence[int], k: int) -> list[Ids]:
    """How often each kept row is used so that a class with fewer than k of them adds up to k.

    The best ranks are used once more than the others where k is no multiple. A class with none stays
    empty. NoisyStudent repeats images in the same way (arXiv:1911.04252, section 3.1).

    Args:
        counts: rows kept per class.
        k: rows wanted per class.

    Returns:
        Per class, the repeat of each kept row, best first, (counts[c],), int64.
    """
    repeats = []
    for count in counts:
        whole, extra = divmod(max(k, count), count) if count else (0, 0)
        repeats.append(whole + (np.arange(count) < extra).astype(np.int64))
    return repeats


def checked_k(k: Any) -> int:
    """k as an int of at least 1, or a UsageError."""
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if number < 1 or isinstance(k, bool):
        raise UsageError(f"k (={k!r}) must be a whole number of at least 1: the images kept per class")
    return number


def checked_assign(assign: Any) -> Assign:
    """The assignment, or a UsageError that names both."""
    if assign not in ("any", "argmax"):
        raise UsageError(f'assign (={assign!r}) must be "any" or "argmax"')
    result: Assign = assign
    return result


def float32_floor(floor: float | None) -> np.float32:
    """The smallest float32 that is not below `floor`; minus infinity for None."""
    if floor is None:
        return np.float32(-np.inf)
    if np.isnan(floor):
        raise UsageError("min_log_odds is NaN; give a number, or leave it out")
    rounded = np.float32(floor)
    return rounded if float(rounded) >= floor else np.nextafter(rounded, np.float32(np.inf))
