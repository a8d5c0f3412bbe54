"""WebDataset: a tar whose neighbouring members of one key make up a sample.

Two samples of one key stay two samples: identity is (shard, row). Nothing is ever extracted to disk.
"""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from pipeline.data.folder import SUFFIXES
from pipeline.data.shards import NO_LABEL, Sample, Shard, between
from pipeline.errors import DataError
from pipeline.files import quick_fingerprint

LABEL = "cls"


class _TarInfo(tarfile.TarInfo):
    """The standard one takes a cut or overwritten header for the end of the archive; this one does not."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_TarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros that end every archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no further header: {error}") from error


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    names: set[str] = field(default_factory=set)
    """Suffixes so far: one that comes again begins another sample."""
    images: list[tuple[str, bytes]] = field(default_factory=list)
    """Suffix and bytes; a sample's image is the first."""
    label: str | None = None


@dataclass(frozen=True)
class TarShard(Shard):
    """One tar, plain or compressed, read from front to back."""

    name: str
    path: Path
    names: tuple[str, ...] | None = None
    """Class names, for labels that are not numbers; None: labels are not read (a pool's)."""

    def rows(self) -> int:
        return sum(1 for _ in self._groups(with_images=False))

    def fingerprint(self) -> str:
        with self._open():  # a clear error for a missing file
            return quick_fingerprint(self.path)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        return between(self._samples(), start, stop)

    def labels(self) -> np.ndarray:
        groups = self._groups(with_images=False)
        return np.array([self._label(row, group) for row, group in enumerate(groups)], dtype=np.int64)

    def _samples(self) -> Iterator[Sample]:
        for row, group in enumerate(self._groups(with_images=True)):
            data = group.images[0][1] if group.images else b""
            yield Sample(row, group.key, data, self._label(row, group))

    def images(self) -> Iterator[tuple[str, bytes, str | None]]:
        """Key, bytes and `.cls` text of every image: a sample without `.cls` may have several."""
        for group in self._groups(with_images=True):
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

    def _groups(self, with_images: bool) -> Iterator[_Group]:
        group = None
        with self._open() as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else the list of all members seen stays in memory
                if not member.isdir() and (split := _key_and_suffix(self._checked(member).name)):
                    key, suffix = split
                    if group is None or key != group.key or suffix in group.names:
                        if group is not None:
                            yield group
                        group = _Group(key)
                    _add(group, suffix, tar, member, with_images)
        if group is not None:
            yield group

    def _checked(self, member: tarfile.TarInfo) -> tarfile.TarInfo:
        """Refuse what only an attack or a mistake puts into a shard of images."""
        path = PurePosixPath(member.name)
        if not member.isfile():
            raise DataError(f"{self.path}: {member.name} is a link or a device; a shard holds plain files only")
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{self.path}: {member.name} points outside the archive; pack it with relative paths")
        return member

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with _open_tar(self.path) as tar:
                yield tar
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: there is no such file") from error
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self.path} cannot be read to its end ({error}): it is no tar, or was cut short; get it again"
            ) from error


def _open_tar(path: Path) -> tarfile.TarFile:
    """Plain archives so that members can be passed over, compressed ones as a stream."""
    with path.open("rb") as file:
        plain = _is_plain(file)
    return tarfile.open(path, "r:" if plain else "r|*", tarinfo=_TarInfo)


def _is_plain(file: IO[bytes]) -> bool:
    return file.read(512)[257:262] == b"ustar"


def _key_and_suffix(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` → (`a/b`, `seg.png`), as webdataset has it; None for what belongs to no sample."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    if not dot or not stem:
        return None
    return str(path.with_name(stem)), suffix.lower()


def _add(group: _Group, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, with_images: bool) -> None:
    group.names.add(suffix)
    is_image = "." + suffix.rsplit(".", 1)[-1] in SUFFIXES
    if suffix == LABEL or (is_image and with_images):
        file = tar.extractfile(member)
        assert file is not None  # a plain file
        data = file.read()
        if suffix == LABEL:
            group.label = data.decode("utf-8", "replace").strip()
        else:
            group.images.append((suffix, data))
