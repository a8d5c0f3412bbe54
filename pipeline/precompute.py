"""Make the store of distributions: join selection, scores and image bytes; shuffle once; write.

Two steps, each resumable by file: every shard of the pool is read once, in order, and its selected
images are dealt to the training shards in a spill file; then each training shard gathers its share
from all spill files. At most one shard of the pool, or one training shard, is in memory.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import Sample, Shard
from pipeline.dense import fixed_binary, fixed_numbers
from pipeline.errors import DataError, RunError, TargetsError
from pipeline.files import fingerprint as fingerprint_of
from pipeline.files import whole_file
from pipeline.pool.infer import Scorer, decoded_batches, distributions
from pipeline.pool.scored import ScoredPool
from pipeline.pool.selection import SelectionFile
from pipeline.seeds import permutation
from pipeline.targets import (
    ITEM,
    MANIFEST,
    Dtype,
    TargetsStore,
    file_is_done,
    labelled_schema,
    pool_schema,
    read_manifest,
    write_manifest,
    write_targets,
)

SPILL = "spill"
LABELLED_ROWS = 1 << 16  # labelled images of one file


@dataclass(frozen=True)
class StoreSettings:
    """How the store is made.

    Attributes:
        teacher: fingerprint of the teacher.
        dtype: of the stored distributions.
        shard_rows: images of a training shard, at most.
        seed: of the shuffle.
        labelled: fingerprint of the labelled split.
    """

    teacher: str
    labelled: str
    dtype: Dtype = "float16"
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


def is_precomputed(folder: Path, selection: SelectionFile, settings: StoreSettings) -> bool:
    """Whether `folder` holds the finished store of this selection under these settings."""
    try:
        return bool(read_manifest(folder)["fingerprint"] == store_fingerprint(selection, settings))
    except TargetsError:
        return False


def precompute(
    folder: Path,
    selection: SelectionFile,
    shards: Sequence[Shard],
    labelled: Iterable[tuple[str, Sample]],
    scorer: Scorer,
    settings: StoreSettings,
    *,
    scores: ScoredPool | None,
    preprocessing: dict[str, Any],
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
    (folder / MANIFEST).unlink(missing_ok=True)  # unfinished from here on
    chosen = distinct_images(selection, [shard.name for shard in shards])
    plan = _Plan(folder, mark, chosen, shards, scorer, settings, scores)
    _remove_foreign(folder, mark)
    plan.require_disk()
    for at in range(len(shards)):
        plan.deal(at)
    for target in range(plan.files):
        plan.gather(target)
    skipped = write_labelled(folder, labelled, scorer, settings, mark)
    shutil.rmtree(folder / SPILL, ignore_errors=True)
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


class _Plan:
    """Which image goes where."""

    def __init__(
        self,
        folder: Path,
        mark: str,
        chosen: Chosen,
        shards: Sequence[Shard],
        scorer: Scorer,
        settings: StoreSettings,
        scores: ScoredPool | None,
    ):
        self.folder, self.mark, self.chosen, self.shards = folder, mark, chosen, shards
        self.scorer, self.settings, self.scores = scorer, settings, scores
        count = len(chosen.row)
        self.files = -(-count // settings.shard_rows)
        self.order = permutation(count, settings.seed, "targets")  # image at each place of the store
        self.bounds = np.linspace(0, count, self.files + 1).round().astype(np.int64)  # balanced
        place = np.empty(count, np.int64)
        place[self.order] = np.arange(count)
        self.place = place  # of each image
        self.file_of = np.searchsorted(self.bounds, place, side="right") - 1
        self.schema = pool_schema(len(scorer.class_names), settings.dtype, mark)

    def spill(self, at: int) -> Path:
        return self.folder / SPILL / f"shard-{at:05d}.arrow"

    def target(self, file: int) -> Path:
        return self.folder / f"pool-{file:05d}.parquet"

    def images_of(self, at: int) -> slice:
        """Places in `chosen` of the images of one shard."""
        return slice(*np.searchsorted(self.chosen.shard, [at, at + 1]))

    def require_disk(self) -> None:
        """Refuse to start what will not fit: the store, and as much again for the spill files."""
        begin = int(self.chosen.shard[0])
        rows = self.chosen.row[self.images_of(begin)][:64].tolist()
        sizes = [len(sample.data) for sample in _pick(self.shards[begin], rows)]
        width = len(self.scorer.class_names) * np.dtype(ITEM[self.settings.dtype]).itemsize
        need = int(2 * len(self.chosen.row) * (np.mean(sizes) + width + 64))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise RunError(
                f"the store needs about {need / 2**30:,.1f} GiB while it is written, and {self.folder} has "
                f"{free / 2**30:,.1f} GiB free; free some space, lower k, or choose another --run"
            )

    def deal(self, at: int) -> None:
        """Read shard `at` once and write its images, by training shard, to its spill file."""
        mine = self.images_of(at)
        waiting = [f for f in np.unique(self.file_of[mine]) if not file_is_done(self.target(int(f)), self.mark)]
        if not waiting or _spill_is_done(self.spill(at), self.mark):
            return
        table = self._table(at, mine)
        file_of = self.file_of[mine]
        schema = table.schema.with_metadata({"mpl.fingerprint": self.mark})
        with whole_file(self.spill(at)) as temporary, pa.ipc.new_file(temporary, schema) as writer:
            for file in range(self.files):
                rows = pa.array(np.flatnonzero(file_of == file))
                writer.write_batch(table.take(rows).combine_chunks().to_batches()[0] if len(rows) else _empty(schema))

    def gather(self, file: int) -> None:
        """Write training shard `file` from all spill files, in the order of the shuffle."""
        path = self.target(file)
        if file_is_done(path, self.mark):
            return
        parts, images = [], []
        for at in range(len(self.shards)):
            mine = self.images_of(at)
            here = np.flatnonzero(self.file_of[mine] == file)
            if len(here):
                with pa.memory_map(str(self.spill(at))) as source:
                    parts.append(pa.Table.from_batches([pa.ipc.open_file(source).get_batch(file)]))
                images.append(here + mine.start)
        order = np.argsort(self.place[np.concatenate(images)])
        table = pa.concat_tables(parts).take(pa.array(order))
        write_targets(path, table.cast(self.schema))

    def _table(self, at: int, mine: slice) -> pa.Table:
        rows = self.chosen.row[mine]
        samples = _pick(self.shards[at], rows.tolist())
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


def infer(samples: Iterable[Sample], scorer: Scorer) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distributions (m, C) of those samples that decode and have finite logits, and their places (m,)."""
    found, good, begin = [np.empty((0, len(scorer.class_names)))], [np.empty(0, np.intp)], 0
    scorer.model.eval()
    for batch in decoded_batches(samples, scorer.size, scorer.batch, scorer.workers):
        if len(batch.good):
            values = scorer.log_odds(batch.pixels)
            finite = ~np.isnan(values[:, 0])
            found.append(distributions(values[finite]))
            good.append(batch.good[finite] + begin)
        begin += len(batch.samples)
    return np.concatenate(found), np.concatenate(good)


def write_labelled(
    folder: Path, labelled: Iterable[tuple[str, Sample]], scorer: Scorer, settings: StoreSettings, mark: str
) -> int:
    """Write targets/labelled-*.parquet; how many images gave no distribution and were left out."""
    schema = labelled_schema(len(scorer.class_names), settings.dtype, mark)
    stream, file, skipped = iter(labelled), 0, 0
    while group := list(islice(stream, LABELLED_ROWS)):
        path = folder / f"labelled-{file:05d}.parquet"
        if not file_is_done(path, mark):
            write_targets(path, _labelled_table(group, scorer, settings).cast(schema))
        file, skipped = file + 1, skipped + len(group) - pq.read_metadata(path).num_rows
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


def _pick(shard: Shard, rows: Sequence[int]) -> list[Sample]:
    """The samples of these rows, increasing; the shard is streamed once."""
    if not rows:
        return []
    wanted, found = set(rows), []
    for sample in shard.read():
        if sample.row in wanted:
            found.append(sample)
            if len(found) == len(rows):
                return found
    raise DataError(
        f"shard {shard.name} has changed: {len(rows) - len(found)} selected rows are missing; run `mpl filter` again"
    )


def _spill_is_done(path: Path, mark: str) -> bool:
    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return bool(metadata.get(b"mpl.fingerprint") == mark.encode())


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _remove_foreign(folder: Path, mark: str) -> None:
    """Remove files of another selection or of other settings: they would be counted into the store."""
    for path in [*folder.glob("pool-*.parquet"), *folder.glob("labelled-*.parquet")]:
        if not file_is_done(path, mark):
            path.unlink()
    for path in (folder / SPILL).glob("*.arrow"):
        if not _spill_is_done(path, mark):
            path.unlink()
