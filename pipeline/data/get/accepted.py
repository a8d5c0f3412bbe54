"""Images that an import accepts, on disk between reading and writing: memory does not depend on their number."""

import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from PIL import Image

from pipeline.data.decode import Status, decode_stream
from pipeline.data.get.writing import Row
from pipeline.data.manifest import SplitName
from pipeline.data.readers.shard import LeftOut

PROBE = 32  # pixels: an image is decoded to this size to see whether it can be
HELD_OUT_FIRST: tuple[SplitName | None, ...] = ("test", "validation", "labelled", None)
GREY_MODES = ("1", "L", "LA", "I;16", "I", "F")


class Entry(NamedTuple):
    """An entry of the source."""

    key: str
    class_name: str | None
    """Empty if it has no class; None for the pool."""
    data: bytes
    split: SplitName | None = None
    """None: to be divided."""


class Accepted(NamedTuple):
    """An image whose bytes lie in the file of `AcceptedImages`."""

    key: str
    class_name: str | None
    split: SplitName | None
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
        name = None if entry.class_name is None else unicodedata.normalize("NFC", entry.class_name).strip()
        image = Accepted(entry.key, name, entry.split, self.file.tell(), len(entry.data))
        self.file.write(entry.data)
        self.images.append(image)
        return image

    def rows(self, images: Iterable[Accepted], labels: dict[str, int]) -> Iterator[Row]:
        """Some of the images with their bytes, streamed."""
        for image in images:
            self.file.seek(image.offset)
            yield Row(image.key, self.file.read(image.length), labels.get(image.class_name or "", -1))


def accept(file: IO[bytes], entries: Iterable[Entry], workers: int) -> AcceptedImages:
    """Keep what decodes and has a class or is the pool's.

    Of a labelled image that comes again one is kept, in the test split rather than the validation split, and there
    rather than for training; where its copies are of several classes, which is right is not known, and none is kept.
    """
    accepted = AcceptedImages(file)
    copies: dict[bytes, list[Accepted]] = {}
    stream = decode_stream(entries, PROBE, workers, data_of=lambda entry: entry.data)
    for entry, _, status, detail in stream:
        if status is not Status.ok:
            accepted.left_out.append(LeftOut(entry.key, status, detail))
        elif entry.class_name is not None and not entry.class_name.strip():
            accepted.left_out.append(LeftOut(entry.key, "no_class", "is in no class folder, and has no label"))
        elif entry.class_name is None:
            accepted.add(entry)
        else:
            copies.setdefault(hashlib.sha256(entry.data).digest(), []).append(accepted.add(entry))
            _measure(accepted, entry.data)
    _leave_one_of_each(accepted, (images for images in copies.values() if len(images) > 1))
    return accepted


def _leave_one_of_each(accepted: AcceptedImages, repeated: Iterable[list[Accepted]]) -> None:
    """Take the copies of labelled images out."""
    out = set[Accepted]()
    for images in repeated:
        classes = list(dict.fromkeys(image.class_name for image in images))
        kept = None
        if len(classes) == 1:
            kept = min(images, key=lambda image: HELD_OUT_FIRST.index(image.split))
        for image in images:
            if kept is None:
                others = ", ".join(f"{other.key} ({other.class_name})" for other in images if other is not image)
                left_out = LeftOut(image.key, "two_classes", f"{image.class_name}; the same image is {others}")
            else:
                left_out = LeftOut(image.key, "repeat_of", kept.key)
            if image is not kept:
                out.add(image)
                accepted.left_out.append(left_out)
    accepted.images = [image for image in accepted.images if image not in out]


def _measure(accepted: AcceptedImages, data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        accepted.sides[min(image.size)] += 1
        accepted.colour |= image.mode not in GREY_MODES
