"""Images of an import on disk, between reading and writing: memory does not depend on their number."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from PIL import Image

from pipeline.data.decode import Status, decode_stream
from pipeline.data.get.writing import Row

PROBE = 32  # pixels: an image is decoded to this size to see whether it can be
GREY_MODES = ("1", "L", "LA", "I;16", "I", "F")


class LeftOut(NamedTuple):
    """An entry of the source that is not in the data set."""

    key: str
    reason: str
    """decode_error, empty, too_large, no_class or repeat_of."""
    detail: str


class Entry(NamedTuple):
    key: str
    kind: str | None
    """The class; empty if it has none; None for the pool."""
    data: bytes


class Kept(NamedTuple):
    """An image in the spool."""

    key: str
    kind: str | None
    offset: int
    length: int


@dataclass
class Spool:
    """Images on disk, and what is to be said of them."""

    file: IO[bytes]
    kept: list[Kept] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)
    """Shorter sides of the labelled images, pixels."""
    colour: bool = False

    def add(self, entry: Entry) -> Kept:
        kept = Kept(entry.key, entry.kind, self.file.tell(), len(entry.data))
        self.file.write(entry.data)
        self.kept.append(kept)
        return kept

    def rows(self, kept: list[Kept], labels: dict[str, int]) -> Iterator[Row]:
        for one in kept:
            self.file.seek(one.offset)
            yield Row(one.key, self.file.read(one.length), labels.get(one.kind or "", -1))


def fill_spool(file: IO[bytes], entries: Iterable[Entry], workers: int) -> Spool:
    """Keep what decodes and has a class or is the pool's; of repeated labelled images, the first."""
    spool = Spool(file)
    seen: dict[bytes, Kept] = {}
    stream = decode_stream(entries, PROBE, workers, data_of=lambda entry: entry.data)
    for entry, _, status, detail in stream:
        content = hashlib.sha256(entry.data).digest()
        if status is not Status.ok:
            spool.left_out.append(LeftOut(entry.key, status, detail))
        elif entry.kind == "":
            spool.left_out.append(LeftOut(entry.key, "no_class", "is in no class folder and has no .cls"))
        elif entry.kind is None:
            spool.add(entry)
        elif first := seen.get(content):
            spool.left_out.append(_repeat(entry, first))
        else:
            seen[content] = spool.add(entry)
            _measure(spool, entry.data)
    return spool


def _repeat(entry: Entry, first: Kept) -> LeftOut:
    also = "" if entry.kind == first.kind else f", which is {first.kind}; this one is {entry.kind}"
    return LeftOut(entry.key, "repeat_of", first.key + also)


def _measure(spool: Spool, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        spool.sides[min(image.size)] += 1
        spool.colour |= image.mode not in GREY_MODES
