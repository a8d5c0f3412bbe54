"""Decoded images, in memory or, where they are too many for it, in a file that processes and restarts share."""

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.data.decode import WHOLE, Framing, Skipped, Status, decode_stream
from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, RunError
from pipeline.storage.files import remove_leftovers, whole_file

MEMORY_LIMIT = 4 << 30  # bytes
SHA256 = b"mpl.pixels_sha256"  # in the index: `_digest` of the pixels
BLOCK = 16 << 20  # bytes
PIXELS, INDEX, LOCK = ".pixels", ".parquet", ".lock"
Decoded = tuple[tuple[str, Sample], np.ndarray | None, Status, str]


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
    place: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int = 0,
    framing: Framing = WHOLE,
) -> Images:
    """Decode a stream of (shard name, sample) to `size` × `size` pixels, keeping its order.

    Args:
        samples: as `Split.read()` gives them.
        size: side in pixels.
        place: a name, without an ending, for the files that hold the set once it exceeds `memory_limit` bytes; to
            be used for these samples in this size alone. One process writes them, and all that name the same
            place map them, also at a later start. None keeps the set in memory.
        memory_limit: bytes.
        workers: threads that decode (Pillow releases the interpreter's lock); 0 = in this one.
        framing: how images of another shape become squares; of `place`, too, always the same.

    Raises:
        DataError: no entry gave an image.
        RunError: `place` cannot be written.
    """
    if place is not None and (mapped := _mapped(place, size)):
        return mapped
    decoding = _Decoding(size)
    stream = decode_stream(samples, size, workers, data_of=lambda entry: entry[1].data, framing=framing)
    for entry in stream:
        decoding.add(*entry)
        if place is not None and decoding.nbytes > memory_limit:
            return _through_a_file(place, decoding, stream)
    return decoding.images(decoding.tensor())


class _Decoding:
    """A set on its way: what happened to each entry so far, and the pixels that are not yet elsewhere."""

    def __init__(self, size: int) -> None:
        self.size, self.nbytes = size, 0
        self.pixels: list[np.ndarray] = []  # (3, S, S)
        self.columns: dict[str, list[Any]] = {name: [] for name in ("shard", "row", "key", "label", "status", "detail")}

    def add(self, entry: tuple[str, Sample], image: np.ndarray | None, status: Status, detail: str) -> None:
        shard, sample = entry
        values = (shard, sample.row, sample.key, sample.label, str(status), detail)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        if image is not None:
            self.pixels.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
            self.nbytes += image.nbytes

    def tensor(self) -> Tensor:
        """The pixels, uint8 (N, 3, S, S); given up one by one, so that no second copy of the set is held."""
        whole = torch.empty((len(self.pixels), 3, self.size, self.size), dtype=torch.uint8)
        for i in reversed(range(len(self.pixels))):
            whole[i] = torch.from_numpy(self.pixels.pop())
        return whole

    def images(self, pixels: Tensor) -> Images:
        """The set, with its pixels.

        Raises:
            DataError: there are none.
        """
        ok, columns = str(Status.ok), self.columns
        places = [i for i, status in enumerate(columns["status"]) if status == ok]
        skipped = [
            Skipped(shard, row, key, Status(status), detail)
            for shard, row, key, _, status, detail in zip(*columns.values(), strict=True)
            if status != ok
        ]
        if not places:
            first = f"; the first: {skipped[0].key}: {skipped[0].detail}" if skipped else ""
            raise DataError(f"no image could be decoded, of {len(skipped)} entries{first}")
        shards, rows, keys, labels = ([columns[name][i] for i in places] for name in ("shard", "row", "key", "label"))
        return Images(pixels, torch.tensor(labels), keys, shards, np.array(rows, dtype=np.int64), skipped)


def _through_a_file(place: Path, decoding: _Decoding, rest: Iterator[Decoded]) -> Images:
    """Write what is decoded and the rest to `place`, unless another process has done so meanwhile."""
    folder = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK)
        lock.acquire()  # while another process decodes
    except OSError as error:
        raise RunError(f"decoded images cannot be kept in {folder}: {error.strerror or error}") from error
    try:
        if mapped := _mapped(place, decoding.size):
            return mapped
        remove_leftovers(folder)
        with whole_file(_beside(place, PIXELS)) as temporary, temporary.open("wb") as file:
            while True:
                for image in decoding.pixels:
                    file.write(image.data)
                decoding.pixels.clear()
                if (entry := next(rest, None)) is None:
                    break
                decoding.add(*entry)
            file.flush()
            digest = _digest(temporary)
        with whole_file(_beside(place, INDEX)) as temporary:  # last: what has an index is complete
            table = pa.table(decoding.columns).replace_schema_metadata({SHA256: digest})
            pq.write_table(table, temporary)
        mapped = _mapped(place, decoding.size, verified=True)
    finally:
        lock.release()
    if mapped is None:
        raise RunError(f"{_beside(place, PIXELS)} was changed while it was written; run the same command again")
    return mapped


def _mapped(place: Path, size: int, *, verified: bool = False) -> Images | None:
    """The set that lies complete and unchanged at `place`, or None; `verified` pixels are not read for that."""
    decoding, pixels, index = _Decoding(size), _beside(place, PIXELS), _beside(place, INDEX)
    if not index.exists():
        return None
    try:
        table = pq.read_table(index)
        decoding.columns = {name: table[name].to_pylist() for name in decoding.columns}
        shape = (decoding.columns["status"].count(str(Status.ok)), 3, size, size)
        if pixels.stat().st_size != math.prod(shape):
            return None
        known = (table.schema.metadata or {}).get(SHA256)
        if not verified and (known is None or known != _digest(pixels).encode()):
            return None
    except (OSError, ValueError, KeyError):  # absent, or damaged
        return None
    try:
        # Not mode "c": a private mapping that may be written is refused beyond the machine's memory.
        array = np.memmap(pixels, np.uint8, "r", shape=shape)
    except OSError as error:
        raise RunError(f"{pixels} cannot be mapped into memory: {error.strerror or error}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return decoding.images(torch.from_numpy(array))


def _digest(path: Path) -> str:
    """SHA-256 of the digests of a file's blocks; all cores work at it."""

    def of_block(begin: int) -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            return hashlib.sha256(file.read(BLOCK)).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        blocks = threads.map(of_block, range(0, path.stat().st_size, BLOCK))
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _beside(place: Path, ending: str) -> Path:
    return place.with_name(place.name + ending)
