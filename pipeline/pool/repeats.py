"""Exact repeats inside the pool, and keys that occur twice, in bounded memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUCKET_ROWS = 1 << 22  # rows compared at a time: about a quarter GiB


@dataclass(frozen=True, eq=False)
class Repeats:
    """Later rows with the pixels of an earlier one.

    Attributes:
        later: their ordinals (places in the whole pool), increasing, (r,), int64.
        first: the ordinal of the earliest row with the same pixels, (r,), int64.
    """

    later: NDArray[np.int64]
    first: NDArray[np.int64]

    def first_of(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """The earliest row with the same pixels, or -1 for a row that is no repeat."""
        place = np.searchsorted(self.later, ordinals)
        first = np.full(len(ordinals), -1, np.int64)
        inside = np.flatnonzero(place < len(self.later))
        repeat = inside[self.later[place[inside]] == ordinals[inside]]
        first[repeat] = self.first[place[repeat]]
        return first


Hashed = tuple[NDArray[np.int64], NDArray[np.uint64]]  # ordinals (n,), increasing; hashes (n, 2)


def find_repeats(rows: int, stream: Callable[[], Iterator[Hashed]]) -> Repeats:
    """Rows whose 128-bit hash occurred at a lower ordinal.

    Args:
        rows: about how many rows there are; beyond BUCKET_ROWS the stream is read several times, each
            time for the hashes of one bucket, so that memory stays bounded.
        stream: gives the hashes from the start, each time it is called.
    """
    later, first = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ordinals, begins in _sorted_buckets(rows, stream):
        group = np.cumsum(begins) - 1
        later.append(ordinals[~begins])
        first.append(ordinals[begins][group[~begins]])
    ordinals, firsts = np.concatenate(later), np.concatenate(first)
    order = np.argsort(ordinals)
    return Repeats(ordinals[order], firsts[order])


def count_repeats(rows: int, stream: Callable[[], Iterator[Hashed]]) -> int:
    """How many `find_repeats` would find, in memory that does not depend on it."""
    return sum(int(np.count_nonzero(~begins)) for _, begins in _sorted_buckets(rows, stream))


def _sorted_buckets(
    rows: int, stream: Callable[[], Iterator[Hashed]]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Ordinals by hash and then by themselves, and where another hash begins; a bucket at a time."""
    buckets = -(-max(rows, 1) // BUCKET_ROWS)
    for bucket in range(buckets):
        ordinals, hashes = _bucket(stream(), bucket, buckets)
        order = np.lexsort((ordinals, hashes[:, 1], hashes[:, 0]))
        ordinals, hashes = ordinals[order], hashes[order]
        begins = np.ones(len(ordinals), bool)
        begins[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
        yield ordinals, begins


def _bucket(stream: Iterator[Hashed], bucket: int, buckets: int) -> Hashed:
    """All rows of one bucket. The bucket is drawn from the hash's own low bits."""
    ordinals, hashes = [np.empty(0, np.int64)], [np.empty((0, 2), np.uint64)]
    for places, words in stream:
        mine = slice(None) if buckets == 1 else words[:, 1] % np.uint64(buckets) == bucket
        ordinals.append(places[mine])
        hashes.append(words[mine])
    return np.concatenate(ordinals), np.concatenate(hashes)
