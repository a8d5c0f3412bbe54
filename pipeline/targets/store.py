"""Opening and reading a finished store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.correction import CORRECTION_FILE, Correction, load_correction
from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, TargetsError
from pipeline.storage.files import Location, is_local
from pipeline.storage.tables import fixed_numbers
from pipeline.targets.files import EMBEDDING_ITEM, ITEM, TARGETS, Dtype, record_batches
from pipeline.targets.manifest import check_files, in_threads, read_manifest

CACHED = 1 << 17  # numbers that stay in the processor's cache between the passes over them
BATCH = 256  # rows with images that are read at a time
ROWS = 1024  # rows without
HASHED = 4 << 30  # bytes; larger stores are hashed on request only, their pages and images always


@dataclass(frozen=True, eq=False)
class LabelledTargets:
    """The teacher's view of the labelled images: n of them, in the split's order.

    Attributes:
        keys: for people.
        shard, row: identity.
        labels: (n,), int64.
        distributions: (n, C), float32, rows sum to 1.
        embeddings: (n, E), float32; E is 0 where the store has none.
    """

    keys: list[str]
    shard: list[str]
    row: NDArray[np.int64]
    labels: NDArray[np.int64]
    distributions: NDArray[np.float32]
    embeddings: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """Some rows of the pool: encoded images with identity, distributions (n, C), embeddings (n, E), repeats (n,)."""

    samples: list[tuple[str, Sample]]
    distributions: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    repeats: NDArray[np.int64]


class TargetsStore:
    """A finished store, checked when it was opened. Nothing is read before it is asked for.

    Attributes:
        folder: targets/.
        manifest: the content of _manifest.json.
        class_names: of the teacher, in the order of the distributions.
        target_names: of the data set, which images were kept for; the same unless the teacher has its own.
        count: pool images, each counted once.
        embedding: numbers of each image's embedding, E; 0: there is none.
    """

    def __init__(self, folder: Location, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.target_names: tuple[str, ...] = tuple(manifest.get("target_class_names", manifest["class_names"]))
        self.dtype: Dtype = manifest["dtype"]
        self.teacher: str = manifest["teacher"]
        self.fingerprint: str = manifest["fingerprint"]
        self.count: int = manifest["pool"]["rows"]
        self.embedding: int = manifest.get("embedding", 0)

    @classmethod
    def open(
        cls,
        folder: Location,
        *,
        teacher: str | None = None,
        class_names: Sequence[str] | None = None,
        verify: bool | None = None,
    ) -> Self:
        """Open a store.

        Args:
            folder: targets/.
            teacher: the fingerprint that the store's teacher must have; None accepts any.
            class_names: the data set's classes, in order, which it must be for; None accepts any.
            verify: whether to compare all checksums; None does so up to 4 GiB on disk, and not in object
                storage. Names, sizes and row counts are always compared, and reading always verifies the
                checksums of the pages and images read.

        Raises:
            TargetsError: it is not complete, of another version, teacher or class list, or damaged.
        """
        manifest = read_manifest(folder)
        if teacher is not None and manifest["teacher"] != teacher:
            raise TargetsError(
                f"{folder} was written by another teacher ({manifest['teacher'][:12]}…, expected {teacher[:12]}…); "
                "run `mpl precompute` again, or use the run that the store belongs to"
            )
        held = manifest.get("target_class_names", manifest["class_names"])
        if class_names is not None and held != list(class_names):
            raise TargetsError(f"{folder} has other classes: {_difference(held, class_names)}")
        size = sum(file["bytes"] for kind in ("pool", "labelled") for file in manifest[kind]["files"])
        size += sum(file["tar"]["bytes"] for file in manifest["pool"]["files"] if "tar" in file)
        check_files(folder, manifest, verify if verify is not None else is_local(folder) and size <= HASHED)
        return cls(folder, manifest)

    def correction(self) -> Correction:
        """From the teacher's classes to the data set's, as the images were selected with it.

        Raises:
            TargetsError: its file is missing, or another than was written.
        """
        if "correction" not in self.manifest:
            return Correction.identity(self.class_names)
        try:
            found = load_correction(self.folder / CORRECTION_FILE)
        except DataError as error:
            raise TargetsError(str(error)) from error
        if found.fingerprint() != self.manifest["correction"] or found.teacher_names != self.class_names:
            raise TargetsError(f"{self.folder / CORRECTION_FILE} is not the file that was written; {TARGETS.remedy}")
        return found

    def batches(self, batch: int = BATCH) -> Iterator[StoredBatch]:
        """All rows in their stored, shuffled order, `batch` at most at a time; constant memory."""
        columns = ["key", "shard", "row", "image", "repeat", *self.of_teacher]
        for stored in self._read("pool", columns, batch):
            keys, shards, rows, images = (stored.column(name).to_pylist() for name in ("key", "shard", "row", "image"))
            yield StoredBatch(
                samples=[
                    (shard, Sample(row, key, data))
                    for shard, row, key, data in zip(shards, rows, keys, images, strict=True)
                ],
                distributions=self._distributions(stored),
                embeddings=stored_embeddings(stored, self.embedding),
                repeats=stored.column("repeat").to_numpy(),
            )

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """(shard name, sample) in stored order, as `load_images` takes them."""
        for batch in self.batches():
            yield from batch.samples

    def images(self) -> Iterator[bytes]:
        """Encoded images in stored order."""
        for part in self._read("pool", ["image"], BATCH):
            yield from part.column(0).to_pylist()

    def distributions(self) -> NDArray[np.float32]:
        """The teacher's distributions, (N, C), rows sum to 1, in stored order."""
        result = np.empty((self.count, len(self.class_names)), np.float32)
        ends = np.cumsum([file["rows"] for file in self.manifest["pool"]["files"]])

        def read(file: int) -> None:
            begin = ends[file] - self.manifest["pool"]["files"][file]["rows"]
            for part in self.read_file(file, ["distribution"], ROWS):
                normalised(stored_rows(part.column(0), self.dtype), result[begin : begin + part.num_rows])
                begin += part.num_rows

        in_threads(read, range(len(ends)))
        return result

    def embeddings(self) -> NDArray[np.float32]:
        """The images' embeddings, (N, E), in stored order."""
        if not self.embedding:
            return np.empty((self.count, 0), np.float32)
        nothing = np.empty((0, self.embedding), np.float32)
        parts = self._read("pool", ["embedding"])
        return np.concatenate([nothing, *(stored_embeddings(part, self.embedding) for part in parts)])

    @property
    def of_teacher(self) -> list[str]:
        """Columns of what the teacher says of an image."""
        return ["distribution", *(["embedding"] if self.embedding else [])]

    def repeats(self) -> NDArray[np.int64]:
        """How often each image is used in an epoch, (N,)."""
        repeats = [batch.column(0).to_numpy() for batch in self._read("pool", ["repeat"])]
        return np.concatenate([np.empty(0, np.int64), *repeats])

    def uses(self) -> NDArray[np.int64]:
        """How often the images of each training shard are used in an epoch, (F,)."""

        def of_file(file: int) -> int:
            stated = self.manifest["pool"]["files"][file].get("uses")
            if stated is not None:
                return int(stated)
            return sum(int(part.column(0).to_numpy().sum()) for part in self.read_file(file, ["repeat"], ROWS))

        return np.array([of_file(file) for file in range(len(self.manifest["pool"]["files"]))], np.int64)

    def keys(self) -> list[str]:
        """The images' names, for people, in stored order."""
        return [key for part in self._read("pool", ["key"]) for key in part.column(0).to_pylist()]

    def classes(self) -> list[list[int]]:
        """The classes that each image was kept for, in stored order."""
        return [kept for part in self._read("pool", ["classes"]) for kept in part.column(0).to_pylist()]

    def labelled(self) -> LabelledTargets:
        """The labelled images' keys, identity, labels and distributions."""
        batches = list(self._read("labelled", ["key", "shard", "row", "label", *self.of_teacher]))
        empty = np.empty((0, len(self.class_names)), np.float32)
        nothing = np.empty((0, self.embedding), np.float32)
        return LabelledTargets(
            keys=[key for batch in batches for key in batch.column("key").to_pylist()],
            shard=[name for batch in batches for name in batch.column("shard").to_pylist()],
            row=np.concatenate([np.empty(0, np.int64), *(batch.column("row").to_numpy() for batch in batches)]),
            labels=np.concatenate([np.empty(0, np.int64), *(batch.column("label").to_numpy() for batch in batches)]),
            distributions=np.concatenate([empty, *(self._distributions(batch) for batch in batches)]),
            embeddings=np.concatenate([nothing, *(stored_embeddings(batch, self.embedding) for batch in batches)]),
        )

    def read_file(self, file: int, columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        """Columns of one training shard, in stored order, `batch` rows at most at a time.

        Raises:
            TargetsError: the file was changed since the store was opened, or is damaged.
        """
        yield from self._read_entry(self.manifest["pool"]["files"][file], columns, batch)

    def _read(self, kind: str, columns: Sequence[str], batch: int = ROWS) -> Iterator[pa.RecordBatch]:
        for entry in self.manifest[kind]["files"]:
            yield from self._read_entry(entry, columns, batch)

    def _read_entry(self, entry: dict[str, Any], columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        yield from record_batches(self.folder / entry["name"], columns, batch, tar="tar" in entry)

    def _distributions(self, part: pa.RecordBatch) -> NDArray[np.float32]:
        """(n, C) float32, rows sum to 1."""
        return normalised(stored_rows(part.column("distribution"), self.dtype))


def joined(distributions: NDArray[np.float32], embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (n, C + E) that a training's batches are made of; without embeddings the distributions themselves."""
    return np.concatenate([distributions, embeddings], axis=1) if embeddings.shape[1] else distributions


def stored_embeddings(part: pa.RecordBatch, numbers: int) -> NDArray[np.float32]:
    """Of some rows of a store with embeddings of so many numbers, (n, E)."""
    if not numbers:
        return np.empty((part.num_rows, 0), np.float32)
    return fixed_numbers(part.column("embedding"), EMBEDDING_ITEM).astype(np.float32)


def stored_rows(column: pa.Array, dtype: Dtype) -> NDArray[Any]:
    """Distributions as they lie in the store, read only, (n, C), of `dtype`."""
    return fixed_numbers(column, ITEM[dtype])


def normalised(stored: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Float32 rows that sum to 1, (n, C): float16 rows do so only nearly.

    Args:
        stored: float16 or float32 rows, (n, C).
        out: gets the result, where it is given.
    """
    result = np.empty(stored.shape, np.float32) if out is None else out
    step = max(1, CACHED // max(stored.shape[1], 1))
    half = np.empty((min(step, len(stored)), stored.shape[1]), np.float16)
    for begin in range(0, len(stored), step):
        rows, block = stored[begin : begin + step], result[begin : begin + step]
        if stored.dtype == np.float16:
            # torch has the processor convert float16, NumPy takes 30 times as long; a copy, as torch wants to write.
            np.copyto(half[: len(rows)], rows)
            torch.from_numpy(block).copy_(torch.from_numpy(half[: len(rows)]))
        else:
            np.copyto(block, rows)
        block /= block.sum(axis=1, keepdims=True)
    return result


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} classes, expected {len(expected)}"
    label = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"class {label} is {found[label]!r}, expected {expected[label]!r}; run `mpl precompute` again"
