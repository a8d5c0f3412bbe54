"""Make the store of distributions: join selection, scores and image bytes; shuffle once; write.

Two steps, each resumable by file: every shard of the pool is read once, in order, and its selected
images are dealt to the training shards in a spill file; then each training shard gathers its share
from all spill files. A worker has at most one shard of the pool, or one training shard, in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
from numpy.typing import NDArray
from torch import nn

from pipeline.data.readers.shard import Sample, Shard
from pipeline.errors import DataError, RunError, TargetsError
from pipeline.pool.infer import Inferred, Scorer, distributions, infer_batches
from pipeline.pool.scored import ScoredPool
from pipeline.pool.selection import SelectionFile
from pipeline.seeds import permutation
from pipeline.storage.files import Location, discard, names_in, opened, remove_leftovers, whole_file
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import fixed_binary, fixed_numbers, open_parquet, require_absence
from pipeline.storage.workers import EngineSettings, run_all
from pipeline.targets import (
    ITEM,
    MANIFEST,
    Dtype,
    PoolFormat,
    TargetsStore,
    file_is_done,
    labelled_schema,
    pool_file_is_done,
    pool_schema,
    read_manifest,
    remove_foreign,
    write_manifest,
    write_pool_file,
    write_targets,
)

SPILL = "spill"
LABELLED_ROWS = 1 << 16  # labelled images of one file
SAMPLED = 8  # shards whose first selected images tell how large an image is
OVERHEAD = {"parquet": 64, "webdataset": 832}  # bytes of a row beside image and distribution


@dataclass(frozen=True)
class StoreSettings:
    """How the store is made.

    Attributes:
        teacher: fingerprint of the teacher.
        dtype: of the stored distributions.
        format: "parquet", or "webdataset": tars with the distributions in files beside them.
        shard_rows: images of a training shard, at most.
        seed: of the shuffle.
        labelled: fingerprint of the labelled split.
    """

    teacher: str
    labelled: str
    dtype: Dtype = "float16"
    format: PoolFormat = "parquet"
    shard_rows: int = 20_000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Chosen:
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


def store_fingerprint(selection: SelectionFile, settings: StoreSettings) -> str:
    """Of all that the store is made from."""
    return fingerprint_of(["targets", selection.fingerprint, asdict(settings)])


def is_precomputed(folder: Location, selection: SelectionFile, settings: StoreSettings) -> bool:
    """Whether `folder` holds the finished store of this selection under these settings."""
    try:
        return bool(read_manifest(folder)["fingerprint"] == store_fingerprint(selection, settings))
    except TargetsError:
        return False


class Runner(Protocol):
    """Has all items done by an engine; `name` is for people."""

    def __call__(
        self,
        work: Callable[[int, Callable[[int], None]], int],
        items: Sequence[int],
        *,
        name: Callable[[int], str],
    ) -> object: ...


def run_here(
    work: Callable[[int, Callable[[int], None]], int],
    items: Sequence[int],
    *,
    name: Callable[[int], str],
) -> None:
    """The simplest runner: in this process, one after the other."""
    run_all(EngineSettings(), work, items, name=name, progress=lambda count: None, done=lambda item, count: None)


def precompute(
    folder: Location,
    selection: SelectionFile,
    shards: Sequence[Shard],
    labelled: Iterable[tuple[str, Sample]],
    scorer: Scorer,
    settings: StoreSettings,
    *,
    scores: ScoredPool | None,
    preprocessing: dict[str, Any],
    here: Scorer | None = None,
    run: Runner = run_here,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write targets/ and return its manifest. Killed and started again, it goes on by the file.

    Args:
        folder: targets/.
        selection: from `read_selection`.
        shards: of the pool.
        labelled: (shard name, sample) of the labelled split, in order.
        scorer: the teacher.
        settings: see there.
        scores: the scores that the selection was made from, whose distributions are stored; None when
            the teacher is another one, and then its distributions are inferred here.
        preprocessing: told in the manifest.
        here: the teacher for the labelled images, which this process infers; `scorer` unless given.
        run: does the shards, here or in workers.
        tell: told the size to expect.

    Raises:
        DataError: the selection was made from other scores or names shards or rows that are not there.
        RunError: too little free disk, or a file cannot be written.
    """
    mark = store_fingerprint(selection, settings)
    if scores is not None and scores.fingerprint() != selection.scores:
        raise DataError("the selection was made from other scores than these; run `mpl filter` again")
    if selection.class_names != scorer.class_names:
        raise DataError(
            f"the selection has the classes {', '.join(selection.class_names[:5])}… ({len(selection.class_names)}), "
            f"the teacher {', '.join(scorer.class_names[:5])}… ({len(scorer.class_names)})"
        )
    discard(folder / MANIFEST)  # unfinished from here on
    remove_leftovers(folder, folder / SPILL)
    chosen = distinct_images(selection, [shard.name for shard in shards])
    plan = Plan(folder, mark, chosen, shards, scorer, settings, scores)
    remove_foreign(folder, mark, settings.format)
    left = plan.files_left()
    if len(left) == plan.files and not names_in(folder / SPILL):  # nothing is there yet
        plan.require_disk(tell)
    if left:
        run(
            Deal(plan),
            [at for at in range(len(shards)) if plan.images_of(at).stop > plan.images_of(at).start],
            name=lambda at: shards[at].name,
        )
        plan.scorer = replace(plan.scorer, model=nn.Identity())  # its work is done
        run(
            Gather(plan),
            left,
            name=lambda file: f"training shard {file}",
        )
    skipped = write_labelled(folder, labelled, here or scorer, settings, mark)
    stored = sum(_rows(folder / f"pool-{file:05d}.parquet") for file in range(plan.files))
    if stored != len(chosen.row):
        raise RunError(f"{folder} has {stored:,} of {len(chosen.row):,} selected images; run mpl precompute --force")
    discard(folder / SPILL)
    remove_leftovers(folder)  # of workers that died
    return write_manifest(
        folder,
        fingerprint=mark,
        teacher=settings.teacher,
        class_names=scorer.class_names,
        dtype=settings.dtype,
        preprocessing=preprocessing,
        more={"uses": int(chosen.repeat.sum()), "labelled_skipped": skipped, "inferred": scores is None},
    )


def distinct_images(selection: SelectionFile, shard_names: Sequence[str]) -> Chosen:
    """One entry per image of a selection, classes and repeats gathered."""
    table = selection.table
    column = table.column("shard").cast(pa.string()).combine_chunks()
    found = pc.index_in(column, pa.array(shard_names, pa.string()))
    if found.null_count:
        lost = column.filter(found.is_null())[0].as_py()
        raise DataError(f"the selection names the shard {lost!r}, which the pool does not have; run `mpl filter` again")
    shard = found.to_numpy().astype(np.int64)
    row, label, repeat = (table.column(name).to_numpy() for name in ("row", "class", "repeat"))
    order = np.lexsort((label, row, shard))
    shard, row, label, repeat = shard[order], row[order], label[order], repeat[order]
    begins = np.ones(len(row), bool)
    begins[1:] = (np.diff(shard) != 0) | (np.diff(row) != 0)
    first = np.flatnonzero(begins)
    ends = np.append(first, len(row)).astype(np.int32)
    return Chosen(
        shard=shard[first],
        row=row[first],
        classes=pa.ListArray.from_arrays(pa.array(ends), pa.array(label, pa.int32())),
        repeat=np.add.reduceat(repeat, first) if len(first) else repeat,
    )


class Plan:
    """Which image goes where. Sent to workers; they share it through files alone."""

    def __init__(
        self,
        folder: Location,
        mark: str,
        chosen: Chosen,
        shards: Sequence[Shard],
        scorer: Scorer,
        settings: StoreSettings,
        scores: ScoredPool | None,
    ):
        self.folder, self.mark, self.chosen, self.shards = folder, mark, chosen, shards
        self.settings, self.scores = settings, scores
        self.scorer = scorer if scores is None else replace(scorer, model=nn.Identity())  # its weights stay here
        count = len(chosen.row)
        self.files = -(-count // settings.shard_rows)
        order = permutation(count, settings.seed, "targets")  # image at each place of the store
        self.bounds = np.linspace(0, count, self.files + 1).round().astype(np.int64)  # balanced
        self.place = np.empty(count, np.int64)  # of each image
        self.place[order] = np.arange(count)
        self.file_of = np.searchsorted(self.bounds, self.place, side="right") - 1
        self.schema = pool_schema(len(scorer.class_names), settings.dtype, mark)

    def spill(self, at: int) -> Location:
        return self.folder / SPILL / f"shard-{at:05d}.arrow"

    def images_of(self, at: int) -> slice:
        """Places in `chosen` of the images of one shard."""
        return slice(*np.searchsorted(self.chosen.shard, [at, at + 1]).tolist())

    def file_is_done(self, file: int) -> bool:
        return pool_file_is_done(self.folder, file, self.mark, self.settings.format)

    def files_left(self) -> list[int]:
        """Training shards that are not written yet."""
        return [file for file in range(self.files) if not self.file_is_done(file)]

    def require_disk(self, tell: Callable[[str], None]) -> None:
        """Estimate the store's size; refuse to start what will not fit, spill files (as much again) included.

        Raises:
            RunError: there is too little free disk.
        """
        sizes: list[int] = []
        used = np.unique(self.chosen.shard)
        for at in used[np.linspace(0, len(used) - 1, min(SAMPLED, len(used))).round().astype(int)].tolist():
            sizes += [len(sample.data) for sample in _pick(self.shards[at], self.chosen.row[self.images_of(at)][:16])]
        width = len(self.scorer.class_names) * np.dtype(ITEM[self.settings.dtype]).itemsize
        size = int(len(self.chosen.row) * (np.mean(sizes) + width + OVERHEAD[self.settings.format]))
        tell(f"{len(self.chosen.row):,} images, about {size / 2**20:,.1f} MiB, and as much again while it is written")
        if not isinstance(self.folder, Path):
            return  # object storage has no limit that could be asked for
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < 2 * size:
            raise RunError(
                f"the store needs about {2 * size / 2**30:,.1f} GiB while it is written, and {self.folder} has "
                f"{free / 2**30:,.1f} GiB free; free some space, lower k, or choose another --run or --store"
            )

    def deal(self, at: int) -> int:
        """Read shard `at` once and write its images, by training shard, to its spill file; how many."""
        mine = self.images_of(at)
        if spill_is_done(self.spill(at), self.mark):
            return 0
        if all(self.file_is_done(file) for file in np.unique(self.file_of[mine]).tolist()):
            return 0  # their spill files are gone, and nobody needs them
        table = self._table(at, mine)
        file_of = self.file_of[mine]
        files = np.unique(file_of).tolist()
        told = {"mpl.fingerprint": self.mark, "mpl.files": json.dumps(files)}  # a batch for each
        schema = table.schema.with_metadata(told)
        with whole_file(self.spill(at)) as temporary, pa.ipc.new_file(temporary, schema) as writer:
            for file in files:
                rows = pa.array(np.flatnonzero(file_of == file))
                writer.write_batch(table.take(rows).combine_chunks().to_batches()[0])
        return table.num_rows

    def gather(self, file: int) -> int:
        """Write training shard `file` from all spill files, in the order of the shuffle; its rows."""
        if self.file_is_done(file):
            return 0
        parts, images = [], []
        for at in range(len(self.shards)):
            mine = self.images_of(at)
            here = np.flatnonzero(self.file_of[mine] == file)
            if len(here):
                parts.append(read_spilled(self.spill(at), file))
                images.append(here + mine.start)
        order = np.argsort(self.place[np.concatenate(images)])
        table = pa.concat_tables(parts).take(pa.array(order))
        write_pool_file(self.folder, file, table.cast(self.schema), self.settings.format)
        return table.num_rows

    def _table(self, at: int, mine: slice) -> pa.Table:
        rows = self.chosen.row[mine]
        samples = _pick(self.shards[at], rows)
        return pa.table(
            {
                "key": pa.array([sample.key for sample in samples], pa.string()),
                "shard": pa.array([self.shards[at].name] * len(samples), pa.string()),
                "row": rows,
                "image": pa.array([sample.data for sample in samples], pa.large_binary()),
                "distribution": fixed_binary(self._distributions(at, rows, samples).astype(ITEM[self.settings.dtype])),
                "classes": self.chosen.classes.slice(mine.start, mine.stop - mine.start),
                "repeat": self.chosen.repeat[mine],
            }
        )

    def _distributions(self, at: int, rows: NDArray[np.int64], samples: Sequence[Sample]) -> NDArray[np.float64]:
        """(n, C), from the scores, or inferred where the teacher is another one."""
        if self.scores is None:
            found, good = infer(samples, self.scorer)
            if len(good) < len(samples):
                bad = samples[int(np.setdiff1d(np.arange(len(samples)), good)[0])]
                raise DataError(
                    f"shard {self.shards[at].name} row {bad.row} ({bad.key}) is selected, but gives no distribution: "
                    "it does not decode, or the teacher's logits are not finite"
                )
            return found
        part = [info.shard for info in self.scores.parts].index(self.shards[at].name)
        kept = [np.empty((0, len(self.scorer.class_names)), np.float32)]
        for _, batch in self.scores.stream(["row", "log_odds"], part):
            inside = np.isin(batch.column("row").to_numpy(), rows)
            kept.append(fixed_numbers(batch.column("log_odds"), "<f4")[inside])
        return distributions(np.concatenate(kept))


@dataclass(frozen=True, eq=False)
class Deal:
    """`Plan.deal` as work for an engine."""

    plan: Plan

    def placed(self, worker: int, threads: int) -> "Deal":
        """For one of several workers."""
        self.plan.scorer = self.plan.scorer.placed(worker, threads)
        return self

    def __call__(self, at: int, progress: Callable[[int], None]) -> int:
        count = self.plan.deal(at)
        progress(count)
        return count


@dataclass(frozen=True, eq=False)
class Gather:
    """`Plan.gather` as work for an engine."""

    plan: Plan

    def __call__(self, file: int, progress: Callable[[int], None]) -> int:
        count = self.plan.gather(file)
        progress(count)
        return count


def infer(samples: Iterable[Sample], scorer: Scorer) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distributions (m, C) of those samples that decode and have finite logits, and their places (m,)."""
    found, good, begin = [np.empty((0, len(scorer.class_names)))], [np.empty(0, np.intp)], 0
    batch: Inferred[None]
    for batch in infer_batches(samples, scorer):
        finite = ~np.isnan(batch.log_odds[:, 0])
        found.append(distributions(batch.log_odds[finite]))
        good.append(batch.decoded.good[finite] + begin)
        begin += len(batch.decoded.samples)
    return np.concatenate(found), np.concatenate(good)


def write_labelled(
    folder: Location, labelled: Iterable[tuple[str, Sample]], scorer: Scorer, settings: StoreSettings, mark: str
) -> int:
    """Write targets/labelled-*.parquet; how many images gave no distribution and were left out."""
    schema = labelled_schema(len(scorer.class_names), settings.dtype, mark)
    stream, file, skipped = iter(labelled), 0, 0
    while group := list(islice(stream, LABELLED_ROWS)):
        path = folder / f"labelled-{file:05d}.parquet"
        if not file_is_done(path, mark):
            write_targets(path, _labelled_table(group, scorer, settings).cast(schema))
        file, skipped = file + 1, skipped + len(group) - _rows(path)
    return skipped


def _labelled_table(group: Sequence[tuple[str, Sample]], scorer: Scorer, settings: StoreSettings) -> pa.Table:
    found, good = infer([sample for _, sample in group], scorer)
    kept = [group[i] for i in good]
    return pa.table(
        {
            "key": pa.array([sample.key for _, sample in kept], pa.string()),
            "shard": pa.array([shard for shard, _ in kept], pa.string()),
            "row": pa.array([sample.row for _, sample in kept], pa.int64()),
            "label": pa.array([sample.label for _, sample in kept], pa.int64()),
            "distribution": fixed_binary(found.astype(ITEM[settings.dtype])),
        }
    )


def check_targets(store: TargetsStore, scorer: Scorer, n: int, seed: int = 0) -> float:
    """Infer n stored rows again: the largest difference of a probability from the stored one.

    Args:
        store: the store.
        scorer: its teacher.
        n: rows, drawn at random; all of them if there are fewer.
        seed: of the draw.
    """
    wanted = np.sort(permutation(store.count, seed, "check")[:n])
    largest, begin = 0.0, 0
    for batch in store.batches():
        here = wanted[(wanted >= begin) & (wanted < begin + len(batch.samples))] - begin
        begin += len(batch.samples)
        if len(here):
            found, good = infer([batch.samples[i][1] for i in here], scorer)
            if len(good) < len(here):
                return float("inf")
            largest = max(largest, float(np.abs(found - batch.distributions[here]).max()))
    return largest


def _rows(path: Location) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def _pick(shard: Shard, rows: NDArray[np.int64]) -> list[Sample]:
    """The samples of these rows, increasing; the shard is streamed once."""
    wanted, found = set(rows.tolist()), []
    if not wanted:
        return []
    for sample in shard.read():
        if sample.row in wanted:
            found.append(sample)
            if len(found) == len(rows):
                return found
    raise DataError(
        f"shard {shard.name} has changed: {len(rows) - len(found)} selected rows are missing; run `mpl filter` again"
    )


@contextmanager
def open_spill(path: Location) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A spill file, on disk or in object storage, of which single batches are read."""
    if isinstance(path, Path):
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_file(source)
    else:
        with opened(path, random=True) as stream:
            yield pa.ipc.open_file(stream)


def read_spilled(path: Location, file: int) -> pa.Table:
    """The rows of one shard that are dealt to training shard `file`.

    Raises:
        RunError: the spill file cannot be read.
    """
    try:
        with open_spill(path) as spill:
            at = json.loads(spill.schema.metadata[b"mpl.files"]).index(file)
            return pa.Table.from_batches([spill.get_batch(at)])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read ({error}); run the same command again") from error


def spill_is_done(path: Location, mark: str) -> bool:
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
    return bool(metadata.get(b"mpl.fingerprint") == mark.encode())
