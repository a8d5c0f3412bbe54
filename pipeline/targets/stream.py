"""A pool that does not fit in memory: its training shards are read in turn and decoded ahead of the student.

What a step gets is a pure function of (seed, step, batch), whatever was asked for before: the order is
`pipeline.data.order`'s. In memory are the encoded images of two training shards and a few decoded batches.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import decode, default_workers
from pipeline.data.order import StreamOrder
from pipeline.errors import TargetsError
from pipeline.targets.layout import REMEDY
from pipeline.targets.numbers import normalised
from pipeline.targets.shards import ShardsInMemory
from pipeline.targets.store import ROWS, TargetsStore

AHEAD = 4  # batches that are decoded before they are asked for
CHUNK = 32  # images that a thread decodes at a time, at most
ALL = slice(None)
Pixels = NDArray[np.uint8]


class _Wanted(NamedTuple):
    """What a batch depends on beside the step: the uses `first` … `last` of `batch` are this process's."""

    seed: int
    batch: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch under way: pixels by chunks (m, 3, S, S), distributions (n, C)."""

    chunks: list[Callable[[], Pixels]]
    distributions: NDArray[np.float32]


class StreamedPool:
    """The pool of a store, as `StudentData` takes it; `close()` it, or use it in a `with`.

    Args:
        store: opened.
        size: side of the decoded images, pixels.
        workers: threads that decode ahead; 0: nothing is done ahead; None: `default_workers`.
    """

    def __init__(self, store: TargetsStore, size: int, *, workers: int | None = None) -> None:
        self.store, self.size, self.uses = store, size, store.uses()
        workers = default_workers(size) if workers is None else workers
        self._threads = ThreadPoolExecutor(workers, "decode") if workers else None
        self._shards = ShardsInMemory(store, ahead=workers > 0)
        self._order: StreamOrder | None = None
        self._queue: deque[_Batch] = deque()
        self._head: tuple[_Wanted, int] | None = None  # what the first batch of the queue is

    def __len__(self) -> int:
        return self.store.count

    def draw(self, seed: int, step: int, batch: int, part: slice = ALL) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 (n, 3, S, S), and q_large, float32 (n, C), of `part` of the batch of a step.

        Raises:
            TargetsError: a training shard was changed or removed, or an image no longer decodes.
        """
        places = range(batch)[part]
        assert places.step == 1, part
        wanted = _Wanted(seed, batch, places.start, max(places.start, places.stop))
        if self._head != (wanted, step):
            self._forget()
            self._head = wanted, step
        while len(self._queue) <= (AHEAD if self._threads else 0):
            self._queue.append(self._begin(wanted, step + len(self._queue)))
        found = self._queue.popleft()
        self._head = wanted, step + 1
        pixels = np.empty((len(places), 3, self.size, self.size), np.uint8)
        at = 0
        for chunk in found.chunks:
            decoded = chunk()
            pixels[at : at + len(decoded)] = decoded
            at += len(decoded)
        return torch.from_numpy(pixels), torch.from_numpy(found.distributions)

    def close(self) -> None:
        """Stop working ahead, and let go of what is in memory."""
        self._forget()
        self._shards.close()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _forget(self) -> None:
        self._queue.clear()
        self._head = None

    def _begin(self, wanted: _Wanted, step: int) -> _Batch:
        """Collect the encoded images of a batch and have them decoded."""
        if self._order is None or self._order.seed != wanted.seed:
            self._order = StreamOrder(self.uses, wanted.seed)
        start = step * wanted.batch
        chunks: list[Callable[[], Pixels]] = []
        stored = [np.empty((0, len(self.store.class_names)), np.float16)]
        for piece in self._order.pieces(start + wanted.first, start + wanted.last):
            shard = self._shards.get(piece.file)
            self._shards.prepare(self._order.next_file(piece))
            rows = shard.order(wanted.seed, piece.epoch)[piece.begin : piece.end]
            stored.append(shard.distributions[rows])
            for at in range(0, len(rows), CHUNK):
                some = rows[at : at + CHUNK]
                chunks.append(self._decoded(shard.take(some), shard.file, some))
        return _Batch(chunks, normalised(np.concatenate(stored)))

    def _decoded(self, images: Sequence[bytes], file: int, rows: NDArray[np.int64]) -> Callable[[], Pixels]:
        """The pixels of some rows, (m, 3, S, S), now or later."""

        def work() -> Pixels:
            return decode_all(images, self.size, lambda at, why: self._complaint(file, int(rows[at]), why))

        return work if self._threads is None else self._threads.submit(work).result

    def _complaint(self, file: int, row: int, why: str) -> TargetsError:
        """Says which image of the pool it is."""
        path = self.store.folder / self.store.manifest["pool"]["files"][file]["name"]
        places = [
            place
            for part in self.store.read_file(file, ["shard", "row", "key"], ROWS)
            for place in zip(*(part.column(i).to_pylist() for i in range(3)), strict=True)
        ]
        shard, origin, key = places[row]
        where = f"row {row} (shard {shard} row {origin}, {key})"
        return TargetsError(f"{path}: {where} no longer decodes: {why}; {REMEDY}")


def decode_all(images: Sequence[bytes], size: int, complaint: Callable[[int, str], Exception]) -> Pixels:
    """Pixels, uint8 (n, 3, size, size), of encoded images; what does not decode raises `complaint(place, why)`."""
    pixels = np.empty((len(images), 3, size, size), np.uint8)
    for at, image in enumerate(images):
        found, status, detail = decode(image, size)
        if found is None:
            raise complaint(at, f"{status}, {detail}")
        pixels[at] = found.transpose(2, 0, 1)
    return pixels
