"""SVHN's cropped digits as its authors give them: train_32x32.mat, test_32x32.mat and extra_32x32.mat.

`X` is (32, 32, 3, N), uint8; `y` is (N, 1) from 1 to 10, where 10 is the digit 0.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pipeline.data.readers.matlab import Variable, find_variable
from pipeline.data.readers.raw import PIXELS, SIDE, ppm_images
from pipeline.data.readers.shard import NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, fingerprint, opened, quick_fingerprint

ZERO = 10  # how `y` says 0
ROWS_PER_SHARD = 50_000
CHUNK = 1_024  # images in memory at a time


@dataclass(frozen=True)
class SvhnShard(Shard):
    """The images `first` … `end` of a file.

    The images are one compressed stream, so that reading begins by inflating all that lie before `first`: about
    a second for every 50,000. Memory does not depend on the file's size.
    """

    name: str
    path: Location
    first: int
    end: int
    with_labels: bool = True

    def rows(self) -> int:
        return self.end - self.first

    def fingerprint(self) -> str:
        with _errors(self.path):
            return fingerprint([quick_fingerprint(self.path), self.first, self.end])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        rows = range(*slice(start, stop).indices(self.rows()))
        labels = self.labels() if self.with_labels else np.full(self.rows(), NO_LABEL)
        stem = self.path.name.split(".", 1)[0]
        with _variable(self.path, "X") as images:
            images.skip((self.first + rows.start) * PIXELS)
            for row in range(rows.start, rows.stop, CHUNK):
                count = min(CHUNK, rows.stop - row)
                pixels = images.read(count * PIXELS).reshape(count, PIXELS)
                for i, image in enumerate(ppm_images(pixels, column_major=True), start=row):
                    yield Sample(i, f"{stem}-{self.first + i:08d}", image, int(labels[i]))

    def labels(self) -> np.ndarray:
        if not self.with_labels:
            return np.full(self.rows(), NO_LABEL, np.int64)
        with _variable(self.path, "y") as variable:
            variable.skip(self.first)
            labels = variable.read(self.rows()).astype(np.int64)
        return np.where(labels == ZERO, 0, labels)

    def class_names(self) -> tuple[str, ...]:
        return tuple(str(digit) for digit in range(10))


def svhn_shards(name: str, path: Location, with_labels: bool) -> list[SvhnShard]:
    """A file's images in shards of 50,000; one of no more than that keeps its name.

    Raises:
        DataError: the file is missing, or is no MAT-file of format 5 with such `X` and `y`.
    """
    with _variable(path, "X") as images:
        shape, dtype = images.shape, images.dtype
    if len(shape) == 3:
        shape = (*shape, 1)  # MATLAB drops a last dimension of one
    if len(shape) != 4 or shape[:3] != (SIDE, SIDE, 3) or dtype != np.uint8:
        raise DataError(f"{path}: X is {shape} of {dtype}; SVHN's is (32, 32, 3, N) of uint8")
    count = shape[3]
    with _variable(path, "y") as variable:
        labels = math.prod(variable.shape)
    if labels != count:
        raise DataError(f"{path}: X has {count:,} images and y {labels:,} labels")
    if count <= ROWS_PER_SHARD:
        return [SvhnShard(name, path, 0, count, with_labels)]
    return [
        SvhnShard(f"{name}-{number:05d}", path, first, min(first + ROWS_PER_SHARD, count), with_labels)
        for number, first in enumerate(range(0, count, ROWS_PER_SHARD))
    ]


@contextmanager
def _variable(path: Location, name: str) -> Iterator[Variable]:
    with _errors(path), opened(path) as file:
        yield find_variable(file, name)


@contextmanager
def _errors(path: Location) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except DataError as error:
        raise DataError(f"{path} cannot be read: {error}; get it again") from error
    except (OSError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; it was cut short, or is another format") from error
