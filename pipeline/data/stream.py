"""The order in which a run sees a pool that does not fit in memory: file by file, each use of an image once an epoch.

The files are permuted by (seed, epoch), the uses of the rows inside a file by (seed, epoch, file). The files
were dealt at random and are of one length, so that a batch, though it comes from one file or two, is a random
one. Any step can be had without those before it, from the files of its own batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.seeds import derive_seed, permutation


class Piece(NamedTuple):
    """A run of uses from one file: `begin` … `end` of `file_order(…, epoch, file)`."""

    epoch: int
    file: int
    begin: int
    end: int


class StreamOrder:
    """One epoch after another, each over all files.

    Args:
        uses: of the rows of each file in an epoch, (F,).
        seed: of the run.
    """

    def __init__(self, uses: Sequence[int] | NDArray[np.int64], seed: int) -> None:
        self.uses, self.seed = np.asarray(uses, np.int64), seed
        self.length = int(self.uses.sum())  # of an epoch
        self._epoch = lru_cache(maxsize=4)(self._epoch_files)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The uses `start` … `stop` of the endless sequence, in its order."""
        if not self.length or not 0 <= start <= stop:
            raise DataError(f"uses {start} … {stop} of a sequence of {self.length} cannot be drawn")
        found = []
        while start < stop:
            epoch, place = divmod(start, self.length)
            files, ends = self._epoch(epoch)
            at = int(np.searchsorted(ends, place, side="right"))
            file = int(files[at])
            first = int(ends[at] - self.uses[file])
            end = min(int(ends[at]), place + stop - start)
            found.append(Piece(epoch, file, place - first, end - first))
            start += end - place
        return found

    def next_file(self, piece: Piece) -> int:
        """The file whose turn comes after a piece's."""
        files, ends = self._epoch(piece.epoch)
        after = piece.epoch * self.length + int(ends[np.flatnonzero(files == piece.file)[0]])
        return self.pieces(after, after + 1)[0].file

    def _epoch_files(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Files in the order of an epoch, and where the uses of each end."""
        files = permutation(len(self.uses), self.seed, "order", "stream", epoch)
        return files, np.cumsum(self.uses[files])


def file_order(repeat: NDArray[np.int64], seed: int, epoch: int, file: int) -> NDArray[np.int64]:
    """Row numbers of a file in the order of their uses, int64 (Σ repeat,); row i occurs repeat[i] times.

    A row's uses are spread evenly from a random beginning, so that copies of one image seldom meet in a batch;
    none follows another directly where that can be avoided.
    """
    random = _random(seed, epoch, file)
    rows = np.repeat(np.arange(len(repeat)), repeat)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(repeat) - repeat, repeat)  # which use of its row it is
    when = (nth + np.repeat(random.random_sample(len(repeat)), repeat)) / np.repeat(repeat, repeat)
    order = rows[np.argsort(when, kind="stable")]
    return order if repeat.max(initial=1) == 1 else _apart(order, random)


def _apart(order: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.int64]:
    """Move uses that follow one of the same row to a place between two others, while there is one."""
    while len(same := np.flatnonzero(order[1:] == order[:-1])):
        row, rest = order[same[0]], np.delete(order, same[0])
        padded = np.concatenate([[-1], rest, [-1]])
        gaps = np.flatnonzero((padded[:-1] != row) & (padded[1:] != row))
        if not len(gaps):
            return order  # more than half of all uses are this row's
        order = np.insert(rest, gaps[random.randint(len(gaps))], row)
    return order


def _random(seed: int, epoch: int, file: int) -> np.random.RandomState:
    """NumPy froze the stream of `RandomState` (NEP 19)."""
    derived = derive_seed(seed, "order", "stream", epoch, file)
    return np.random.RandomState([derived & 0xFFFFFFFF, derived >> 32])
