"""WebDataset: a tar whose neighbouring members of one key make up a sample.

Two samples of one key stay two samples: identity is (shard, row). Nothing is ever extracted to disk. Rows count the
samples that are there: a download that failed for img2dataset left nothing in the tar, and has no row; a sample without
an image has one, and counts as empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np

from pipeline.data.readers.shard import IMAGE_SUFFIXES, NO_LABEL, Sample, Shard, between
from pipeline.data.readers.tar import MEMBER_LIMIT, open_tar
from pipeline.errors import DataError
from pipeline.storage.files import Location, quick_fingerprint

LABEL = "cls"


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    names: set[str] = field(default_factory=set)
    """Suffixes so far: one that comes again begins another sample."""
    images: list[tuple[str, bytes]] = field(default_factory=list)
    """Suffix and bytes; a sample's image is the first."""
    held: int = 0
    """Bytes of them."""
    label: str | None = None


@dataclass(frozen=True)
class TarShard(Shard):
    """One tar, plain or compressed, read from front to back."""

    name: str
    path: Location
    names: tuple[str, ...] | None = None
    """Class names, for labels that are not numbers; None: labels are not read (a pool's)."""

    knows_its_rows: ClassVar[bool] = False

    def rows(self) -> int:
        return sum(1 for _ in self._groups(images=0))

    def fingerprint(self) -> str:
        try:
            return quick_fingerprint(self.path)
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: there is no such file") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error})") from error

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        return between(self._samples(), start, stop)

    def labels(self) -> np.ndarray:
        groups = self._groups(images=0)
        return np.array([self._label(row, group) for row, group in enumerate(groups)], dtype=np.int64)

    def _samples(self) -> Iterator[Sample]:
        for row, group in enumerate(self._groups(images=1)):
            data = group.images[0][1] if group.images else b""
            yield Sample(row, group.key, data, self._label(row, group))

    def images(self) -> Iterator[tuple[str, bytes, str | None]]:
        """Key, bytes and `.cls` text of every image: a sample without `.cls` may have several."""
        for group in self._groups(images=None):
            for suffix, data in group.images[: 1 if group.label is not None else None]:
                yield f"{group.key}.{suffix}", data, group.label

    def _label(self, row: int, group: _Group) -> int:
        if self.names is None or group.label is None:
            return NO_LABEL
        if group.label in self.names:
            return self.names.index(group.label)
        try:
            return int(group.label)
        except ValueError:
            raise DataError(
                f"{self.path}: row {row} ({group.key}) has the label {group.label[:40]!r}, "
                "which is neither a number nor a class name of the manifest"
            ) from None

    def _groups(self, images: int | None) -> Iterator[_Group]:
        """The samples, each with its first so many images (None: all)."""
        group = None
        with open_tar(self.path) as tar:
            while (name := tar.next()) is not None:
                if (split := _key_and_suffix(name)) is None:
                    continue
                key, suffix = split
                if group is None or key != group.key or suffix in group.names:
                    if group is not None:
                        yield group
                    group = _Group(key)
                group.names.add(suffix)
                if suffix == LABEL:
                    group.label = tar.read().decode("utf-8", "replace").strip()
                elif (images is None or len(group.images) < images) and _is_image(suffix):
                    group.held += tar.size
                    if group.held > MEMBER_LIMIT:
                        raise DataError(
                            f"{self.path}: the images of {key} have more than {MEMBER_LIMIT:,} bytes together"
                        )
                    group.images.append((suffix, tar.read()))
        if group is not None:
            yield group


def _key_and_suffix(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` → (`a/b`, `seg.png`), as webdataset has it; None for what belongs to no sample."""
    if name.startswith("./") or "//" in name or "/./" in name:
        name = str(PurePosixPath(name))
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not dot or not stem:
        return None
    return folder + slash + stem, suffix if suffix.islower() else suffix.lower()


@lru_cache(maxsize=1024)
def _is_image(suffix: str) -> bool:
    return "." + suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES
