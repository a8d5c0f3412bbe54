"""Which image an answer is of: the key, with or without suffix, or shard and row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.data.readers.suffixes import IMAGE_SUFFIXES
from pipeline.storage.texts import hash_texts

NOBODY, SEVERAL = -1, -2  # in the place of an image: it is of none; its key is that of more than one
SUFFIX = rf"(?i)({'|'.join(re.escape(suffix) for suffix in sorted(IMAGE_SUFFIXES))})$"
BATCH = 1 << 16  # images whose keys are gathered at a time
Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Keys:
    """Texts that can be looked up: hashed, sorted, and compared in full where a hash agrees."""

    texts: pa.LargeStringArray
    hashes: NDArray[np.uint64] = field(init=False)
    order: Places = field(init=False)

    def __post_init__(self) -> None:
        hashes = hash_texts(self.texts)[:, 0]
        order = np.argsort(hashes, kind="stable")
        object.__setattr__(self, "hashes", hashes[order])
        object.__setattr__(self, "order", order)

    def find(self, wanted: pa.Array) -> Places:
        """The place of each of n texts, NOBODY or SEVERAL, (n,)."""
        if not len(self.order):
            return np.full(len(wanted), NOBODY, np.int64)
        hashes = hash_texts(wanted)[:, 0]
        left = np.searchsorted(self.hashes, hashes, side="left")
        count = np.searchsorted(self.hashes, hashes, side="right") - left
        place = self.order[np.minimum(left, len(self.order) - 1)]
        same = pc.equal(self.texts.take(pa.array(place)), wanted.cast(pa.large_string()))
        equal = np.asarray(pc.fill_null(same, False))
        return np.where(count == 0, NOBODY, np.where(count > 1, SEVERAL, np.where(equal, place, NOBODY))).astype(
            np.int64
        )


class SplitIndex:
    """The images of a split, in order, by key and by shard and row. An image's ordinal is its place in the split.

    Memory: about 100 bytes an image beside its key.

    Attributes:
        names: of the shards.
        offsets: ordinal of each shard's first image, and the number of images, (shards + 1,).
        rows: row of each image in its shard, (N,).
        keys: of the images, (N,).
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        rows: list[NDArray[np.int64]] = []
        keys: list[pa.Array] = []
        counts = []
        for shard in shards:
            count = 0
            waiting: list[tuple[int, str]] = []
            for identity in shard.identities():
                waiting.append(identity)
                if len(waiting) == BATCH:
                    count += _gather(waiting, rows, keys)
            counts.append(count + _gather(waiting, rows, keys))
        self.names = [shard.name for shard in shards]
        self.offsets = np.cumsum([0, *counts]).astype(np.int64)
        self.rows = np.concatenate([np.empty(0, np.int64), *rows])
        self.keys = pa.concat_arrays([pa.array([], pa.large_string()), *keys])
        self._whole = Keys(self.keys)
        self._stems = Keys(without_suffix(self.keys))
        self._shards = {name: place for place, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.rows)

    def by_key(self, keys: pa.Array) -> Places:
        """The ordinal of each key, NOBODY or SEVERAL, (n,): as it stands; else without the image's suffix; else without
        its own."""
        found = self._whole.find(keys)
        for index, wanted in ((self._stems, keys), (self._whole, without_suffix(keys))):
            left = np.flatnonzero(found == NOBODY)
            if len(left):
                found[left] = index.find(wanted.take(pa.array(left)))
        return found

    def by_place(self, shards: pa.Array, rows: NDArray[np.int64]) -> Places:
        """The ordinal of each image of a shard and a row in it, or NOBODY, (n,)."""
        encoded = shards.dictionary_encode()
        numbers = np.array(
            [*(self._shards.get(name, NOBODY) for name in encoded.dictionary.to_pylist()), NOBODY], np.int64
        )
        number = numbers[np.asarray(pc.fill_null(encoded.indices, -1))]
        found = np.full(len(rows), NOBODY, np.int64)
        for shard in np.unique(number[number >= 0]).tolist():
            mine = np.flatnonzero(number == shard)
            begin, end = self.offsets[shard : shard + 2].tolist()
            held = self.rows[begin:end]
            place = np.searchsorted(held, rows[mine])
            inside = np.flatnonzero(place < len(held))
            inside = inside[held[place[inside]] == rows[mine][inside]]
            found[mine[inside]] = begin + place[inside]
        return found


def without_suffix(keys: pa.Array) -> pa.Array:
    """Keys without the suffix of an image."""
    return pc.replace_substring_regex(keys.cast(pa.large_string()), SUFFIX, "")


def _gather(waiting: list[tuple[int, str]], rows: list[NDArray[np.int64]], keys: list[pa.Array]) -> int:
    """Move identities into arrays; how many."""
    count = len(waiting)
    rows.append(np.array([row for row, _ in waiting], np.int64))
    keys.append(pa.array([key for _, key in waiting], pa.large_string()))
    waiting.clear()
    return count
