"""Choosing a few examples among very many rows, in memory that does not grow with their number."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Places = NDArray[np.int64]


def spread(rows: int, wanted: int) -> tuple[Places, int]:
    """Places in a ranking of `rows`: a third from its top, a third from between, a third from its end.

    Returns:
        The places, increasing, at most `wanted`; and how many of them belong to the top, and as many to the end
        (0: the ranking is short and shown whole).
    """
    if rows <= wanted:
        return np.arange(rows), 0
    third = wanted // 3
    between = wanted - 2 * third
    inner = rows - 2 * third  # at least `between`, so the places differ
    middle = third + ((2 * np.arange(between) + 1) * inner) // (2 * between)
    return np.concatenate([np.arange(third), middle, np.arange(rows - third, rows)]), third


def scramble(shard: int, rows: Places) -> NDArray[np.float64]:
    """A number in [0, 1) for each (shard, row), (n,): a sample by it is the same in any order of reading.

    Source: the finaliser of SplitMix64, Steele, Lea and Flood 2014.
    """
    x = rows.astype(np.uint64) + np.uint64((shard * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64


class TopRows:
    """The `n` rows with the highest value in each group, ties to those that came first.

    Holds groups × n rows, and those of one `add`.
    """

    def __init__(self, groups: int, n: int, schema: pa.Schema) -> None:
        self.n = n
        self._worst = np.full(groups, -np.inf)  # what a row must exceed
        self._group = np.empty(0, np.int64)
        self._value = np.empty(0, np.float64)
        self._rows = schema.empty_table()

    def add(self, group: Places, value: NDArray[np.float64], rows: pa.Table) -> None:
        """Offer rows (m,) with their groups and values; NaN and minus infinity are passed over."""
        good = np.flatnonzero(value > self._worst[group])
        if not len(good) or not self.n:
            return
        self._group = np.concatenate([self._group, group[good]])
        self._value = np.concatenate([self._value, value[good]])
        order = np.lexsort((-self._value, self._group))  # stable: ties stay in the order of arrival
        sorted_ = self._group[order]
        place = np.arange(len(order)) - np.searchsorted(sorted_, sorted_)
        full = order[place == self.n - 1]
        self._worst[self._group[full]] = self._value[full]
        order = order[place < self.n]
        self._group, self._value = self._group[order], self._value[order]
        self._rows = pa.concat_tables([self._rows, rows.take(pa.array(good))]).take(pa.array(order)).combine_chunks()

    def of(self, group: int) -> tuple[NDArray[np.float64], list[dict[str, Any]]]:
        """Values of a group, highest first, and its rows."""
        first, last = np.searchsorted(self._group, [group, group + 1])
        return self._value[first:last], self._rows.slice(first, last - first).to_pylist()
