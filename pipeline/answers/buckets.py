"""Answers in any order, of any number of teachers, put in the images' order: by way of buckets on disk."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

BUCKET_BYTES = 64 << 20  # of the distributions of a bucket
WAITING_BYTES = 64 << 20  # of rows that wait to be written to buckets
SAME = 1e-4  # two answers whose probabilities differ by less agree
SUFFIX = ".rows"
SOURCE_BITS = 40  # of a row's number in its file; above them the file's number


def remove_buckets(folder: Path) -> None:
    """Remove the buckets in a folder, and the folder if nothing else is in it."""
    for path in folder.glob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or holds what is not ours
        folder.rmdir()


class Buckets:
    """Rows on disk, by runs of images.

    Args:
        folder: that holds them.
        split: their name.
        images: of the split, N.
        classes: C_T.
        embedding: E, numbers that follow a distribution.

    Attributes:
        doubled: rows that repeat what was said of an image, of those that were merged.
    """

    def __init__(self, folder: Path, split: str, images: int, classes: int, embedding: int = 0) -> None:
        self.folder, self.split, self.images, self.classes = folder, split, images, classes
        row = ("p", "<f4", (classes + embedding,))
        self.kind = np.dtype([("image", "<i8"), ("source", "<i8"), ("teacher", "<i4"), row])
        self.span = max(1, BUCKET_BYTES // self.kind.itemsize)  # images of a bucket
        self._waiting: list[NDArray[Any]] = []
        self._bytes = 0
        self.doubled = 0

    def add(
        self, images: NDArray[np.int64], teachers: NDArray[np.int32], sources: NDArray[np.int64], p: NDArray[np.float32]
    ) -> None:
        """Take in n rows: the ordinal of each one's image, whose answer it is, from where, and the distribution."""
        if not len(images):
            return
        rows = np.empty(len(images), self.kind)
        rows["image"], rows["source"], rows["teacher"], rows["p"] = images, sources, teachers, p
        self._waiting.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= WAITING_BYTES:
            self._flush()

    def merged(self, name: Callable[[int], str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(ordinals (m,), increasing; distributions (m, C_T)) of the answered images, by buckets.

        Args:
            name: of an image, for messages.

        Raises:
            DataError: two answers of one teacher about one image differ.
        """
        self._flush()
        for number in range(-(-self.images // self.span)):
            path = self._path(number)
            if path.exists():
                yield self._one(np.fromfile(path, self.kind), name)
                path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}{SUFFIX}"

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting, self._bytes = [], 0
        bucket = rows["image"] // self.span
        if (np.diff(bucket) < 0).any():
            order = np.argsort(bucket, kind="stable")
            rows, bucket = rows[order], bucket[order]
        numbers, begins = np.unique(bucket, return_index=True)
        for number, begin, end in zip(numbers.tolist(), begins, [*begins[1:], len(rows)], strict=True):
            with self._path(number).open("ab") as file:
                rows[begin:end].tofile(file)

    def _one(self, rows: NDArray[Any], name: Callable[[int], str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if not (np.diff(rows["image"]) > 0).all():
            rows = rows[np.lexsort((rows["source"], rows["teacher"], rows["image"]))]
            again = (np.diff(rows["image"]) == 0) & (np.diff(rows["teacher"]) == 0)
            if again.any():
                later = np.flatnonzero(again) + 1
                apart = np.abs(rows["p"][later] - rows["p"][later - 1])[:, : self.classes].max(axis=1)
                if len(differ := np.flatnonzero(~(apart <= SAME))):
                    a, b = rows[later[differ[0]] - 1], rows[later[differ[0]]]
                    raise DataError(
                        f"two answers about {name(int(a['image']))} disagree, by {apart[differ[0]]:.3g} in a "
                        f"probability: rows {_row(a):,} and {_row(b):,} of its "
                        "predictions. If they are two teachers': --predictions once for each"
                    )
                self.doubled += len(later)
                rows = np.delete(rows, later)
        begins = np.flatnonzero(np.diff(rows["image"], prepend=-1))
        if len(begins) == len(rows):
            return rows["image"], rows["p"]
        counts = np.diff(np.append(begins, len(rows)))
        mean = np.add.reduceat(rows["p"], begins, axis=0) / counts[:, None].astype(np.float32)
        return rows["image"][begins], mean.astype(np.float32)


def _row(row: Any) -> int:
    """Its number in its file."""
    return int(row["source"]) & ((1 << SOURCE_BITS) - 1)
