"""Folders of images: class sub-folders, or any arrangement where labels are not asked for."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.data.readers.shard import IMAGE_SUFFIXES, NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.seeds import permutation
from pipeline.storage.files import Location, fingerprint, storage_errors

FILES_PER_SHARD = 5_000


@dataclass(frozen=True)
class FolderShard(Shard):
    """A run of the image files below a folder, in the order of their paths."""

    name: str
    root: Location
    files: tuple[str, ...]
    """Relative to `root`, with forward slashes."""
    classes: tuple[str, ...]
    """Labels are places in this list, of the sub-folder of `root` that holds the file."""
    with_labels: bool = True

    def rows(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Of paths, sizes and times of change (ETags in object storage): the images are not read."""
        try:
            with storage_errors():
                listing = [[file, *_state(self.root / file)] for file in self.files]
        except OSError as error:
            raise DataError(f"{self.root} cannot be read: {error}") from error
        return fingerprint([listing, list(self.classes)])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        for row in range(*slice(start, stop).indices(len(self.files))):
            file = self.files[row]
            try:
                with storage_errors():
                    data = (self.root / file).read_bytes()
            except OSError as error:
                raise DataError(f"{self.root / file} cannot be read: {error.strerror or error}") from error
            yield Sample(row, file, data, self._label(file))

    def labels(self) -> np.ndarray:
        return np.array([self._label(file) for file in self.files], dtype=np.int64)

    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def _label(self, file: str) -> int:
        return self._numbers.get(class_folder(file), NO_LABEL) if self.with_labels else NO_LABEL

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}


def folder_shards(
    name: str, root: Location, names: tuple[str, ...] | None, shuffle: int | None = None
) -> list[FolderShard]:
    """All images below `root`, in shards of a few thousand.

    Args:
        name: what the shards are called, before their number.
        root: a folder.
        names: class names in the order of the labels; empty: the sub-folders', sorted; None: no labels.
        shuffle: seed of an order at random, so that the first and the last rows are of all classes; None is
            the order of the paths.

    Raises:
        DataError: `root` is no folder, or a sub-folder has the name of no class.
    """
    files = list_images(root)
    present = sorted({folder for file in files if (folder := class_folder(file))})
    if names and (unknown := [folder for folder in present if folder not in names]):
        raise DataError(
            f"{root}: sub-folder {unknown[0]!r} is no class of the manifest; its classes are {', '.join(names)}"
        )
    classes = names or tuple(present)
    if shuffle is not None:
        files = [files[i] for i in permutation(len(files), shuffle, "folder")]
    parts = [files[i : i + FILES_PER_SHARD] for i in range(0, len(files), FILES_PER_SHARD)]
    return [
        FolderShard(f"{name}-{i:05d}", root, tuple(part), classes, names is not None) for i, part in enumerate(parts)
    ]


def list_images(root: Location) -> list[str]:
    """Paths, relative to `root`, of the files with an image's suffix, sorted; hidden ones are left out.

    Raises:
        DataError: `root` is no folder.
    """
    try:
        with storage_errors():
            if not root.is_dir():
                raise DataError(f"{root} is not a folder")
            return sorted(file for file in _below(root) if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error}") from error


def _below(root: Location) -> Iterator[str]:
    """Paths relative to `root` of all files below it that are not hidden."""
    if not isinstance(root, Path):
        for place in root.fs.find(root.path):  # one listing
            file = place.removeprefix(root.path.rstrip("/") + "/")
            if not any(part.startswith(".") for part in file.split("/")):
                yield file
        return
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = str(os.path.relpath(folder, root))
        for file in files:
            if not file.startswith("."):
                yield PurePosixPath(relative.replace(os.sep, "/"), file).as_posix()


def _state(place: Location) -> list[object]:
    """What differs between one version of a file and the next."""
    if isinstance(place, Path):
        stat = place.stat()
        return [stat.st_size, stat.st_mtime_ns]
    info = place.fs.info(place.path)
    return [info["size"], str(info.get("ETag") or info.get("LastModified") or info.get("mtime"))]


def class_folder(file: str) -> str:
    """The first folder of a relative path; empty for a file that lies in none."""
    parts = PurePosixPath(file).parts
    return parts[0] if len(parts) > 1 else ""
