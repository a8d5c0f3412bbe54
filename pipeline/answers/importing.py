"""Predictions into answers/: read once, joined to the images of each split, dealt to their shards.

Memory does not grow with the files. Answers in the order of the images are written as they come. Others are first
written into buckets on disk, each a run of images; then every bucket is read, put in order and written to the files of
its shards. Killed, the same call begins again with reading, and leaves shards that are done where it comes to the same.
"""

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
from numpy.typing import NDArray

from pipeline.answers.buckets import SOURCE_BITS, Buckets, remove_buckets
from pipeline.answers.deal import Deal, OutOfOrder
from pipeline.answers.forms import Answers, Columns, Form, Names, answers_of, recognise
from pipeline.answers.join import NOBODY, SEVERAL, SplitIndex
from pipeline.answers.reading import PredictionFile
from pipeline.answers.store import ANSWERS, MANIFEST, answers_fingerprint, is_imported, read_answers_manifest
from pipeline.classes import ClassNames, canonical, same_names
from pipeline.data.get.layout import SPLIT_WORDS
from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, discard, write_sealed

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
        elsewhere: whose column `split` names another split than their image's.
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
    elsewhere: int = 0
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
            "elsewhere": self.elsewhere,
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
    remove_buckets(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    tell("reading the keys of all images")
    indices = {split: SplitIndex(shards) for split, shards in splits.items()}
    understood = [[_understood(file, predictions) for file in files] for files in predictions.teachers]
    names, embedding = _one_list(understood, predictions), _one_length(understood)
    deals = {
        split: Deal(folder, split, shards, indices[split], names, fingerprint, embedding)
        for split, shards in splits.items()
    }
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
    remove_buckets(scratch)
    manifest = {"format": ANSWERS.name, "version": ANSWERS.version, "class_names": list(names), "shards": mark}
    manifest["forms"] = sorted({columns.form for files in understood for _, columns in files})
    if embedding:
        manifest["embedding"] = embedding
    write_sealed(folder / MANIFEST, manifest | tally.as_json())
    return manifest | tally.as_json()


def _in_order(
    understood: Sequence[Sequence[tuple[PredictionFile, Columns]]],
    names: tuple[str, ...],
    indices: Mapping[str, SplitIndex],
    deals: Mapping[str, Deal],
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
    deals: Mapping[str, Deal],
    scratch: Path,
) -> Tally:
    """Deal answers that come in any order, of any number of teachers."""
    tally = Tally(images={split: len(index) for split, index in indices.items()})
    embedding = understood[0][0][1].numbers
    buckets = {split: Buckets(scratch, split, len(index), len(names), embedding) for split, index in indices.items()}
    for teacher, files in enumerate(understood):
        for split, images, sources, p in ahead(_rows(files, names, indices, tally)):
            buckets[split].add(images, np.full(len(images), teacher, np.int32), sources, p)
    for split, deal in deals.items():
        deal.restart()
        for ordinals, p in ahead(buckets[split].merged(partial(_named, indices[split]))):
            deal.add(ordinals, p)
        tally.doubled += buckets[split].doubled
    return tally


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which a thread makes the next while one is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _understood(file: PredictionFile, predictions: Predictions) -> tuple[PredictionFile, Columns]:
    stated, own = predictions.names or file.class_names, file.class_names
    if predictions.names and own and [*map(canonical, own)] != [*map(canonical, predictions.names)]:
        raise DataError(
            f"{file.place} states its classes ({', '.join(own[:SHOWN])}, …), and --classes says others, or another "
            f"order ({', '.join(predictions.names[:SHOWN])}, …): leave --classes out, or correct the file"
        )
    names = Names(tuple(stated) or predictions.class_names, bool(stated))
    for _, part in file.parts():
        columns = recognise(part.schema, names, predictions.form, str(file.place), in_order=predictions.in_order)
        return file, columns.with_numbers(part)
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


def _one_length(understood: Sequence[Sequence[tuple[PredictionFile, Columns]]]) -> int:
    """Numbers of an embedding, E; 0: there is none.

    Raises:
        DataError: files disagree, or two teachers have some.
    """
    entries = [entry for files in understood for entry in files]
    (first, columns), length = entries[0], entries[0][1].numbers
    for file, other in entries:
        if other.numbers != length:
            raise DataError(
                f"{file.place} has embeddings of {other.numbers:,} numbers, {first.place} of {length:,}; 0 is none"
            )
    if length and len(understood) > 1:
        raise DataError(
            f"{first.place} has a column {columns.embedding!r}, and there are {len(understood)} teachers: an image has "
            "one embedding. Leave the column out, or give one teacher"
        )
    return length


Rows = tuple[str, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Of a split: ordinals of images (n,), where each one's answer stands (n,), distributions, embeddings (n, C_T + E)."""


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
    if columns.numbers:
        p = np.concatenate([p, answers.embeddings], axis=1)
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
            if answers.splits is not None:
                said = _in_split(answers.splits, split, np.ones(len(places), bool), places)
                tally.elsewhere += int((said[mine] == NOBODY).sum())
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


def describe(predictions: Predictions) -> tuple[str, ...]:
    """The classes of the answers, in the order in which they are stored; looks at the first part of each file.

    Raises:
        DataError: a file cannot be understood, or has other classes than another one.
    """
    return _one_list(
        [[_understood(file, predictions) for file in files] for files in predictions.teachers], predictions
    )
