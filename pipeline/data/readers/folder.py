"""Folders of images: class sub-folders, or any arrangement where labels are not asked for."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.classes import canonical, in_order, require_distinct
from pipeline.data.decode import MAX_BYTES
from pipeline.data.readers.shard import NO_LABEL, LeftOut, Sample, Shard
from pipeline.data.readers.suffixes import HEAD, IMAGE_SUFFIXES, NO_IMAGE, OTHER_SUFFIXES, starts_an_image
from pipeline.errors import DataError
from pipeline.seeds import permutation
from pipeline.storage.files import Location, fingerprint, opened, read_at_most, storage_errors

FILES_PER_SHARD = 5_000
HIDDEN = "its name or that of its folder begins with a dot"


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
    first: bool = True
    """Whether it is the folder's first: it tells what lies there and is no image."""

    def rows(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Of paths, sizes and times of change (ETags in object storage): the images are not read."""
        try:
            with storage_errors():
                listing = [[shown(file), *_state(self.root / file)] for file in self.files]
        except OSError as error:
            raise DataError(f"{self.root} cannot be read: {error}") from error
        return fingerprint([listing, list(self.classes)])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        for row in range(*slice(start, stop).indices(len(self.files))):
            file = self.files[row]
            try:
                data = read_at_most(self.root / file, MAX_BYTES + 1)
            except OSError as error:
                raise DataError(f"{self.root / file} cannot be read: {error.strerror or error}") from error
            yield Sample(row, shown(file), data, self._label(file))

    def identities(self) -> Iterator[tuple[int, str]]:
        return ((row, shown(file)) for row, file in enumerate(self.files))

    def labels(self) -> np.ndarray:
        return np.array([self._label(file) for file in self.files], dtype=np.int64)

    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def left_out(self) -> list[LeftOut]:
        return list_files(self.root)[1] if self.first else []

    def _label(self, file: str) -> int:
        return self._numbers.get(canonical(class_folder(file)), NO_LABEL) if self.with_labels else NO_LABEL

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {canonical(name): label for label, name in enumerate(self.classes)}


def folder_shards(
    name: str, root: Location, names: tuple[str, ...] | None, shuffle: int | None = None
) -> list[FolderShard]:
    """All images below `root`, in shards of a few thousand.

    Args:
        name: what the shards are called, before their number.
        root: a folder.
        names: class names in the order of the labels; empty: the sub-folders' (`in_order`); None: no labels.
        shuffle: seed of an order at random, so that the first and the last rows are of all classes; None is
            the order of the paths.

    Raises:
        DataError: `root` is no folder, a sub-folder has the name of no class, or two have one name.
    """
    files = list_images(root)
    present = in_order({folder for file in files if (folder := class_folder(file))})
    if names is not None:
        require_distinct(present, str(root))
    known = {canonical(name) for name in names or ()}
    if names and (unknown := [folder for folder in present if canonical(folder) not in known]):
        raise DataError(
            f"{root}: sub-folder {unknown[0]!r} is no class of the manifest; its classes are {', '.join(names)}"
        )
    classes = names or tuple(present)
    if shuffle is not None:
        files = [files[i] for i in permutation(len(files), shuffle, "folder")]
    parts = [files[i : i + FILES_PER_SHARD] for i in range(0, len(files), FILES_PER_SHARD)]
    return [
        FolderShard(f"{name}-{i:05d}", root, tuple(part), classes, names is not None, first=i == 0)
        for i, part in enumerate(parts)
    ]


def list_images(root: Location) -> list[str]:
    """Paths, relative to `root`, of the images below it, sorted.

    Raises:
        DataError: `root` is no folder, or cannot be listed.
    """
    return list_files(root)[0]


def list_files(root: Location) -> tuple[list[str], list[LeftOut]]:
    """The images below a folder, as paths relative to it, sorted; and all other files, with the reason.

    An image is what has an image's name; of other names, what begins as an image does. Links are followed, but not
    round in a circle.

    Raises:
        DataError: `root` is no folder, or it or a folder below cannot be listed.
    """
    images: list[str] = []
    left_out: list[LeftOut] = []
    try:
        with storage_errors():
            if not root.is_dir():
                raise DataError(f"{root} is not a folder")
            for file in _below_local(root, left_out) if isinstance(root, Path) else _below_remote(root, left_out):
                suffix = PurePosixPath(file).suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    images.append(file)
                elif suffix in OTHER_SUFFIXES or not starts_an_image(_head(root / file)):
                    left_out.append(LeftOut(file, "no_image", NO_IMAGE))
                else:
                    images.append(file)
    except OSError as error:
        raise DataError(f"{root} cannot be listed: {error}") from error
    return sorted(images), sorted(left_out)


def _head(place: Location) -> bytes:
    with opened(place) as file:
        return file.read(HEAD)


def _below_remote(root: Location, left_out: list[LeftOut]) -> Iterator[str]:
    for place in root.fs.find(root.path):  # type: ignore[union-attr]  # one listing
        file = place.removeprefix(root.path.rstrip("/") + "/")  # type: ignore[union-attr]
        if any(part.startswith(".") for part in file.split("/")):
            left_out.append(LeftOut(file, "hidden", HIDDEN))
        else:
            yield file


def _below_local(root: Path, left_out: list[LeftOut]) -> Iterator[str]:
    """Plain files and links to them; what is hidden, broken or no file goes to `left_out`."""
    folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while folders:
        relative, above = folders.pop()
        with os.scandir(root / relative) as entries:
            for entry in entries:
                path = f"{relative}/{entry.name}" if relative else entry.name
                if entry.name.startswith("."):
                    left_out.append(LeftOut(path, "hidden", HIDDEN))
                elif entry.is_dir():
                    place = os.path.realpath(entry.path)
                    if place in above:
                        left_out.append(LeftOut(path, "linked_above", "is a link to a folder that holds it"))
                    else:
                        folders.append((path, (*above, place)))
                elif entry.is_file():
                    yield path
                else:
                    broken = entry.is_symlink() and not os.path.exists(entry.path)
                    reason = "is a link to nothing" if broken else "is neither a file nor a folder"
                    left_out.append(LeftOut(path, "no_file", reason))


def _state(place: Location) -> list[object]:
    """What differs between one version of a file and the next."""
    if isinstance(place, Path):
        stat = place.stat()
        return [stat.st_size, stat.st_mtime_ns]
    info = place.fs.info(place.path)
    return [info["size"], str(info.get("ETag") or info.get("LastModified") or info.get("mtime"))]


def class_folder(file: str) -> str:
    """The first folder of a relative path; empty for a file that lies in none."""
    parts = PurePosixPath(shown(file)).parts
    return parts[0] if len(parts) > 1 else ""


def shown(file: str) -> str:
    """A path for people and tables: bytes that are no UTF-8 as \\xff."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")
