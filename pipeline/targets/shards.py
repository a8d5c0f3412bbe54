"""Training shards in memory, encoded: the present one and the one that comes next."""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.order import file_order
from pipeline.targets.numbers import stored_rows
from pipeline.targets.store import BATCH, TargetsStore

HELD = 2  # shards in memory


@dataclass(eq=False)
class TrainingShard:
    """One training shard of n rows, read whole.

    Attributes:
        file: its number.
        images: encoded, in parts of consecutive rows.
        begins: first row of each part.
        distributions: as stored, (n, C).
        repeat: uses in an epoch, (n,).
    """

    file: int
    images: list[pa.LargeBinaryArray]
    begins: NDArray[np.int64]
    distributions: NDArray[Any]
    repeat: NDArray[np.int64]
    _order: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """`file_order` of an epoch; the last one is kept."""
        if (seed, epoch) not in self._order:
            self._order = {(seed, epoch): file_order(self.repeat, seed, epoch, self.file)}
        return self._order[seed, epoch]

    def take(self, rows: NDArray[np.int64]) -> list[bytes]:
        """The encoded images of these rows."""
        parts = np.searchsorted(self.begins, rows, side="right") - 1
        places = zip(parts.tolist(), (rows - self.begins[parts]).tolist(), strict=True)
        return [self.images[part][row].as_py() for part, row in places]


def read_shard(store: TargetsStore, file: int) -> TrainingShard:
    """Read a training shard; every page or image is checked.

    Raises:
        TargetsError: it was changed since the store was opened, or is damaged.
    """
    parts = list(store.read_file(file, ["image", "distribution", "repeat"], BATCH))
    none = np.empty((0, len(store.class_names)), np.float32)
    stored = [stored_rows(part.column("distribution"), store.dtype) for part in parts]
    return TrainingShard(
        file=file,
        images=[part.column("image") for part in parts],
        begins=np.cumsum([0, *(part.num_rows for part in parts)])[:-1],
        distributions=np.concatenate(stored) if stored else none,
        repeat=np.concatenate([np.empty(0, np.int64), *(part.column("repeat").to_numpy() for part in parts)]),
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
        self._held: OrderedDict[int, Future[TrainingShard]] = OrderedDict()

    def get(self, file: int) -> TrainingShard:
        """A shard; it counts as used last."""
        self._start(file)
        self._held.move_to_end(file)
        return self._held[file].result()

    def prepare(self, file: int) -> None:
        """Have a shard read that will be asked for next."""
        if self.ahead:
            self._start(file)

    def close(self) -> None:
        """Let go of all."""
        self._held.clear()
        self._reader.shutdown(cancel_futures=True)

    def _start(self, file: int) -> None:
        if file in self._held:
            return
        while len(self._held) >= HELD:
            self._held.popitem(last=False)[1].cancel()
        self._held[file] = self._reader.submit(read_shard, self.store, file)
