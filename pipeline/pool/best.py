"""The k best of one class, gathered a few at a time.

Of two scores the higher is better, and of equal scores the lower row id: a total order. A (score, row id) is an
entry, and entries are one array, so that they are moved, cut and sorted together. Two kinds: `Packed` for row ids
within 2**32 of each other, as numbers of rows are, and `Paired` for any.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Entries = NDArray[Any]  # (m,), of one kind

LEAST_ROOM = 256  # entries beyond k, so that a small k is not cut at every turn
SPAN = 1 << 32


class Packed:
    """An entry is one 64-bit integer that is greater where the entry is better: cut and sorted as numbers are.

    The upper half is the score as an integer that rises with it, the lower how far the row id is from the last of
    the ids base … base + 2**32 - 1.
    """

    dtype = np.dtype(np.int64)

    def __init__(self, base: int):
        self.base = base
        self.last = np.int64(base + SPAN - 1)

    @classmethod
    def of(cls, rows: Ids) -> "Packed | Paired":
        """For a stream that begins with these ids: from 0 on if they are ordinals, else around them."""
        low, high = int(rows.min()), int(rows.max())
        base = 0 if 0 <= low and high < SPAN else low - SPAN // 2
        found = cls(base) if -(2**63) <= base <= 2**63 - SPAN else Paired()
        return found if found.holds(rows) else Paired()

    def holds(self, rows: Ids) -> bool:
        """Whether all these ids can be packed."""
        return bool(rows.size == 0 or (rows.min() >= self.base and rows.max() <= self.last))

    def pack(self, scores: Scores, rows: Ids) -> Entries:
        """Entries of scores and ids, (m,) each."""
        bits = (scores + np.float32(0)).view(np.int32)  # no -0.0: it equals 0.0
        entries = _rising(bits).astype(np.int64)
        entries <<= 32
        entries += self.last - rows
        return entries

    def unpack(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids of entries."""
        bits = _rising((entries >> 32).astype(np.int32))  # its own inverse
        return bits.view(np.float32), self.last - (entries & np.int64(SPAN - 1))

    def cut(self, entries: Entries, k: int) -> tuple[Entries, np.float32]:
        """The k best, in no order, and the k-th score; moves `entries`, of which there are at least k."""
        entries.partition(entries.size - k)
        kept = entries[-k:]
        return kept, self.unpack(kept[:1])[0][0]

    def ranked(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids, best first."""
        return self.unpack(np.sort(entries)[::-1])


class Paired:
    """An entry is a score beside an id: for ids further apart than 2**32."""

    dtype = np.dtype([("score", np.float32), ("row", np.int64)])

    def holds(self, rows: Ids) -> bool:
        """Always."""
        return True

    def pack(self, scores: Scores, rows: Ids) -> Entries:
        """Entries of scores and ids, (m,) each."""
        entries = np.empty(scores.size, self.dtype)
        np.add(scores, np.float32(0), out=entries["score"])  # no -0.0: it equals 0.0
        entries["row"] = rows
        return entries

    def unpack(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids of entries."""
        return np.ascontiguousarray(entries["score"]), np.ascontiguousarray(entries["row"])

    def cut(self, entries: Entries, k: int) -> tuple[Entries, np.float32]:
        """The k best, in no order, and the k-th score, of at least k entries."""
        scores, rows = self.unpack(entries)
        kth = np.partition(scores, scores.size - k)[scores.size - k]
        above, ties = np.flatnonzero(scores > kth), np.flatnonzero(scores == kth)
        missing = k - above.size
        lowest = ties[np.argpartition(rows[ties], missing - 1)[:missing]]
        return entries[np.concatenate([above, lowest])], kth

    def ranked(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids, best first."""
        scores, rows = self.unpack(entries)
        order = np.lexsort((rows, -scores))
        return scores[order], rows[order]


class Best:
    """The k best entries of one class: a buffer that is cut back to k when about 1.25 k are in it.

    With each cut `threshold`, the lowest score that can still enter, rises. A quarter of k between two cuts is where
    the cuts and the entries that a late threshold lets in cost about the same.
    """

    def __init__(self, k: int, kind: Packed | Paired):
        self.k, self.kind, self.capacity = k, kind, k + max(k // 4, LEAST_ROOM)
        self.count, self.threshold = 0, np.float32(-np.inf)
        self.buffer = np.empty(0, kind.dtype)

    @property
    def entries(self) -> Entries:
        """What is in the buffer, in no order: a view."""
        return self.buffer[: self.count]

    def add(self, entries: Entries) -> None:
        """Take in entries, (m,)."""
        end = self.count + entries.size
        if end > self.capacity:
            entries, self.threshold = self.kind.cut(np.concatenate([self.entries, entries]), self.k)
            self.count, end = 0, self.k
        if end > self.buffer.size:
            size = min(self.capacity, 2 * end)
            self.buffer = np.concatenate([self.entries, np.empty(size - self.count, self.kind.dtype)])
        self.buffer[self.count : end] = entries
        self.count = end

    def ranked(self) -> tuple[Scores, Ids]:
        """The k best scores and their row ids, best first."""
        entries = self.entries
        if self.count > self.k:
            entries, _ = self.kind.cut(entries.copy(), self.k)
        return self.kind.ranked(entries)

    def change(self, kind: Packed | Paired) -> None:
        """Hold entries of another kind from now on."""
        self.buffer = kind.pack(*self.kind.unpack(self.entries))
        self.kind = kind


def _rising(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of float32 as integers in the order of the floats, and back."""
    found: NDArray[np.int32] = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return found
