"""Which scores of a chunk can still be among the best: a comparison of every score, as near to memory's speed as
numpy comes. All functions let other threads run while they compare."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Places = NDArray[np.intp]
Part = TypeVar("Part")
Result = TypeVar("Result")

BLOCK = 1 << 18  # scores compared at a time: 1 MiB, so that what is found is still in the cache
ALL_TRUE = np.uint64(0x0101010101010101)  # eight booleans, all of them true
BLOCK_TRANSPOSED = 1 << 20  # scores of the columns that are transposed together
STRIP = 1 << 16  # scores transposed at a time


def tiled(thresholds: Scores) -> Scores:
    """Thresholds (C,) repeated for the whole rows of a block, (m * C,)."""
    return np.tile(thresholds, max(1, BLOCK // max(1, thresholds.size)))


def not_below(flat: Scores, tile: Scores) -> tuple[Places, Scores]:
    """Places in `flat` (whole rows), and scores there, that are not below their class's threshold.

    "Not below" rather than "at least": a NaN is then found too, at no cost.
    """
    places, values = [], []
    padded = np.empty(-(-tile.size // 64) * 64, bool)
    for start in range(0, flat.size, tile.size):
        part = flat[start : start + tile.size]
        less = padded[: -(-part.size // 64) * 64]
        less[part.size :] = True
        np.less(part, tile[: part.size], out=less[: part.size])
        hits = _false_places(less)
        if hits.size:
            values.append(part.take(hits))
            hits += start
            places.append(hits)
    if not places:
        return np.empty(0, np.intp), np.empty(0, np.float32)
    return np.concatenate(places), np.concatenate(values)


def _false_places(flags: NDArray[np.bool_]) -> Places:
    """Where `flags`, a multiple of 64 long, is false.

    By lines of 64, then words of 8, then one by one, and only in those that have any: where one in a hundred is
    false, a plain search costs more than all comparisons, in branches that the processor cannot foresee.
    """
    words = flags.view(np.uint64)
    mixed = words != ALL_TRUE  # (n / 8,)
    lines = mixed.view(np.uint64)
    line = (lines != 0).nonzero()[0]  # of booleans far quicker than of integers
    inside = lines.take(line).view(bool).nonzero()[0]
    word = line.take(inside >> 3) * 8 + (inside & 7)
    inside = (words.take(word) ^ ALL_TRUE).view(bool).nonzero()[0]
    places: Places = word.take(inside >> 3) * 8 + (inside & 7)
    return places


def columns(scores: Scores) -> Iterator[Scores]:
    """The columns of (n, C) one by one, contiguous (n,), each valid until the next is asked for.

    Some columns are transposed together, in strips that stay in the cache.
    """
    rows, classes = scores.shape
    group = min(classes, max(16, BLOCK_TRANSPOSED // max(1, rows)))
    strip = max(256, STRIP // group)
    block = np.empty((group, rows), np.float32)
    for first in range(0, classes, group):
        width = min(group, classes - first)
        for start in range(0, rows, strip):
            part = slice(start, start + strip)
            block[:width, part] = scores[part, first : first + width].T
        yield from block[:width]


def count_at_least(scores: Scores, floor: np.float32) -> NDArray[np.int64]:
    """How many scores of each column of (n, C) are at least `floor`, (C,)."""
    rows, classes = scores.shape
    side = max(1, 8192 // classes)  # rows side by side, so that sums run over long lines
    lines = rows // side
    body = scores[: lines * side].reshape(lines, side * classes)
    counts = np.zeros(side * classes, np.int64)
    for start in range(0, lines, 255):  # sums that fit into a byte
        enough = (body[start : start + 255] >= floor).view(np.uint8)
        counts += np.add.reduce(enough, axis=0, dtype=np.uint8)
    rest = np.count_nonzero(scores[lines * side :] >= floor, axis=0)
    total: NDArray[np.int64] = counts.reshape(side, classes).sum(axis=0) + rest
    return total


def spans(size: int, parts: int) -> list[slice]:
    """0 … size in at most `parts` slices of nearly equal length, none of them empty."""
    edges = [size * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` of every part, in order; the first in this thread, the others beside it."""
    others = [_pool(len(parts) - 1, os.getpid()).submit(work, part) for part in parts[1:]]
    try:
        first = [work(part) for part in parts[:1]]
    finally:
        wait(others)
    return first + [other.result() for other in others]


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, "select")
