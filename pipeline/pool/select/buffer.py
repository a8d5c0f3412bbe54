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
    """An entry is one 64-bit integer that is smaller where the entry is better: cut and sorted as numbers are.

    The upper half is the score as an integer that falls as it rises, the lower the row id, less `base`.
    """

    dtype = np.dtype(np.int64)

    def __init__(self, base: int):
        self.base = np.int64(base)

    @classmethod
    def of(cls, rows: Ids) -> "Packed | Paired":
        """For a stream that begins with these ids: from 0 on if they are ordinals, else around them."""
        low, high = (int(rows.min()), int(rows.max())) if rows.size else (0, 0)
        if high - low >= SPAN:
            return Paired()
        base = low - (SPAN - 1 - (high - low)) // 2  # ids in the middle
        return cls(0 if low >= 0 and high < SPAN else min(max(base, -(2**63)), 2**63 - SPAN))

    def holds(self, rows: Ids) -> bool:
        """Whether all these ids can be packed."""
        return bool(rows.size == 0 or (rows.min() >= self.base and int(rows.max()) < int(self.base) + SPAN))

    def pack(self, scores: Scores, rows: Ids) -> Entries:
        """Entries of scores and ids, (m,) each."""
        bits = (scores + np.float32(0)).view(np.int32)  # no -0.0: it equals 0.0
        entries = (~_rising(bits)).astype(np.int64)
        entries <<= 32
        entries += rows - self.base
        return entries

    def unpack(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids of entries."""
        bits = _rising(~(entries >> 32).astype(np.int32))  # its own inverse
        return bits.view(np.float32), (entries & np.int64(SPAN - 1)) + self.base

    def cut(self, entries: Entries, k: int) -> np.float32:
        """Move the k best of at least k to the front, in no order; the k-th score."""
        entries.partition(k - 1)
        return self.unpack(entries[k - 1 : k])[0][0]

    def ranked(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids, best first."""
        return self.unpack(np.sort(entries))


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

    def cut(self, entries: Entries, k: int) -> np.float32:
        """Move the k best of at least k to the front, in no order; the k-th score."""
        scores, rows = self.unpack(entries)
        kth: np.float32 = np.partition(scores, scores.size - k)[scores.size - k]
        above, ties = np.flatnonzero(scores > kth), np.flatnonzero(scores == kth)
        missing = k - above.size
        lowest = ties[np.argpartition(rows[ties], missing - 1)[:missing]]
        entries[:k] = entries[np.concatenate([above, lowest])]
        return kth

    def ranked(self, entries: Entries) -> tuple[Scores, Ids]:
        """Scores and ids, best first."""
        scores, rows = self.unpack(entries)
        order = np.lexsort((rows, -scores))
        return scores[order], rows[order]


class Buffer:
    """The k best entries of one class, and some more: it is cut back to k when about 1.5 k are in it.

    With each cut `threshold`, the lowest score that can still enter, rises. With half of k between two cuts, the cuts
    and the entries that a late threshold lets in cost about the same.
    """

    def __init__(self, k: int, kind: Packed | Paired):
        self.k, self.kind, self.room = k, kind, max(k // 2, LEAST_ROOM)
        self.count, self.threshold = 0, np.float32(-np.inf)
        self.slots = np.empty(0, kind.dtype)

    @property
    def entries(self) -> Entries:
        """What is in it, in no order: a view."""
        return self.slots[: self.count]

    def add(self, entries: Entries) -> None:
        """Take in entries, (m,)."""
        capacity = self.k + self.room
        if entries.size > self.room and self.count + entries.size > capacity:
            entries = np.concatenate([self.entries, entries])
            self.threshold = self.kind.cut(entries, self.k)
            self.count, entries = 0, entries[: self.k]
        elif self.count + entries.size > capacity:
            left = capacity - self.count
            self._append(entries[:left])
            self._cut()
            entries = entries[left:]
        self._append(entries)

    def ranked(self) -> tuple[Scores, Ids]:
        """The k best scores and their row ids, best first."""
        if self.count > self.k:
            self._cut()
        return self.kind.ranked(self.entries)

    def _append(self, entries: Entries) -> None:
        end = self.count + entries.size
        if end > self.slots.size:
            size = min(self.k + self.room, 2 * end)
            self.slots = np.concatenate([self.entries, np.empty(size - self.count, self.kind.dtype)])
        self.slots[self.count : end] = entries
        self.count = end

    def _cut(self) -> None:
        self.threshold = self.kind.cut(self.entries, self.k)
        self.count = self.k

    def change(self, kind: Packed | Paired) -> None:
        """Hold entries of another kind from now on."""
        self.slots = kind.pack(*self.kind.unpack(self.entries))
        self.kind = kind


def _rising(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of float32 as integers in the order of the floats, and back."""
    rising: NDArray[np.int32] = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return rising
