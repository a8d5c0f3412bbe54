"""Examples out of selection.parquet, which may have tens of millions of rows: only a few are ever in memory."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.pool.selection import SELECTION
from pipeline.report.page.examples import spread
from pipeline.storage.files import Location
from pipeline.storage.tables import open_table, read_header

BATCH = 1 << 17  # rows in memory at a time
POINTS = 64  # of a curve
ROW_BITS = 40  # of a number that stands for (shard, row)
Identity = tuple[str, int]  # shard, row


@dataclass(frozen=True)
class Kept:
    """An image that serves a class.

    Attributes:
        key, shard, row: of the image.
        rank: in the class, from 0.
        log_odds: of the class, nats.
        repeat: how often it is used for the class.
        serves: all classes that it serves, by index.
    """

    key: str
    shard: str
    row: int
    rank: int
    log_odds: float
    repeat: int
    serves: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KeptClass:
    """What a class keeps: examples, surest first, and the curve of its log-odds.

    Attributes:
        rows: kept for the class.
        examples: surest first.
        ends: so many of the examples are the surest, and as many the least sure; 0: they are all of a kind.
        exact: whether the examples are those of the whole class, and not of some shards alone.
        ranks, log_odds: points of the curve, first and last rank included.
    """

    rows: int
    examples: tuple[Kept, ...]
    ends: int
    exact: bool
    ranks: NDArray[np.int64]
    log_odds: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """A selection.parquet: rows by class, and in a class by rank.

    Attributes:
        path: of the file.
        class_names: of the teacher.
        rules: as written in the file.
        fingerprint: of rules and scores.
        counts: rows of each class, (C,).
    """

    path: Location
    class_names: tuple[str, ...]
    rules: dict[str, str]
    fingerprint: str
    counts: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The place of each class's first row, (C,)."""
        return np.cumsum(self.counts) - self.counts

    def take(self, places: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """The rows at these places of the file (n,), increasing."""
        with open_table(self.path, SELECTION) as file:
            return file.take(places, columns)

    def in_shards(self, shards: Sequence[str]) -> NDArray[np.int64]:
        """Places of the rows whose image lies in one of `shards`."""
        places, begin = [np.empty(0, np.int64)], 0
        for batch in stream(self.path, ["shard"]):
            places.append(begin + np.flatnonzero(codes(batch.column(0), shards) >= 0))
            begin += batch.num_rows
        return np.concatenate(places)

    def serving(self, images: Sequence[Identity]) -> dict[Identity, tuple[int, ...]]:
        """The classes that each of a few images serves."""
        shards = sorted({shard for shard, _ in images})
        numbers = {shard: number for number, shard in enumerate(shards)}
        wanted = np.unique([(numbers[shard] << ROW_BITS) + row for shard, row in images])
        served = defaultdict(list)
        for batch in stream(self.path, ["shard", "row", "class"]):
            identity = (codes(batch.column(0), shards) << ROW_BITS) + batch.column(1).to_numpy()
            for place in np.flatnonzero(np.isin(identity, wanted)).tolist():
                shard, row = divmod(int(identity[place]), 1 << ROW_BITS)
                served[shards[shard], row].append(batch.column(2)[place].as_py())
        return {identity: tuple(classes) for identity, classes in served.items()}


def open_selected(path: Location) -> SelectedRows:
    """Look at a selection.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    header = read_header(path, SELECTION)
    counts = np.zeros(len(header.class_names), np.int64)
    for batch in stream(path, ["class"]):
        counts += np.bincount(batch.column(0).to_numpy(), minlength=len(counts))
    others = {"format", "version", "fingerprint", "scores", "class_names"}
    return SelectedRows(
        path=path,
        class_names=header.class_names,
        rules={name: text for name, text in header.notes.items() if name not in others},
        fingerprint=header.notes["fingerprint"],
        counts=counts,
    )


def choose_shards(selected: SelectedRows, shards: Sequence[str], wanted: int, limit: int) -> list[str]:
    """At most `limit` of `shards`, in their order: first those that hold the examples one would like to see.

    All classes take turns: the surest image of each, the least sure of each, the next.
    """
    if len(shards) <= limit:
        return list(shards)
    turns = []
    for offset, count in zip(selected.offsets.tolist(), selected.counts.tolist(), strict=True):
        places, ends = spread(count, wanted)
        top, end = places[:ends], places[len(places) - ends :][::-1]
        mixed = np.stack([top, end], axis=1).ravel()
        order = np.concatenate([mixed, places[ends : len(places) - ends]])  # (examples,)
        turns += [(turn, offset + int(place)) for turn, place in enumerate(order)]
    turns = sorted(turns)[: 4 * limit]
    places = np.array(sorted(place for _, place in turns), np.int64)
    lies = dict(zip(places.tolist(), selected.take(places, ["shard"]).column(0).to_pylist(), strict=True))
    chosen = list(dict.fromkeys(lies[place] for _, place in turns))[:limit]
    every = np.linspace(0, len(shards) - 1, limit).astype(int)  # others, evenly, where the examples need few
    chosen = list(dict.fromkeys(chosen + [shards[i] for i in every]))[:limit]
    return [shard for shard in shards if shard in set(chosen)]


def kept_classes(selected: SelectedRows, shards: Sequence[str], wanted: int, *, whole: bool) -> list[KeptClass]:
    """For each class up to `wanted` examples, with pictures in `shards` only; `whole`: that is the whole pool."""
    inside = None if whole else selected.in_shards(shards)
    places, ends, sizes = [], [], []
    for offset, count in zip(selected.offsets, selected.counts, strict=True):
        if inside is None:
            there = np.arange(offset, offset + count)
        else:
            there = inside[slice(*np.searchsorted(inside, [offset, offset + count]))]
        chosen, end = spread(len(there), wanted)
        places.append(there[chosen])
        ends.append(end)
        sizes.append(len(chosen))
    columns = ["key", "shard", "row", "rank", "log_odds", "repeat"]
    rows = selected.take(np.concatenate(places), columns).to_pylist()
    serves = selected.serving([(row["shard"], row["row"]) for row in rows]) if rows else {}
    examples = [Kept(**row, serves=serves[row["shard"], row["row"]]) for row in rows]
    curves = _curves(selected)
    result, begin = [], 0
    for c, size in enumerate(sizes):
        mine = tuple(examples[begin : begin + size])
        begin += size
        result.append(KeptClass(int(selected.counts[c]), mine, ends[c], whole, *curves[c]))
    return result


def _curves(selected: SelectedRows) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Ranks and log-odds of at most POINTS rows of each class."""
    ranks = [np.unique(np.linspace(0, count - 1, min(count, POINTS)).astype(np.int64)) for count in selected.counts]
    places = np.concatenate([offset + rank for offset, rank in zip(selected.offsets, ranks, strict=True)])
    values = selected.take(places, ["log_odds"]).column(0).to_numpy()
    ends = np.cumsum([len(rank) for rank in ranks])
    return list(zip(ranks, np.split(values, ends[:-1]), strict=True))


def codes(column: pa.DictionaryArray, names: Sequence[str]) -> NDArray[np.int64]:
    """The place in `names` of each text of a dictionary column, (n,); -1 where it is none of them."""
    known = pc.fill_null(pc.index_in(column.dictionary, pa.array(names, pa.string())), -1).to_numpy()
    if not len(known):
        return np.full(len(column), -1, np.int64)
    indices = pc.fill_null(column.indices, 0).to_numpy().astype(np.int64)
    return np.where(column.is_null().to_numpy(zero_copy_only=False), -1, known[indices]).astype(np.int64)


def stream(path: Location, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of the selection in order, a bounded number at a time."""
    with open_table(path, SELECTION) as file:
        yield from file.batches(columns, BATCH)
