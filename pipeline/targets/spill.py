"""The way from the shards of the pool to the training shards, through spill files.

A spill file holds the selected images of one shard of the pool with all that the store keeps of them: an Arrow file in
targets/spill/, with a record batch for each training shard that it has images for.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
from numpy.typing import NDArray

from pipeline.data.readers.shard import Sample, Shard
from pipeline.errors import DataError, RunError
from pipeline.log_odds import distributions
from pipeline.pool.answered import POOL
from pipeline.pool.infer import Source, infer_distributions
from pipeline.pool.scores import ScoredPool
from pipeline.pool.selection import SelectionFile
from pipeline.seeds import permutation
from pipeline.storage.files import Location, opened, whole_file
from pipeline.storage.tables import fixed_binary, fixed_numbers, require_absence
from pipeline.targets.embedding import Embedding, embedding_column
from pipeline.targets.files import EMBEDDING_ITEM, ITEM, pool_file_is_done, pool_schema, write_pool_file
from pipeline.targets.manifest import StoreSettings, store_fingerprint

SPILL = "spill"
SAMPLED = 8  # shards whose first selected images tell how large an image is
OVERHEAD = {"parquet": 64, "webdataset": 2_600}  # bytes of a row beside image and distribution


@dataclass(frozen=True, eq=False)
class SelectedImages:
    """The distinct images of a selection in the pool's order; n of them.

    Attributes:
        shard: index into the pool's shards, (n,), not decreasing.
        row: (n,), int64, increasing within a shard.
        classes: per image, those that it serves, increasing: a list array.
        repeat: uses in all, (n,), int64.
    """

    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    classes: pa.Array
    repeat: NDArray[np.int64]

    def of_shard(self, number: int) -> slice:
        """Places of the images of one shard of the pool."""
        return slice(*np.searchsorted(self.shard, [number, number + 1]).tolist())


def distinct_images(selection: SelectionFile, shard_names: Sequence[str]) -> SelectedImages:
    """One entry per image of a selection, classes and repeats gathered.

    Raises:
        DataError: a shard is not among the names.
    """
    table = selection.table
    column = table.column("shard").cast(pa.string()).combine_chunks()
    number = pc.index_in(column, pa.array(shard_names, pa.string()))
    if number.null_count:
        lost = column.filter(number.is_null())[0].as_py()
        raise DataError(f"the selection names the shard {lost!r}, which the pool does not have; run `mpl filter` again")
    shard = number.to_numpy().astype(np.int64)
    row, label, repeat = (table.column(name).to_numpy() for name in ("row", "class", "repeat"))
    order = np.lexsort((label, row, shard))
    shard, row, label, repeat = shard[order], row[order], label[order], repeat[order]
    begins = np.ones(len(row), bool)
    begins[1:] = (np.diff(shard) != 0) | (np.diff(row) != 0)
    first = np.flatnonzero(begins)
    ends = np.append(first, len(row)).astype(np.int32)
    return SelectedImages(
        shard=shard[first],
        row=row[first],
        classes=pa.ListArray.from_arrays(pa.array(ends), pa.array(label, pa.int32())),
        repeat=np.add.reduceat(repeat, first) if len(first) else repeat,
    )


class Shuffle:
    """Which image goes where. Sent to workers; they share it through files alone.

    Attributes:
        fingerprint: of the store.
        images: that are stored.
        files: training shards.
        file_of: the training shard of each image, (n,).
        embedding: of the images, to be set before they are dealt; None: there is none.
    """

    def __init__(
        self,
        folder: Location,
        settings: StoreSettings,
        selection: SelectionFile,
        shards: Sequence[Shard],
        scorer: Source,
        scores: ScoredPool | None,
    ) -> None:
        self.embedding: Embedding | None = None
        self.folder, self.settings, self.shards, self.scores = folder, settings, shards, scores
        self.scorer = scorer if scores is None else scorer.without_weights()
        self.fingerprint = store_fingerprint(selection, settings)
        self.images = distinct_images(selection, [shard.name for shard in shards])
        count = len(self.images.row)
        self.files = -(-count // settings.shard_rows)
        order = permutation(count, settings.seed, "targets")  # image at each place of the store
        bounds = np.linspace(0, count, self.files + 1).round().astype(np.int64)  # balanced
        self._place = np.empty(count, np.int64)  # of each image
        self._place[order] = np.arange(count)
        self.file_of = np.searchsorted(bounds, self._place, side="right") - 1

    def file_is_done(self, file: int) -> bool:
        """Whether a training shard is written."""
        return pool_file_is_done(self.folder, file, self.fingerprint, self.settings.format)

    def files_left(self) -> list[int]:
        """Training shards that are not written yet."""
        return [file for file in range(self.files) if not self.file_is_done(file)]

    def require_disk(self, tell: Callable[[str], None]) -> None:
        """Estimate the store's size; refuse to start what will not fit, spill files (as much again) included.

        Raises:
            RunError: there is too little free disk.
        """
        sizes: list[int] = []
        used = np.unique(self.images.shard)
        for number in used[np.linspace(0, len(used) - 1, min(SAMPLED, len(used))).round().astype(int)].tolist():
            rows = self.images.row[self.images.of_shard(number)][:16]
            sizes += [len(sample.data) for sample in _pick(self.shards[number], rows)]
        width = len(self.scorer.class_names) * np.dtype(ITEM[self.settings.dtype]).itemsize
        width += (self.settings.embedding or 0) * np.dtype(EMBEDDING_ITEM).itemsize
        size = int(len(self.images.row) * (np.mean(sizes) + width + OVERHEAD[self.settings.format]))
        tell(f"{len(self.images.row):,} images, about {size / 2**20:,.1f} MiB, and as much again while it is written")
        if not isinstance(self.folder, Path):
            return  # object storage has no limit that could be asked for
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < 2 * size:
            raise RunError(
                f"the store needs about {2 * size / 2**30:,.1f} GiB while it is written, and {self.folder} has "
                f"{free / 2**30:,.1f} GiB free; free some space, lower k, or choose another --run or --store"
            )

    def deal(self, number: int) -> int:
        """Read shard `number` once and write its images, by training shard, to its spill file; how many."""
        mine, path = self.images.of_shard(number), spill_path(self.folder, number)
        files = self.file_of[mine]
        if spill_is_done(path, self.fingerprint):
            return 0
        if all(self.file_is_done(file) for file in np.unique(files).tolist()):
            return 0  # their spill files are gone, and nobody needs them
        write_spill(path, self._table(number, mine), files, self.fingerprint)
        return len(files)

    def gather(self, file: int) -> int:
        """Write training shard `file` from all spill files, in the order of the shuffle; its rows."""
        if self.file_is_done(file):
            return 0
        images = np.flatnonzero(self.file_of == file)  # in the pool's order, as the tables
        shards = np.unique(self.images.shard[images]).tolist()
        tables = [read_spill(spill_path(self.folder, number), file) for number in shards]
        table = pa.concat_tables(tables).take(pa.array(np.argsort(self._place[images])))
        numbers = 0 if self.embedding is None else self.embedding.reduction.numbers
        schema = pool_schema(len(self.scorer.class_names), self.settings.dtype, numbers)
        write_pool_file(
            self.folder, file, table.cast(schema), self.fingerprint, self.settings.format, self.settings.dtype
        )
        return len(images)

    def _table(self, number: int, mine: slice) -> pa.Table:
        """What the store holds of the images of one shard."""
        rows, shard = self.images.row[mine], self.shards[number]
        samples = _pick(shard, rows)
        stored = self._distributions(number, rows, samples).astype(ITEM[self.settings.dtype])
        return pa.table(
            {
                "key": pa.array([sample.key for sample in samples], pa.string()),
                "shard": pa.array([shard.name] * len(samples), pa.string()),
                "row": rows,
                "image": pa.array([sample.data for sample in samples], pa.large_binary()),
                "distribution": fixed_binary(stored),
                "classes": self.images.classes.slice(mine.start, mine.stop - mine.start),
                "repeat": self.images.repeat[mine],
                **embedding_column(self.embedding, POOL, shard.name, samples),
            }
        )

    def sampled(self, count: int) -> Iterator[tuple[str, list[Sample]]]:
        """(shard name, selected images of it), of shards in an order at random until there are `count` images."""
        used = np.unique(self.images.shard)
        for number in used[permutation(len(used), self.settings.seed, "embedding")].tolist():
            if count <= 0:
                return
            rows = self.images.row[self.images.of_shard(number)][:count]
            count -= len(rows)
            yield self.shards[number].name, _pick(self.shards[number], rows)

    def _distributions(self, number: int, rows: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.float64]:
        """(n, C), from the scores, or inferred where the teacher is another one."""
        name = self.shards[number].name
        if self.scores is None:
            inferred, good = infer_distributions(samples, self.scorer)
            if len(good) < len(samples):
                bad = samples[int(np.setdiff1d(np.arange(len(samples)), good)[0])]
                raise DataError(
                    f"shard {name} row {bad.row} ({bad.key}) is selected, but gives no distribution: "
                    "it does not decode, or the teacher's logits are not finite"
                )
            return inferred
        scored = [scores.shard for scores in self.scores.shards].index(name)
        log_odds = [np.empty((0, len(self.scorer.class_names)), np.float32)]
        for _, batch in self.scores.stream(["row", "log_odds"], scored):
            inside = np.isin(batch.column("row").to_numpy(), rows)
            log_odds.append(fixed_numbers(batch.column("log_odds"), "<f4")[inside])
        return distributions(np.concatenate(log_odds))


@dataclass(frozen=True, eq=False)
class Deal:
    """`Shuffle.deal` as work for an engine."""

    shuffle: Shuffle

    def placed(self, worker: int, threads: int) -> "Deal":
        """For one of several workers."""
        self.shuffle.scorer = self.shuffle.scorer.placed(worker, threads)
        if self.shuffle.embedding is not None:
            self.shuffle.embedding = self.shuffle.embedding.placed(worker, threads)
        return self

    def __call__(self, shard: int, progress: Callable[[int], None]) -> int:
        count = self.shuffle.deal(shard)
        progress(count)
        return count


@dataclass(frozen=True, eq=False)
class Gather:
    """`Shuffle.gather` as work for an engine."""

    shuffle: Shuffle

    def __call__(self, file: int, progress: Callable[[int], None]) -> int:
        count = self.shuffle.gather(file)
        progress(count)
        return count


def _pick(shard: Shard, rows: NDArray[np.int64]) -> list[Sample]:
    """The samples of these rows, increasing; the shard is streamed once."""
    wanted, samples = set(rows.tolist()), []
    if not wanted:
        return []
    for sample in shard.read():
        if sample.row in wanted:
            samples.append(sample)
            if len(samples) == len(rows):
                return samples
    raise DataError(
        f"shard {shard.name} has changed: {len(rows) - len(samples)} selected rows are missing; run `mpl filter` again"
    )


def spill_path(folder: Location, number: int) -> Location:
    """Where the images of shard `number` of the pool lie meanwhile."""
    return folder / SPILL / f"shard-{number:05d}.arrow"


def write_spill(path: Location, table: pa.Table, files: NDArray[np.int64], fingerprint: str) -> None:
    """Write a spill file, whole or not at all.

    Args:
        path: of the file.
        table: the images of a shard, n rows.
        files: the training shard that each is dealt to, (n,).
        fingerprint: of the store.
    """
    numbers = np.unique(files).tolist()
    schema = table.schema.with_metadata({"mpl.fingerprint": fingerprint, "mpl.files": json.dumps(numbers)})
    with whole_file(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        for number in numbers:
            rows = pa.array(np.flatnonzero(files == number))
            writer.write_batch(table.take(rows).combine_chunks().to_batches()[0])


def read_spill(path: Location, file: int) -> pa.Table:
    """The rows of one shard that are dealt to training shard `file`.

    Raises:
        RunError: the spill file cannot be read.
    """
    try:
        with open_spill(path) as spill:
            numbers = json.loads(spill.schema.metadata[b"mpl.files"])
            return pa.Table.from_batches([spill.get_batch(numbers.index(file))])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read ({error}); run the same command again") from error


def spill_is_done(path: Location, fingerprint: str) -> bool:
    """Whether it is whole, and of this store.

    Raises:
        RunError: its place cannot be reached, so that nobody knows.
    """
    try:
        with open_spill(path) as spill:
            metadata = spill.schema.metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        require_absence(path, error)
        return False
    return bool(metadata.get(b"mpl.fingerprint") == fingerprint.encode())


@contextmanager
def open_spill(path: Location) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A spill file, on disk or in object storage, of which single batches are read."""
    if isinstance(path, Path):
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_file(source)
    else:
        with opened(path, random=True) as stream:
            yield pa.ipc.open_file(stream)
