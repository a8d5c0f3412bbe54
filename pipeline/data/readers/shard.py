"""What every reader offers: shards of samples, read in order, identified by (shard, row)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, NamedTuple

import numpy as np

from pipeline.errors import DataError
from pipeline.storage.files import fingerprint

NO_LABEL = -1


class Sample(NamedTuple):  # a tuple is made in a third of a frozen dataclass's time; there are millions
    """One entry of a shard, whether or not its bytes are an image."""

    row: int
    """Place in the shard, from 0; entries that do not decode count too."""
    key: str
    """For people: the path or tar key, else `<shard>-<row>`. It may occur twice; (shard, row) does not."""
    data: bytes
    """The encoded image; empty where there is none."""
    label: int = NO_LABEL


class LeftOut(NamedTuple):
    """What lies in a source and is no sample of it."""

    key: str
    reason: str
    """One word: decode_error, empty, too_large, no_class, repeat_of, two_classes, hidden, no_image, another_view, …"""
    detail: str


class Shard(ABC):
    """A unit of work: a file (or a run of files) that is read from front to back.

    Shards are small descriptions that can be sent to another process; they hold no open file.
    """

    name: str
    """Unique in its split and stable, such as `pool-00000`."""
    knows_its_rows: ClassVar[bool] = True
    """False where `rows()` reads the whole file, as for a tar."""

    @abstractmethod
    def rows(self) -> int:
        """How many samples `read()` gives."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the shard's content does."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        """Stream the samples from the `start`-th up to, not including, the `stop`-th.

        Raises:
            DataError: the file is missing, cut short or malformed; samples before that place are given.
        """

    def identities(self) -> Iterator[tuple[int, str]]:
        """Row and key of the samples in order; readers that can do so leave the images unread.

        Raises:
            DataError: as `read`.
        """
        return ((sample.row, sample.key) for sample in self.read())

    def labels(self) -> np.ndarray:
        """The labels in order, int64 (rows,); readers that can do so leave the images unread."""
        return np.fromiter((sample.label for sample in self.read()), dtype=np.int64)

    def class_names(self) -> tuple[str, ...]:
        """The class names that the file itself states, or nothing."""
        return ()

    def has_bare_numbers(self) -> bool:
        """Whether labels are numbers that the file does not name, and that mean what the writer meant."""
        return False

    def left_out(self) -> list[LeftOut]:
        """What lies in the source and is no sample; readers that must look for it look when asked."""
        return []


@dataclass(frozen=True)
class Window(Shard):
    """The samples `start` … `stop` of another shard; a sample keeps its row."""

    shard: Shard
    start: int
    stop: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The whole shard's name: (shard, row) is one identity, cut or not."""
        return self.shard.name

    def rows(self) -> int:
        return self.stop - self.start

    def fingerprint(self) -> str:
        return fingerprint([self.shard.fingerprint(), self.start, self.stop])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        last = self.stop if stop is None else min(self.stop, self.start + stop)
        return self.shard.read(self.start + start, last)

    def identities(self) -> Iterator[tuple[int, str]]:
        return islice(self.shard.identities(), self.start, self.stop)

    def labels(self) -> np.ndarray:
        return self.shard.labels()[self.start : self.stop]

    def class_names(self) -> tuple[str, ...]:
        return self.shard.class_names()

    def has_bare_numbers(self) -> bool:
        return self.shard.has_bare_numbers()

    def left_out(self) -> list[LeftOut]:
        return self.shard.left_out()


@dataclass(frozen=True)
class Renumbered(Shard):
    """Another shard, its labels numbered as the data set numbers them: `places` has one for each label of the file."""

    shard: Shard
    places: tuple[int, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The shard's own."""
        return self.shard.name

    @property
    def knows_its_rows(self) -> bool:  # type: ignore[override]
        """As the shard does."""
        return self.shard.knows_its_rows

    def rows(self) -> int:
        return self.shard.rows()

    def fingerprint(self) -> str:
        return fingerprint([self.shard.fingerprint(), list(self.places)])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        for sample in self.shard.read(start, stop):
            label = translated(np.array([sample.label]), self.places, sample.row, self.name)
            yield sample._replace(label=int(label[0]))

    def identities(self) -> Iterator[tuple[int, str]]:
        return self.shard.identities()

    def labels(self) -> np.ndarray:
        return translated(self.shard.labels(), self.places, 0, self.name)

    def left_out(self) -> list[LeftOut]:
        return self.shard.left_out()


@dataclass(frozen=True)
class Chosen(Shard):
    """Some samples of another shard: those at `places`, ascending, of what it gives. A sample keeps its row."""

    shard: Shard
    places: tuple[int, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The shard's own."""
        return self.shard.name

    def rows(self) -> int:
        return len(self.places)

    def fingerprint(self) -> str:
        return fingerprint([self.shard.fingerprint(), list(self.places)])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        chosen = self.places[start:stop]
        if chosen:
            wanted = frozenset(chosen)
            samples = self.shard.read(chosen[0], chosen[-1] + 1)
            yield from (sample for place, sample in enumerate(samples, chosen[0]) if place in wanted)

    def identities(self) -> Iterator[tuple[int, str]]:
        wanted = frozenset(self.places)
        return (identity for place, identity in enumerate(self.shard.identities()) if place in wanted)

    def labels(self) -> np.ndarray:
        return self.shard.labels()[list(self.places)]

    def left_out(self) -> list[LeftOut]:
        return self.shard.left_out()


def translated(labels: np.ndarray, places: Sequence[int], first: int, file: str) -> np.ndarray:
    """Labels of a file, int64 (n,), as the data set numbers its classes; -1, no label, stays.

    Args:
        labels: as the file has them.
        places: from `ClassNames.places`.
        first: row of the first, for the message.
        file: for the message.

    Raises:
        DataError: a label is none of the file's own classes.
    """
    outside = np.flatnonzero((labels < -1) | (labels >= len(places)))
    if len(outside):
        row = int(outside[0])
        raise DataError(f"{file}: row {first + row} has label {int(labels[row])}; the file names {len(places)} classes")
    return np.asarray([*places, -1], dtype=np.int64)[labels]  # the last is what -1 picks


def between(samples: Iterator[Sample], start: int, stop: int | None) -> Iterator[Sample]:
    """The part of a stream that `Shard.read` was asked for, for readers that cannot seek."""
    return islice(samples, start, stop)
