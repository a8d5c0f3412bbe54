"""Predictions into answers/: read once, joined to the images of each split, dealt to their shards.

Memory does not grow with the files. Answers in the order of the images are written as they come. Others are first
written into buckets on disk, each a run of images; then every bucket is read, put in order and written to the files of
its shards. Killed, the same call begins again with reading, and leaves shards that are done where it comes to the same.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.answers.forms import Answers, Columns, Form, Names, answers_of, recognise
from pipeline.answers.join import NOBODY, SEVERAL, SplitIndex
from pipeline.answers.reading import PredictionFile
from pipeline.answers.store import (
    ANSWERS,
    MANIFEST,
    answers_fingerprint,
    answers_path,
    answers_schema,
    group_rows,
    is_imported,
    read_answers_manifest,
)
from pipeline.classes import ClassNames, same_names
from pipeline.data.get.layout import SPLIT_WORDS
from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, discard, whole_file, write_sealed
from pipeline.storage.tables import fixed_binary, table_writer

BUCKET_BYTES = 64 << 20  # of the distributions of a bucket
WAITING_BYTES = 64 << 20  # of rows that wait to be written to buckets
SAME = 1e-4  # two answers whose probabilities differ by less agree
SOURCE_BITS = 40  # of a row's number in its file; above them the file's number
SHOWN = 3  # keys in a message
WORDS = SPLIT_WORDS | {"pool": "unlabelled"}  # that a column `split` may have
T = TypeVar("T")


@dataclass(frozen=True)
class Predictions:
    """What is to be imported.

    Attributes:
        teachers: files of each teacher; several teachers are averaged, image by image.
        form: of the answers, None: as recognised.
        names: classes that a person states, None: those that the files state, else the data set's.
        class_names: of the data set.
        in_order: numbers that nobody names are the data set's classes, in its order.
    """

    teachers: tuple[tuple[PredictionFile, ...], ...]
    form: Form | None
    names: tuple[str, ...] | None
    class_names: tuple[str, ...]
    in_order: bool = False


@dataclass(eq=False)
class Tally:
    """What became of the rows.

    Attributes:
        rows: read.
        empty: without an answer in them.
        unmatched: with an answer, of no image of any split.
        ambiguous: whose key is that of several images, of one split or of two.
        doubled: that repeat what was said of an image.
        answered: images with an answer, by split.
        images: by split.
        unknown: answers that name no class, with how often.
        strays: some keys that matched nothing.
    """

    rows: int = 0
    empty: int = 0
    unmatched: int = 0
    ambiguous: int = 0
    doubled: int = 0
    answered: dict[str, int] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    strays: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "rows": self.rows,
            "empty": self.empty,
            "unmatched": self.unmatched,
            "ambiguous": self.ambiguous,
            "doubled": self.doubled,
            "answered": self.answered,
            "images": self.images,
            "unknown": dict(self.unknown.most_common(20)),
            "unknown_answers": self.unknown.total(),
        }


def import_predictions(
    folder: Location,
    scratch: Path,
    predictions: Predictions,
    splits: Mapping[str, Sequence[Shard]],
    fingerprint: str,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write answers/ and return its manifest: `class_names` of the teacher, and what became of the rows.

    Args:
        folder: answers/.
        scratch: a folder on disk for what is read, removed at the end.
        predictions: see there.
        splits: shards of each split, by name.
        fingerprint: of the predictions and how they are read.
        tell: told what is being done.

    Raises:
        DataError: a file cannot be understood; its classes differ from the others'; nothing matches an image; or two
            answers of one teacher about one image disagree.
    """
    mark = [answers_fingerprint(shard, fingerprint) for shards in splits.values() for shard in shards]
    known = read_answers_manifest(folder)
    if (
        known is not None
        and known["shards"] == mark
        and all(is_imported(folder, split, shard, fingerprint) for split, shards in splits.items() for shard in shards)
    ):
        return known
    discard(folder / MANIFEST)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tell("reading the keys of all images")
    indices = {split: SplitIndex(shards) for split, shards in splits.items()}
    understood = [[_understood(file, predictions) for file in files] for files in predictions.teachers]
    names = _one_list(understood, predictions)
    deals = {split: Deal(folder, split, shards, indices[split], names, fingerprint) for split, shards in splits.items()}
    with ExitStack() as stack:
        for deal in deals.values():
            stack.callback(deal.abandon)  # what is not whole in the end
        try:
            tally = _in_order(understood, names, indices, deals)
        except OutOfOrder:
            tally = _by_buckets(understood, names, indices, deals, scratch)
        _require_matches(predictions, tally, indices)
        for split, deal in deals.items():
            tally.answered[split] = deal.close()
    shutil.rmtree(scratch, ignore_errors=True)
    manifest = {"format": ANSWERS.name, "version": ANSWERS.version, "class_names": list(names), "shards": mark}
    manifest["forms"] = sorted({columns.form for files in understood for _, columns in files})
    write_sealed(folder / MANIFEST, manifest | tally.as_json())
    return manifest | tally.as_json()


class OutOfOrder(Exception):
    """Answers do not come in the order of the images."""


def _in_order(
    understood: Sequence[Sequence[tuple[PredictionFile, Columns]]],
    names: tuple[str, ...],
    indices: Mapping[str, SplitIndex],
    deals: "Mapping[str, Deal]",
) -> Tally:
    """Deal answers as they come, while a thread reads ahead.

    Raises:
        OutOfOrder: one is of an image before the last one's, or there are several teachers.
    """
    if len(understood) > 1:
        raise OutOfOrder
    tally, last = Tally(images={split: len(index) for split, index in indices.items()}), dict.fromkeys(indices, -1)
    for split, images, _, p in ahead(_rows(understood[0], names, indices, tally)):
        if images[0] <= last[split] or (np.diff(images) <= 0).any():
            raise OutOfOrder
        last[split] = int(images[-1])
        deals[split].add(images, p)
    return tally


def _by_buckets(
    understood: Sequence[Sequence[tuple[PredictionFile, Columns]]],
    names: tuple[str, ...],
    indices: Mapping[str, SplitIndex],
    deals: "Mapping[str, Deal]",
    scratch: Path,
) -> Tally:
    """Deal answers that come in any order, of any number of teachers."""
    tally = Tally(images={split: len(index) for split, index in indices.items()})
    buckets = {split: Buckets(scratch, split, len(index), len(names)) for split, index in indices.items()}
    for teacher, files in enumerate(understood):
        for split, images, sources, p in ahead(_rows(files, names, indices, tally)):
            buckets[split].add(images, np.full(len(images), teacher, np.int32), sources, p)
    for split, deal in deals.items():
        deal.restart()
        for ordinals, p in ahead(buckets[split].merged(partial(_named, indices[split]), tally)):
            deal.add(ordinals, p)
    return tally


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which a thread makes the next while one is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _understood(file: PredictionFile, predictions: Predictions) -> tuple[PredictionFile, Columns]:
    stated = predictions.names or file.class_names
    names = Names(tuple(stated) or predictions.class_names, bool(stated))
    for _, part in file.parts():
        return file, recognise(part.schema, names, predictions.form, str(file.place), in_order=predictions.in_order)
    raise DataError(f"{file.place} has no row")


def _one_list(
    understood: Sequence[Sequence[tuple[PredictionFile, Columns]]], predictions: Predictions
) -> tuple[str, ...]:
    """The classes of all files: the data set's, in its order, where they are these; else those of the first file.

    Raises:
        DataError: files have different classes, or fewer than two.
    """
    first = understood[0][0]
    names = first[1].names
    for file, columns in (entry for files in understood for entry in files):
        if not same_names(columns.names, names):
            raise DataError(f"{file.place} has other classes than {first[0].place}; give each its own run")
        ClassNames(columns.names, str(file.place))  # refuses two of one name
    if len(names) < 2:
        raise DataError(f"{first[0].place} has {len(names)} class; an answer chooses among at least two")
    return predictions.class_names if same_names(names, predictions.class_names) else names


Rows = tuple[str, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Of a split: ordinals of images (n,), where each one's answer stands (n,), and the distributions (n, C_T)."""


def _rows(
    files: Sequence[tuple[PredictionFile, Columns]],
    names: tuple[str, ...],
    indices: Mapping[str, SplitIndex],
    tally: Tally,
) -> Iterator[Rows]:
    """The answers of one teacher with the images that they are of, as they stand in its files."""
    for number, (file, columns) in enumerate(files):
        where = str(file.place)
        places = ClassNames(names, where).places(columns.names, where)
        order = None if places == tuple(range(len(names))) else np.argsort(places)
        for first, part in ahead(file.parts()):
            if part.num_rows:
                yield from _matched(part, columns, (number << SOURCE_BITS) + first, order, where, indices, tally)


def _matched(
    part: pa.RecordBatch,
    columns: Columns,
    source: int,
    order: NDArray[np.intp] | None,
    where: str,
    indices: Mapping[str, SplitIndex],
    tally: Tally,
) -> Iterator[Rows]:
    first = source & ((1 << SOURCE_BITS) - 1)
    answers = answers_of(part, columns, first, where)
    tally.rows += part.num_rows
    tally.empty += int((~answers.given).sum())
    tally.unknown.update(answers.unknown)
    p = answers.p if order is None else answers.p[:, order]
    found = {split: _images(answers, index) for split, index in indices.items()}
    doubtful = np.sum([places != NOBODY for places in found.values()], axis=0) > 1
    if doubtful.any() and answers.splits is not None:
        found = {split: _in_split(answers.splits, split, doubtful, places) for split, places in found.items()}
    several = np.sum([places >= 0 for places in found.values()], axis=0) > 1
    several |= np.any([places == SEVERAL for places in found.values()], axis=0)
    tally.ambiguous += int((several & answers.given).sum())
    matched = several.copy()
    for split, places in found.items():
        matched |= places >= 0
        mine = np.flatnonzero((places >= 0) & ~several & answers.given)
        if len(mine):
            yield split, places[mine], source + mine, p if len(mine) == len(p) else p[mine]
    strays = np.flatnonzero(~matched & answers.given)
    tally.unmatched += len(strays)
    for place in strays[: SHOWN - len(tally.strays)].tolist():
        tally.strays.append(_told(answers, place))


def _in_split(
    splits: pa.Array, split: str, doubtful: NDArray[np.bool_], places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Places of images, (n,), but not of those doubtful rows that are said to be of another split."""
    encoded = splits.dictionary_encode()
    named = [WORDS.get((word or "").strip().lower()) for word in encoded.dictionary.to_pylist()]
    mine = np.array([*(name in (None, split) for name in named), True])[np.asarray(pc.fill_null(encoded.indices, -1))]
    return np.where(mine | ~doubtful, places, NOBODY)


def _images(answers: Answers, index: SplitIndex) -> NDArray[np.int64]:
    """The ordinal of each row's image, (n,)."""
    if answers.shards is not None and answers.rows is not None:
        return index.by_place(answers.shards, answers.rows)
    assert answers.keys is not None
    return index.by_key(answers.keys)


def _told(answers: Answers, place: int) -> str:
    if answers.keys is not None:
        return repr(answers.keys[place].as_py())
    assert answers.shards is not None
    assert answers.rows is not None
    return f"{answers.shards[place].as_py()}/{answers.rows[place]}"


def _named(index: SplitIndex, ordinal: int) -> str:
    shard = int(np.searchsorted(index.offsets, ordinal, side="right")) - 1
    return f"{index.names[shard]} row {index.rows[ordinal]} ({index.keys[ordinal].as_py()})"


def _require_matches(predictions: Predictions, tally: Tally, indices: Mapping[str, SplitIndex]) -> None:
    """Refuse predictions of another data set, and answers that name no class.

    Raises:
        DataError: nothing was matched, or nothing answered.
    """
    first = predictions.teachers[0][0].place
    if tally.rows and tally.empty == tally.rows:
        said = ", ".join(repr(name) for name, _ in tally.unknown.most_common(SHOWN))
        raise DataError(
            f"{first}: none of {tally.rows:,} rows holds an answer"
            + (f"; {said} name no class, and the classes are {', '.join(predictions.class_names[:10])}" if said else "")
        )
    if tally.unmatched and tally.unmatched + tally.empty == tally.rows:
        ours = [repr(key) for index in indices.values() for key in index.keys[:SHOWN].to_pylist()][:SHOWN]
        raise DataError(
            f"{first}: no key is that of an image. Keys there: {', '.join(tally.strays)}; "
            f"of the images: {', '.join(ours)}"
        )


class Buckets:
    """Rows on disk, by runs of images; see the module.

    Args:
        folder: that holds them.
        split: their name.
        images: of the split, N.
        classes: C_T.
    """

    def __init__(self, folder: Path, split: str, images: int, classes: int) -> None:
        self.folder, self.split, self.images = folder, split, images
        self.kind = np.dtype([("image", "<i8"), ("source", "<i8"), ("teacher", "<i4"), ("p", "<f4", (classes,))])
        self.span = max(1, BUCKET_BYTES // self.kind.itemsize)  # images of a bucket
        self._waiting: list[NDArray[Any]] = []
        self._bytes = 0

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

    def merged(
        self, name: Callable[[int], str], tally: Tally
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """(ordinals (m,), increasing; distributions (m, C_T)) of the answered images, by buckets.

        Raises:
            DataError: two answers of one teacher about one image differ.
        """
        self._flush()
        for number in range(-(-self.images // self.span)):
            path = self._path(number)
            if path.exists():
                yield self._one(np.fromfile(path, self.kind), name, tally)
                path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.rows"

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

    def _one(
        self, rows: NDArray[Any], name: Callable[[int], str], tally: Tally
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if not (np.diff(rows["image"]) > 0).all():
            rows = rows[np.lexsort((rows["source"], rows["teacher"], rows["image"]))]
            again = (np.diff(rows["image"]) == 0) & (np.diff(rows["teacher"]) == 0)
            if again.any():
                later = np.flatnonzero(again) + 1
                apart = np.abs(rows["p"][later] - rows["p"][later - 1]).max(axis=1)
                if len(differ := np.flatnonzero(~(apart <= SAME))):
                    a, b = rows[later[differ[0]] - 1], rows[later[differ[0]]]
                    raise DataError(
                        f"two answers about {name(int(a['image']))} disagree, by {apart[differ[0]]:.3g} in a "
                        f"probability: rows {_row(a):,} and {_row(b):,} of its "
                        "predictions. If they are two teachers': --predictions once for each"
                    )
                tally.doubled += len(later)
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


class Deal:
    """Writes answers, which come in the order of the split, to the files of its shards."""

    def __init__(
        self,
        folder: Location,
        split: str,
        shards: Sequence[Shard],
        index: SplitIndex,
        names: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.folder, self.split, self.shards, self.index = folder, split, shards, index
        self.names, self.fingerprint = names, fingerprint
        self._anew = False
        self._begin()

    def restart(self) -> None:
        """Begin again with the first shard, and write all anew: of what was written, rows may be missing."""
        self._anew = True
        self.abandon()
        self._begin()

    def _begin(self) -> None:
        self._next = 0  # shard
        self._answered = 0
        self._open = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def add(self, ordinals: NDArray[np.int64], p: NDArray[np.float32]) -> None:
        """Take in the answers of images (m,), increasing, after all before."""
        self._answered += len(ordinals)
        while len(ordinals):
            end = int(self.index.offsets[self._next + 1])
            mine = int(np.searchsorted(ordinals, end))
            if mine:
                self._write(ordinals[:mine], p[:mine])
            ordinals, p = ordinals[mine:], p[mine:]
            if len(ordinals):
                self._finish()

    def close(self) -> int:
        """Finish the last file, and those of shards without an answer; how many images have one."""
        while self._next < len(self.shards):
            self._finish()
        return self._answered

    def abandon(self) -> None:
        """Leave no half-written file."""
        self._open.pop_all().__exit__(OutOfOrder, OutOfOrder(), None)

    @property
    def _is_done(self) -> bool:
        shard = self.shards[self._next]
        return not self._anew and is_imported(self.folder, self.split, shard, self.fingerprint)

    def _write(self, ordinals: NDArray[np.int64], p: NDArray[np.float32]) -> None:
        """Append to the file of the present shard, which begins with its first answer."""
        if self._writer is None:
            if self._is_done:
                return
            self._start()
        if self._writer is not None:
            table = pa.table([self.index.rows[ordinals], fixed_binary(p)], schema=self._writer.schema)
            self._writer.write_table(table, row_group_size=group_rows(len(self.names)))

    def _start(self) -> None:
        shard = self.shards[self._next]
        notes = {
            "shard": shard.name,
            "fingerprint": answers_fingerprint(shard, self.fingerprint),
            "class_names": list(self.names),
        }
        temporary = self._open.enter_context(whole_file(answers_path(self.folder, self.split, shard.name)))
        writer = table_writer(temporary, ANSWERS, answers_schema(len(self.names)), notes)
        self._writer = self._open.enter_context(writer)

    def _finish(self) -> None:
        """The file of the present shard is whole; the next one's turn."""
        if self._writer is None and not self._is_done:
            self._start()  # without a row
        self._open.close()
        self._writer, self._next = None, self._next + 1


def describe(predictions: Predictions) -> tuple[str, ...]:
    """The classes of the answers, in the order in which they are stored; looks at the first part of each file.

    Raises:
        DataError: a file cannot be understood, or has other classes than another one.
    """
    return _one_list(
        [[_understood(file, predictions) for file in files] for files in predictions.teachers], predictions
    )
