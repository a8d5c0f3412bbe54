"""The order in which a run sees its images: a pure function of (seed, step).

Images in memory come in one permutation after another. A pool that does not fit in memory is streamed file by file,
each use of an image once an epoch: the files are permuted by (seed, epoch), the uses of the rows inside a file by
(seed, epoch, file). Images were assigned to files at random and the files are of one length, so that a batch, though it
comes from one file or two, is a random one. Any step can be made without those before it, from the files of its own
batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.seeds import permutation, random_stream


def batch_indices(n: int, batch: int, seed: int, purpose: str, step: int) -> np.ndarray:
    """The images of one step: a pure function of the arguments.

    The order is one seeded permutation of range(n) after another, an epoch each; a step takes the next
    `batch` of that sequence, so an epoch's remainder is not lost and a batch may be larger than n.

    Returns:
        int64 (batch,), values in [0, n).
    """
    if n < 1 or batch < 1 or step < 0:
        raise DataError(f"a batch of {batch} from {n} images at step {step} cannot be drawn")
    start, stop = step * batch, (step + 1) * batch
    runs = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _epoch_order(n, seed, purpose, epoch)
        runs.append(order[max(start - epoch * n, 0) : stop - epoch * n])
    return np.concatenate(runs)


@lru_cache(maxsize=8)
def _epoch_order(n: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    return permutation(n, seed, "order", purpose, epoch)


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
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.length)
            files, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            file = int(files[place])
            first = int(ends[place] - self.uses[file])
            end = min(int(ends[place]), offset + stop - start)
            pieces.append(Piece(epoch, file, offset - first, end - first))
            start += end - offset
        return pieces

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

    A row's uses are spread evenly from a random start, so that copies of one image rarely meet in a batch;
    none follows another directly where that can be avoided.
    """
    random = random_stream(seed, "order", "stream", epoch, file)
    rows = np.repeat(np.arange(len(repeat)), repeat)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(repeat) - repeat, repeat)  # which use of its row it is
    time = (nth + np.repeat(random.random_sample(len(repeat)), repeat)) / np.repeat(repeat, repeat)
    order = rows[np.argsort(time, kind="stable")]
    return order if repeat.max(initial=1) == 1 else _separated(order, random)


def _separated(order: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.int64]:
    """Move uses that follow one of the same row to a place between two others, while there is one."""
    while len(same := np.flatnonzero(order[1:] == order[:-1])):
        row, rest = order[same[0]], np.delete(order, same[0])
        padded = np.concatenate([[-1], rest, [-1]])
        gaps = np.flatnonzero((padded[:-1] != row) & (padded[1:] != row))
        if not len(gaps):
            return order  # more than half of all uses are this row's
        order = np.insert(rest, gaps[random.randint(len(gaps))], row)
    return order
