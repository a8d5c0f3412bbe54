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
from pipeline.pool.select.buffer import Buffer, Entries, Ids, Packed, Paired, Scores
from pipeline.pool.select.scan import columns, cores, count_at_least, in_threads, not_below, spans, tiled

Assign = Literal["any", "argmax"]
Hits = tuple[NDArray[Any], Entries]  # classes and entries of candidates, (m,) each

BY_CLASS = 1 / 8  # share of scores that can enter, above which classes are served one by one
LEAST_BY_CLASS = 256  # candidates per class and stretch that make up for a class's fixed cost
ROWS_BY_CLASS = 1 << 14  # between two looks at the thresholds
STRETCH = 1 << 22  # scores between two looks at the thresholds
LOOK = 1 << 20  # scores whose candidates are packed together
PENDING, PENDING_PER_CLASS = 1 << 16, 1 << 10  # candidates gathered before they are dealt out to their classes
BATCH = 1 << 17  # candidates sorted by class at a time
LEAST_THREADED = 1 << 19  # scores of a stretch that make up for handing it to threads
MOST_THREADS = 4  # memory is the limit


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

    Memory: at most 12·k·C bytes (18·k·C where row ids lie more than 2**32 apart), some KiB for each class that wait
    to be dealt out, and some ten MiB.

    Two ways to the same end. While much can still enter, a stretch of the chunk is transposed and every class takes
    what is not below its threshold. Once little can, the stretch is compared as it lies in memory, and what is
    found waits until there is enough to deal out.
    """

    def __init__(
        self,
        k: int,
        classes: int,
        assign: Assign = "any",
        *,
        min_log_odds: float | None = None,
        threads: int | None = None,
    ):
        self.k, self.assign, self.classes = checked_k(k), checked_assign(assign), classes
        self.floor = float32_floor(min_log_odds)
        self.threads = threads or min(MOST_THREADS, cores())
        self.available = np.zeros(classes, np.int64)
        self.kind: Packed | Paired | None = None  # of entries; known once there are row ids
        self.buffers: list[Buffer] = []
        self.thresholds = np.full(classes, self.floor, np.float32)  # (C,) a lower score cannot be kept
        self._share = 1.0  # of the scores looked at last, those that were not below
        self._tile: Scores | None = None  # the thresholds for a block; None when they have risen
        self._narrow = np.dtype(np.uint8 if classes <= 1 << 8 else np.uint16 if classes <= 1 << 16 else np.int64)
        self._pending: list[Hits] = []
        self._waiting = 0  # candidates in _pending

    def add(self, rows: Any, scores: Any) -> None:
        """Take in row ids (n,) and their scores (n, C); see `select_top_k`."""
        rows, scores = self._checked(rows, scores)
        if scores.size == 0:
            return
        self._fit(rows)
        if self.assign == "any" and self.floor == -np.inf:
            self.available += len(rows)
        begin = 0
        while begin < len(rows):
            entering = self._share * (len(rows) - begin)  # candidates of a class, about
            by_class = self.assign == "any" and self._share > BY_CLASS and entering > LEAST_BY_CLASS
            end = min(len(rows), begin + (ROWS_BY_CLASS if by_class else max(1, STRETCH // self.classes)))
            stretch = rows[begin:end], scores[begin:end]
            candidates = self._add_by_class(*stretch) if by_class else self._add_by_row(*stretch)
            self._share = candidates / stretch[1].size
            begin = end

    def merge(self, other: "TopK") -> None:
        """Take in the state of another part of the same stream, with no row in common."""
        mine = (self.k, self.assign, self.classes, self.floor)
        theirs = (other.k, other.assign, other.classes, other.floor)
        if mine != theirs:
            raise UsageError(f"cannot merge selections of different settings: {mine} and {theirs}")
        other._deal()
        for c, buffer in enumerate(other.buffers):
            if buffer.count:
                scores, rows = buffer.kind.unpack(buffer.entries)
                self._give(c, self._fit(rows).pack(scores, rows))
        self.available += other.available

    def selection(self) -> Selection:
        """What is kept so far; more may be added afterwards."""
        self._deal()
        self._fit(np.empty(0, np.int64))
        parts = spans(self.classes, self.threads)
        kept = [pair for part in in_threads(self._ranked, parts) for pair in part]
        last = [scores[-1] if scores.size else np.float32(np.nan) for scores, _ in kept]
        return Selection(
            rows=tuple(rows for _, rows in kept),
            scores=tuple(scores for scores, _ in kept),
            available=self.available.copy(),
            threshold=np.array(last, np.float32),
        )

    def _ranked(self, classes: slice) -> list[tuple[Scores, Ids]]:
        kept = [buffer.ranked() for buffer in self.buffers[classes]]
        for c, (_, rows) in enumerate(kept, classes.start):
            ids = np.sort(rows)
            twice = np.flatnonzero(ids[1:] == ids[:-1])
            if twice.size:
                raise DataError(
                    f"row id {ids[twice[0]]} occurs more than once in the scores (seen in class {c}); "
                    "an image's identity is its shard and row: look for a shard that was given twice"
                )
        return kept

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

    def _fit(self, rows: Ids) -> Packed | Paired:
        """A kind of entries that holds these ids too."""
        if self.kind is None:
            self.kind = Packed.of(rows)
            self.buffers = [Buffer(self.k, self.kind) for _ in range(self.classes)]
        elif not self.kind.holds(rows):
            self._deal()
            self.kind = Paired()
            for buffer in self.buffers:
                buffer.change(self.kind)
        return self.kind

    def _add_by_class(self, rows: Ids, scores: Scores) -> int:
        """Class by class; the number of scores that were not below their threshold."""
        if self.floor > -np.inf:
            self.available += count_at_least(scores, self.floor)
        parts = spans(self.classes, self.threads)
        return sum(in_threads(lambda classes: self._take_columns(rows, scores, classes), parts))

    def _take_columns(self, rows: Ids, scores: Scores, classes: slice) -> int:
        candidates = 0
        for c, column in zip(range(self.classes)[classes], columns(scores[:, classes]), strict=True):
            hits = (~(column < self.thresholds[c])).nonzero()[0]  # a NaN is not below
            candidates += hits.size
            if hits.size:
                self._give(c, self._entries(c, column.take(hits), rows.take(hits)))
        return candidates

    def _add_by_row(self, rows: Ids, scores: Scores) -> int:
        """Row by row; the number of scores that were not below their threshold."""
        if self._tile is None:
            self._tile = tiled(self.thresholds)
        parts = spans(len(rows), self.threads if scores.size >= LEAST_THREADED else 1)
        look = self._look_argmax if self.assign == "argmax" else self._look_any
        results = in_threads(lambda part: look(rows[part], scores[part]), parts)
        candidates = 0
        for available, hits in results:
            self.available += available
            candidates += sum(column.size for column, _ in hits)
            self._pending.extend(hits)
        self._waiting += candidates
        if self._waiting >= max(PENDING, PENDING_PER_CLASS * self.classes):
            self._deal()
        return candidates

    def _look_any(self, rows: Ids, scores: Scores) -> tuple[Ids | int, list[Hits]]:
        assert self._tile is not None
        available = count_at_least(scores, self.floor) if self.floor > -np.inf else 0
        hits = []
        step = max(1, LOOK // self.classes)
        for begin in range(0, len(rows), step):
            places, values = not_below(scores[begin : begin + step].reshape(-1), self._tile)
            if places.size:
                row = places // self.classes
                column = places - row * self.classes
                row += begin
                hits.append((column.astype(self._narrow), self._entries(column, values, rows.take(row))))
        return available, hits

    def _look_argmax(self, rows: Ids, scores: Scores) -> tuple[Ids | int, list[Hits]]:
        column = scores.argmax(axis=1)  # NaN counts as the highest, so that it is seen
        highest = scores[np.arange(len(rows)), column]  # (n,)
        available = np.bincount(column[~(highest < self.floor)], minlength=self.classes)
        hits = np.flatnonzero(~(highest < self.thresholds[column]))
        column = column[hits]
        return available, [(column.astype(self._narrow), self._entries(column, highest[hits], rows[hits]))]

    def _deal(self) -> None:
        """Hand the pending candidates to their classes: sorted by class in batches that stay in the cache."""
        if not self._pending:
            return
        column = np.concatenate([column for column, _ in self._pending])
        entries = np.concatenate([entries for _, entries in self._pending])
        self._pending, self._waiting = [], 0
        edges = np.zeros((self.classes + 1, -(-column.size // BATCH)), np.intp)  # where a class begins in a batch
        for batch, start in enumerate(range(0, column.size, BATCH)):
            part = slice(start, start + BATCH)
            entries[part] = entries[part].take(np.argsort(column[part], kind="stable"))
            np.cumsum(np.bincount(column[part], minlength=self.classes), out=edges[1:, batch])
            edges[:, batch] += start
        for c in np.flatnonzero((edges[1:] > edges[:-1]).any(axis=1)).tolist():
            pieces = zip(edges[c].tolist(), edges[c + 1].tolist(), strict=True)
            self._give(c, np.concatenate([entries[a:b] for a, b in pieces]))

    def _give(self, c: int, entries: Entries) -> None:
        """Candidates to class c; its threshold rises."""
        buffer = self.buffers[c]
        buffer.add(entries)
        if buffer.threshold > self.thresholds[c]:
            self.thresholds[c] = buffer.threshold
            self._tile = None

    def _entries(self, column: NDArray[np.intp] | int, scores: Scores, rows: Ids) -> Entries:
        """Entries of candidates; a NaN ends the selection."""
        assert self.kind is not None
        if scores.size and np.isnan(np.maximum.reduce(scores)):
            at = int(np.isnan(scores).argmax())
            c = column if isinstance(column, int) else column[at]
            raise DataError(
                f"the score of row {rows[at]} for class {c} is NaN; such a row has no rank. "
                "Leave rows with non-finite logits out before selecting"
            )
        return self.kind.pack(scores, rows)


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
