"""Files of raw pixels in records of fixed length: CIFAR-10's binary version and TinyImages' tiny_images.bin.

Sources: the formats as their authors describe them, https://www.cs.toronto.edu/~kriz/cifar.html ("binary version":
a byte of label, then 1,024 bytes each of red, green and blue, row by row) and the readme of TinyImages (3,072 bytes,
each channel column by column, as MATLAB keeps arrays). A sample's bytes are a PPM: the pixels themselves behind a
header of 13 bytes, which is as quick to decode as anything that Pillow reads, and loses nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np

from pipeline.data.readers.shard import NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, fingerprint, is_local, opened, quick_fingerprint, storage_errors

SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes of an image
PPM = b"P6\n%d %d\n255\n" % (SIDE, SIDE)
RECORDS_PER_SHARD = 20_000
CHUNK = 1_024  # records read at a time
EDGE = 1 << 16  # bytes at either end of a shard that its fingerprint is of
RawReader = Literal["cifar-binary", "tinyimages-bin"]


@dataclass(frozen=True)
class RawShard(Shard):
    """The records `first` … `end` of a file."""

    name: str
    path: Location
    reader: RawReader
    first: int
    end: int
    with_labels: bool = True

    def rows(self) -> int:
        return self.end - self.first

    def fingerprint(self) -> str:
        """Of the whole file's ETag in object storage; on disk of its length and both ends of this shard."""
        size, start, stop = self._record, self.first * self._record, self.end * self._record
        with self._open() as file:
            if not is_local(self.path):
                return fingerprint([quick_fingerprint(self.path), self.first, self.end])
            digest = hashlib.sha256(f"{self.path.stat().st_size} {size} {start} {stop}".encode())
            file.seek(start)
            digest.update(file.read(min(EDGE, stop - start)))
            file.seek(max(start, stop - EDGE))
            digest.update(file.read(min(EDGE, stop - start)))
        return digest.hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        rows = range(*slice(start, stop).indices(self.rows()))
        stem = self.path.name.split(".", 1)[0]
        for records, row in self._records(rows):
            labels = self._labels(records)
            pixels = records[:, self._record - PIXELS :]  # (n, 3072)
            images = ppm_images(pixels, column_major=self.reader == "tinyimages-bin")
            for i, image in enumerate(images):
                key = f"{stem}-{self.first + row + i:08d}"  # the place in the file, by which people know an image
                yield Sample(row + i, key, image, labels[i])

    def labels(self) -> np.ndarray:
        runs = [self._labels(records) for records, _ in self._records(range(self.rows()))]
        return np.array([label for run in runs for label in run], dtype=np.int64)

    @property
    def _record(self) -> int:
        """Bytes."""
        return PIXELS + (self.reader == "cifar-binary")

    def _labels(self, records: np.ndarray) -> list[int]:
        if self.with_labels and self.reader == "cifar-binary":
            return records[:, 0].tolist()
        return [NO_LABEL] * len(records)

    def _records(self, rows: range) -> Iterator[tuple[np.ndarray, int]]:
        """Runs of records, uint8 (n, bytes), each with its first row."""
        with self._open() as file:
            file.seek((self.first + rows.start) * self._record)
            for row in range(rows.start, rows.stop, CHUNK):
                count = min(CHUNK, rows.stop - row)
                data = file.read(count * self._record)
                if len(data) < count * self._record:
                    raise DataError(
                        f"{self.path} ends in record {self.first + row + len(data) // self._record:,}: it has become "
                        "shorter since it was opened"
                    )
                yield np.frombuffer(data, np.uint8).reshape(count, self._record), row

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with _errors(self.path), opened(self.path) as file:
            yield file


def raw_shards(name: str, path: Location, reader: RawReader, with_labels: bool) -> list[RawShard]:
    """A file's records in shards of 20,000; one of no more than that keeps its name.

    Raises:
        DataError: the file is missing, or its length is no multiple of the record's.
    """
    record = PIXELS + (reader == "cifar-binary")
    with _errors(path), storage_errors():
        size = path.stat().st_size
    if size % record:
        raise DataError(
            f"{path} has {size:,} bytes, which is no multiple of {record:,}, the length of a record of {reader}: "
            "it was cut short or is another format; get it again"
        )
    count = size // record
    if count <= RECORDS_PER_SHARD:
        return [RawShard(name, path, reader, 0, count, with_labels)]
    starts = range(0, count, RECORDS_PER_SHARD)
    return [
        RawShard(f"{name}-{number:05d}", path, reader, first, min(first + RECORDS_PER_SHARD, count), with_labels)
        for number, first in enumerate(starts)
    ]


def ppm_images(pixels: np.ndarray, *, column_major: bool) -> list[bytes]:
    """Planar pixels, uint8 (n, 3072), as PPM files.

    Args:
        pixels: channel after channel.
        column_major: each channel is stored column by column.
    """
    order = (0, 3, 2, 1) if column_major else (0, 2, 3, 1)
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(order)  # (n, 32, 32, 3)
    whole = np.ascontiguousarray(images).tobytes()
    return [PPM + whole[start : start + PIXELS] for start in range(0, len(whole), PIXELS)]


@contextmanager
def _errors(path: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
