"""Images that an import accepts, on disk between reading and writing: memory does not depend on their number."""

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
    """An entry of the source."""

    key: str
    class_name: str | None
    """Empty if it has no class; None for the pool."""
    data: bytes


class Accepted(NamedTuple):
    """An image whose bytes lie in the file of `AcceptedImages`."""

    key: str
    class_name: str | None
    offset: int
    length: int


@dataclass
class AcceptedImages:
    """Images in a file, one after another, and what a manifest says of them."""

    file: IO[bytes]
    images: list[Accepted] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    sides: Counter[int] = field(default_factory=Counter)
    """Shorter sides of the labelled images, pixels."""
    colour: bool = False

    def add(self, entry: Entry) -> Accepted:
        """Append an image."""
        image = Accepted(entry.key, entry.class_name, self.file.tell(), len(entry.data))
        self.file.write(entry.data)
        self.images.append(image)
        return image

    def rows(self, images: Iterable[Accepted], labels: dict[str, int]) -> Iterator[Row]:
        """Some of the images with their bytes, streamed."""
        for image in images:
            self.file.seek(image.offset)
            yield Row(image.key, self.file.read(image.length), labels.get(image.class_name or "", -1))


def accept(file: IO[bytes], entries: Iterable[Entry], workers: int) -> AcceptedImages:
    """Keep what decodes and has a class or is the pool's; of repeated labelled images, the first."""
    accepted = AcceptedImages(file)
    seen: dict[bytes, Accepted] = {}
    stream = decode_stream(entries, PROBE, workers, data_of=lambda entry: entry.data)
    for entry, _, status, detail in stream:
        content = hashlib.sha256(entry.data).digest()
        if status is not Status.ok:
            accepted.left_out.append(LeftOut(entry.key, status, detail))
        elif entry.class_name == "":
            accepted.left_out.append(LeftOut(entry.key, "no_class", "is in no class folder and has no .cls"))
        elif entry.class_name is None:
            accepted.add(entry)
        elif first := seen.get(content):
            accepted.left_out.append(_repeat(entry, first))
        else:
            seen[content] = accepted.add(entry)
            _measure(accepted, entry.data)
    return accepted


def _repeat(entry: Entry, first: Accepted) -> LeftOut:
    same = entry.class_name == first.class_name
    classes = "" if same else f", which is {first.class_name}; this one is {entry.class_name}"
    return LeftOut(entry.key, "repeat_of", first.key + classes)


def _measure(accepted: AcceptedImages, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        accepted.sides[min(image.size)] += 1
        accepted.colour |= image.mode not in GREY_MODES
