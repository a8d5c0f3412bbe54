"""Archives of a person's images, read as folders are: tars, plain or compressed, WebDataset's among them, and zips."""

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from zlib import error as zlib_error

from pipeline.data.readers.shard import LeftOut
from pipeline.data.readers.suffixes import HEAD, IMAGE_SUFFIXES, NO_IMAGE, OTHER_SUFFIXES, starts_an_image
from pipeline.data.readers.tar import MEMBER_LIMIT
from pipeline.data.readers.webdataset import TarShard
from pipeline.errors import DataError

ARCHIVE_SUFFIXES = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")


class Member(NamedTuple):
    """An image in an archive."""

    name: str
    data: bytes
    label: str | None
    """The text of a WebDataset's `.cls`."""


def is_archive(path: str | Path) -> bool:
    """By its name."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def list_members(path: Path) -> tuple[list[str], bool, list[LeftOut]]:
    """The names of an archive's images; whether `.cls` gives labels; and what is no image.

    Raises:
        DataError: it cannot be read to its end, or holds what is refused.
    """
    if path.suffix.lower() == ".zip":
        images, left_out = _zip_names(path)
        return images, False, left_out
    samples = list(TarShard(path.name, path).image_names())
    empty = [LeftOut(name, "empty", "a sample without an image") for name, _, is_empty in samples if is_empty]
    images = [name for name, _, is_empty in samples if not is_empty]
    return images, any(has_label for _, has_label, _ in samples), empty + TarShard(path.name, path).left_out()


def read_members(path: Path) -> Iterator[Member]:
    """The images of an archive, streamed, in the order of `list_members`.

    Raises:
        DataError: as `list_members`.
    """
    if path.suffix.lower() == ".zip":
        yield from _zip_members(path)
        return
    for name, data, label in TarShard(path.name, path).members():
        yield Member(name, data, label)


def _zip_names(path: Path) -> tuple[list[str], list[LeftOut]]:
    images, left_out = [], []
    with _open_zip(path) as file:
        for info in file.infolist():
            parts = PurePosixPath(info.filename).parts
            if info.is_dir():
                continue
            if info.filename.startswith("/") or ".." in parts:
                raise DataError(f"{path}: {info.filename} points outside the archive; pack it with relative paths")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(f"{path}: {info.filename} is a link; pack the files themselves")
            if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                left_out.append(LeftOut(info.filename, "hidden", "its name or that of its folder begins with a dot"))
            elif _is_image(file, info):
                images.append(info.filename)
            else:
                left_out.append(LeftOut(info.filename, "no_image", NO_IMAGE))
    return images, left_out


def _is_image(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    suffix = PurePosixPath(info.filename).suffix.lower()
    if suffix in IMAGE_SUFFIXES or suffix in OTHER_SUFFIXES:
        return suffix in IMAGE_SUFFIXES
    with file.open(info) as member:
        return starts_an_image(member.read(HEAD))


def _zip_members(path: Path) -> Iterator[Member]:
    images = set(_zip_names(path)[0])
    with _open_zip(path) as file:
        for info in file.infolist():
            if info.filename not in images:
                continue
            if info.file_size > MEMBER_LIMIT:
                raise DataError(
                    f"{path}: {info.filename} has {info.file_size:,} bytes when unpacked, and {MEMBER_LIMIT:,} are the "
                    "limit for one member; this is no image. Take it out of the archive"
                )
            with file.open(info) as member:
                yield Member(info.filename, member.read(MEMBER_LIMIT), None)


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (OSError, EOFError, zlib_error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        # Cut short, damaged, compressed in a way that Python does not know, or encrypted.
        raise DataError(f"{path} cannot be read as a zip ({error}); unpack it, and import the folder") from error
