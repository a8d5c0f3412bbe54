"""Decoded images in memory, and the order in which a run sees them."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decode import Skipped, decode_stream
from pipeline.data.shards import Sample
from pipeline.errors import DataError
from pipeline.seeds import permutation

CHUNK = 256  # images packed, and written out, at a time
__all__ = ["Images", "Skipped", "batch_indices", "load_images"]

MEMORY_LIMIT = 4 << 30  # bytes


@dataclass(frozen=True)
class Images:
    """A decoded set. Row i of every field is one image; (shard, row) is its identity."""

    images: Tensor
    """uint8 (N, 3, S, S), in memory or mapped from a file; read only."""
    labels: Tensor
    """int64 (N,), -1 = none."""
    keys: list[str]
    shards: list[str]
    rows: np.ndarray
    """int64 (N,): the row inside the shard."""
    skipped: list[Skipped]
    """Entries that are not among the N, and why."""

    def __len__(self) -> int:
        return len(self.keys)


def load_images(
    samples: Iterable[tuple[str, Sample]],
    size: int,
    *,
    cache: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int = 0,
) -> Images:
    """Decode a stream of (shard name, sample) to `size` × `size` pixels, keeping its order.

    Args:
        samples: as `Split.read()` gives them.
        size: side in pixels.
        cache: a folder for a nameless temporary file that holds the pixels once they exceed
            `memory_limit` bytes; None keeps them in memory.
        memory_limit: bytes.
        workers: threads that decode (Pillow releases the interpreter's lock); 0 = in this one.

    Raises:
        DataError: no entry gave an image, or `cache` cannot be written.
    """
    pixels = _Pixels(size, cache, memory_limit)
    labels, keys, shards, rows, skipped = [], [], [], [], []
    stream = decode_stream(samples, size, workers, data_of=lambda entry: entry[1].data)
    for (shard, sample), image, status, detail in stream:
        if image is None:
            skipped.append(Skipped(shard, sample.row, sample.key, status, detail))
            continue
        pixels.add(image)
        labels.append(sample.label)
        keys.append(sample.key)
        shards.append(shard)
        rows.append(sample.row)
    if not keys:
        first = f"; the first: {skipped[0].key}: {skipped[0].detail}" if skipped else ""
        raise DataError(f"no image could be decoded, of {len(skipped)} entries{first}")
    return Images(pixels.tensor(), torch.tensor(labels), keys, shards, np.array(rows, dtype=np.int64), skipped)


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
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _epoch_order(n, seed, purpose, epoch)
        parts.append(order[max(start - epoch * n, 0) : stop - epoch * n])
    return np.concatenate(parts)


@lru_cache(maxsize=8)
def _epoch_order(n: int, seed: int, purpose: str, epoch: int) -> np.ndarray:
    return permutation(n, seed, "order", purpose, epoch)


class _Pixels:
    """Grows by one image at a time: in memory until a limit, and in a file from there on."""

    def __init__(self, size: int, cache: Path | None, memory_limit: int) -> None:
        self.size, self.cache, self.memory_limit = size, cache, memory_limit
        self.images: list[np.ndarray] = []  # not yet in a chunk
        self.chunks: list[np.ndarray] = []  # not yet in the file
        self.count = 0
        self.file: IO[bytes] | None = None

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 (S, S, 3)."""
        self.images.append(image)
        self.count += 1
        if len(self.images) >= CHUNK:
            self._pack()

    def tensor(self) -> Tensor:
        """All images, uint8 (N, 3, S, S)."""
        self._pack()
        shape = (self.count, 3, self.size, self.size)
        if self.file is not None:
            with self.file:  # the mapping outlives it
                # Mode "c": pages are read as they are needed, and nothing is ever written back.
                return torch.from_numpy(np.memmap(self.file, np.uint8, "c", shape=shape))
        whole = torch.empty(shape, dtype=torch.uint8)
        start = 0
        self.chunks.reverse()
        while self.chunks:  # freed one by one, so that no second copy of the set is held
            chunk = self.chunks.pop()
            whole[start : start + len(chunk)] = torch.from_numpy(chunk)
            start += len(chunk)
        return whole

    def _pack(self) -> None:
        if not self.images:
            return
        self.chunks.append(np.ascontiguousarray(np.stack(self.images).transpose(0, 3, 1, 2)))  # (n, 3, S, S)
        self.images.clear()
        held = self.count * self.chunks[-1][0].nbytes
        if self.cache is not None and (self.file is not None or held > self.memory_limit):
            self._spill(self.cache)

    def _spill(self, cache: Path) -> None:
        try:
            if self.file is None:
                cache.mkdir(parents=True, exist_ok=True)
                self.file = tempfile.TemporaryFile(prefix="images-", dir=cache)  # noqa: SIM115  # lives on
            for chunk in self.chunks:
                self.file.write(chunk.data)
            self.file.flush()
        except OSError as error:
            raise DataError(
                f"decoded images cannot be kept in {cache}: {error.strerror or error}. "
                "Free some space, choose another folder or a smaller image size"
            ) from error
        self.chunks.clear()
