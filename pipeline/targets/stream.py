"""A pool that does not fit in memory: its training shards are read in turn and decoded ahead of the student.

What a step gets is a pure function of (seed, step, batch), whatever was asked for before: the order is
`pipeline.data.order`'s. In memory are the encoded images of two training shards and a few decoded batches.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.decode import decode, default_workers
from pipeline.data.order import StreamOrder, file_order
from pipeline.errors import TargetsError
from pipeline.targets.files import TARGETS
from pipeline.targets.store import BATCH, ROWS, TargetsStore, joined, normalised, stored_embeddings, stored_rows

SHARDS = 2  # training shards in memory
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
    """A batch under way: pixels by chunks (m, 3, S, S), distributions and embeddings (n, C + E)."""

    chunks: list[Callable[[], Pixels]]
    distributions: NDArray[np.float32]


class StreamedPool:
    """The pool of a store, as `StudentData` takes it; `close()` it, or use it in a `with`.

    Args:
        store: opened.
        size: side of the decoded images, pixels.
        workers: threads that decode ahead; 0: nothing is done ahead; None: `default_workers`.
        embeddings: whether they follow the distributions.
    """

    def __init__(self, store: TargetsStore, size: int, *, workers: int | None = None, embeddings: bool = True) -> None:
        self.store, self.size, self.uses, self.embeddings = store, size, store.uses(), embeddings
        workers = default_workers(size) if workers is None else workers
        self._threads = ThreadPoolExecutor(workers, "decode") if workers else None
        self._shards = ShardsInMemory(store, ahead=workers > 0)
        self._order: StreamOrder | None = None
        self._queue: deque[_Batch] = deque()
        self._head: tuple[_Wanted, int] | None = None  # what the first batch of the queue is

    def __len__(self) -> int:
        return self.store.count

    def draw(self, seed: int, step: int, batch: int, part: slice = ALL) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 (n, 3, S, S), and q_large with the embedding, float32 (n, C + E), of `part` of a step's batch.

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
        current = self._queue.popleft()
        self._head = wanted, step + 1
        pixels, begin = np.empty((len(places), 3, self.size, self.size), np.uint8), 0
        for chunk in current.chunks:
            decoded = chunk()
            pixels[begin : begin + len(decoded)] = decoded
            begin += len(decoded)
        return torch.from_numpy(pixels), torch.from_numpy(current.distributions)

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
        embeddings = [np.empty((0, self.store.embedding), np.float32)]
        for piece in self._order.pieces(start + wanted.first, start + wanted.last):
            shard = self._shards.get(piece.file)
            self._shards.prepare(self._order.next_file(piece))
            rows = shard.order(wanted.seed, piece.epoch)[piece.begin : piece.end]
            stored.append(shard.distributions[rows])
            embeddings.append(shard.embeddings[rows])
            for begin in range(0, len(rows), CHUNK):
                some = rows[begin : begin + CHUNK]
                chunks.append(self._decoded(shard.take(some), shard.file, some))
        q = normalised(np.concatenate(stored))
        return _Batch(chunks, joined(q, np.concatenate(embeddings)) if self.embeddings else q)

    def _decoded(self, images: Sequence[bytes], file: int, rows: NDArray[np.int64]) -> Callable[[], Pixels]:
        """The pixels of some rows, (m, 3, S, S), now or later."""

        def work() -> Pixels:
            return decode_all(images, self.size, lambda place, why: self._complaint(file, int(rows[place]), why))

        return work if self._threads is None else self._threads.submit(work).result

    def _complaint(self, file: int, row: int, why: str) -> TargetsError:
        """Says which image of the pool it is."""
        path = self.store.folder / self.store.manifest["pool"]["files"][file]["name"]
        places = [
            place
            for batch in self.store.read_file(file, ["shard", "row", "key"], ROWS)
            for place in zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True)
        ]
        shard, origin, key = places[row]
        where = f"row {row} (shard {shard} row {origin}, {key})"
        return TargetsError(f"{path}: {where} no longer decodes: {why}; {TARGETS.remedy}")


@dataclass(eq=False)
class TrainingShard:
    """One training shard of n rows, read whole.

    Attributes:
        file: its number.
        images: encoded, in arrays of consecutive rows.
        begins: first row of each array.
        distributions: as stored, (n, C).
        embeddings: (n, E), float32.
        repeat: uses in an epoch, (n,).
    """

    file: int
    images: list[pa.LargeBinaryArray]
    begins: NDArray[np.int64]
    distributions: NDArray[Any]
    embeddings: NDArray[np.float32]
    repeat: NDArray[np.int64]
    _order: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """`file_order` of an epoch; the last one is kept."""
        if (seed, epoch) not in self._order:
            self._order = {(seed, epoch): file_order(self.repeat, seed, epoch, self.file)}
        return self._order[seed, epoch]

    def take(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The encoded images of these rows."""
        arrays = np.searchsorted(self.begins, rows, side="right") - 1
        places = zip(arrays.tolist(), (rows - self.begins[arrays]).tolist(), strict=True)
        return [self.images[array][place].as_py() for array, place in places]


def read_shard(store: TargetsStore, file: int) -> TrainingShard:
    """Read a training shard; every page or image is checked.

    Raises:
        TargetsError: it was changed since the store was opened, or is damaged.
    """
    batches = list(store.read_file(file, ["image", "repeat", *store.of_teacher], BATCH))
    none = np.empty((0, len(store.class_names)), np.float32)
    stored = [stored_rows(batch.column("distribution"), store.dtype) for batch in batches]
    return TrainingShard(
        file=file,
        images=[batch.column("image") for batch in batches],
        begins=np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1],
        distributions=np.concatenate(stored) if stored else none,
        embeddings=np.concatenate(
            [np.empty((0, store.embedding), np.float32), *(stored_embeddings(b, store.embedding) for b in batches)]
        ),
        repeat=np.concatenate([np.empty(0, np.int64), *(batch.column("repeat").to_numpy() for batch in batches)]),
    )


class ShardsInMemory:
    """At most two training shards; the next is read by a thread while the present one is used.

    Args:
        store: opened.
        ahead: whether `prepare` does anything.
    """

    def __init__(self, store: TargetsStore, *, ahead: bool) -> None:
        self.store, self.ahead = store, ahead
        self._reader = ThreadPoolExecutor(1, "read")
        self._shards: OrderedDict[int, Future[TrainingShard]] = OrderedDict()

    def get(self, file: int) -> TrainingShard:
        """A shard; it counts as used last."""
        self._start(file)
        self._shards.move_to_end(file)
        return self._shards[file].result()

    def prepare(self, file: int) -> None:
        """Have a shard read that will be asked for next."""
        if self.ahead:
            self._start(file)

    def close(self) -> None:
        """Let go of all."""
        self._shards.clear()
        self._reader.shutdown(cancel_futures=True)

    def _start(self, file: int) -> None:
        if file in self._shards:
            return
        while len(self._shards) >= SHARDS:
            self._shards.popitem(last=False)[1].cancel()
        self._shards[file] = self._reader.submit(read_shard, self.store, file)


def decode_all(images: Sequence[bytes], size: int, complaint: Callable[[int, str], Exception]) -> Pixels:
    """Pixels, uint8 (n, 3, size, size), of encoded images; what does not decode raises `complaint(place, why)`."""
    pixels = np.empty((len(images), 3, size, size), np.uint8)
    for place, image in enumerate(images):
        decoded, status, detail = decode(image, size)
        if decoded is None:
            raise complaint(place, f"{status}, {detail}")
        pixels[place] = decoded.transpose(2, 0, 1)
    return pixels
