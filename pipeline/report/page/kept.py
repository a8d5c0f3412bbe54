"""Examples out of selection.parquet, which may have tens of millions of rows: only a few are ever in memory."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.pool.selection import FORMAT, VERSION
from pipeline.report.page.examples import spread
from pipeline.storage.files import Location
from pipeline.storage.tables import open_parquet

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
        """The rows at these places of the file (n,), increasing. Row groups without any are not read."""
        parts, begin = [], 0
        with reading(self.path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                first, last = np.searchsorted(places, [begin, begin + size])
                if first < last:
                    table = file.read_row_group(group, columns=list(columns))
                    parts.append(table.take(pa.array(places[first:last] - begin)))
                begin += size
            return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(list(columns))

    def in_shards(self, shards: Sequence[str]) -> NDArray[np.int64]:
        """Places of the rows whose image lies in one of `shards`."""
        found, begin = [np.empty(0, np.int64)], 0
        for batch in stream(self.path, ["shard"]):
            found.append(begin + np.flatnonzero(codes(batch.column(0), shards) >= 0))
            begin += batch.num_rows
        return np.concatenate(found)

    def serving(self, images: Sequence[Identity]) -> dict[Identity, tuple[int, ...]]:
        """The classes that each of a few images serves."""
        shards = sorted({shard for shard, _ in images})
        numbers = {shard: number for number, shard in enumerate(shards)}
        wanted = np.unique([(numbers[shard] << ROW_BITS) + row for shard, row in images])
        found = defaultdict(list)
        for batch in stream(self.path, ["shard", "row", "class"]):
            identity = (codes(batch.column(0), shards) << ROW_BITS) + batch.column(1).to_numpy()
            for at in np.flatnonzero(np.isin(identity, wanted)).tolist():
                shard, row = divmod(int(identity[at]), 1 << ROW_BITS)
                found[shards[shard], row].append(batch.column(2)[at].as_py())
        return {identity: tuple(classes) for identity, classes in found.items()}


def open_selected(path: Location) -> SelectedRows:
    """Look at a selection.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    with reading(path) as file:
        meta = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
    found = (meta.get("mpl.format", "no selection"), meta.get("mpl.version", "?"))
    if found != (FORMAT, VERSION):
        raise DataError(f"{path} is {found[0]} version {found[1]}, expected {FORMAT} version {VERSION}")
    names = tuple(json.loads(meta["mpl.class_names"]))
    counts = np.zeros(len(names), np.int64)
    for batch in stream(path, ["class"]):
        counts += np.bincount(batch.column(0).to_numpy(), minlength=len(names))
    told = {"format", "version", "fingerprint", "scores", "class_names"}
    rules = {k.removeprefix("mpl."): v for k, v in meta.items() if k.startswith("mpl.")}
    return SelectedRows(
        path=path,
        class_names=names,
        rules={name: value for name, value in rules.items() if name not in told},
        fingerprint=meta["mpl.fingerprint"],
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
    chosen = list(dict.fromkeys(chosen + [shards[at] for at in every]))[:limit]
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
    """The rows of a Parquet file in order, a bounded number at a time."""
    with reading(path) as file:
        yield from file.iter_batches(BATCH, columns=list(columns))


@contextmanager
def reading(path: Location) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; failures become DataError."""
    try:
        with open_parquet(path) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; run mpl filter") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); run mpl filter again") from error
