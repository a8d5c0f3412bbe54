"""WebDataset: a tar whose neighbouring members of one key make up a sample.

Two samples of one key stay two samples: identity is (shard, row). Nothing is ever extracted to disk. Rows count the
samples that are there: a download that failed for img2dataset left nothing in the tar, and has no row; a sample without
an image has one, and counts as empty.

WebDataset ends a key at the first dot of the file's name. Where that would make one sample of several images, as of
`Screenshot 10.27.00.png` and `Screenshot 10.27.01.png`, the archive's names are looked at as a whole, and keys may end
at the last dot (`_dots_in_keys`). What has no image's name, and no name of what goes with images, is an image if it
begins as one. What is no sample, nor goes with one, is told by `left_out`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np

from pipeline.classes import ClassNames
from pipeline.data.readers.shard import NO_LABEL, LeftOut, Sample, Shard, between
from pipeline.data.readers.suffixes import HEAD, IMAGE_SUFFIXES, NO_IMAGE, OTHER_SUFFIXES, starts_an_image
from pipeline.data.readers.tar import open_tar
from pipeline.errors import DataError
from pipeline.storage.files import Location, fingerprint, quick_fingerprint

LABEL = "cls"
VERSION = 2
"""Of what is a sample: rows of a tar that was scored under another are not its rows now."""
VIEW_SHARE = 0.5  # of the samples of an archive have a view that is no image of its own, `x.seg.png` beside `x.png`


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    member: str
    """Name in the archive of its image; the key, until there is one."""
    names: set[str] = field(default_factory=set)
    """Suffixes so far: one that comes again begins another sample."""
    image: bytes | None = None
    """The first one's bytes."""
    views: list[str] = field(default_factory=list)
    """Suffixes of further images."""
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
        return sum(1 for _ in self._groups(images=False))

    def fingerprint(self) -> str:
        try:
            return fingerprint([quick_fingerprint(self.path), VERSION])
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: there is no such file") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error})") from error

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        return between(self._samples(), start, stop)

    def labels(self) -> np.ndarray:
        groups = self._groups(images=False)
        return np.array([self._label(row, group) for row, group in enumerate(groups)], dtype=np.int64)

    def left_out(self) -> list[LeftOut]:
        left_out: list[LeftOut] = []
        for group in self._groups(images=False, left_out=left_out):
            left_out += [
                LeftOut(f"{group.key}.{suffix}", "another_view", f"the image of sample {group.key} is another one")
                for suffix in group.views
            ]
        return left_out

    def image_names(self) -> Iterator[tuple[str, bool, bool]]:
        """Of each sample: the name of its image in the archive (its key, if it has none), whether it has a `.cls`, and
        whether it has no image."""
        for group in self._groups(images=False):
            yield group.member, group.label is not None, group.image is None

    def members(self) -> Iterator[tuple[str, bytes, str | None]]:
        """Name, bytes and `.cls` of each sample's image; samples without an image are passed over."""
        for group in self._groups(images=True):
            if group.image is not None:
                yield group.member, group.image, group.label

    def identities(self) -> Iterator[tuple[int, str]]:
        return ((row, group.key) for row, group in enumerate(self._groups(images=False)))

    def _samples(self) -> Iterator[Sample]:
        for row, group in enumerate(self._groups(images=True)):
            yield Sample(row, group.key, group.image or b"", self._label(row, group))

    def _label(self, row: int, group: _Group) -> int:
        if self.names is None or group.label is None:
            return NO_LABEL
        label = self._classes.label(group.label)
        if label is None:
            raise DataError(
                f"{self.path}: row {row} ({group.key}) has the label {group.label[:40]!r}, "
                "which is neither a number nor a class name of the manifest"
            )
        return label

    @cached_property
    def _classes(self) -> ClassNames:
        return ClassNames(self.names or (), self.name)

    def _groups(self, images: bool, left_out: list[LeftOut] | None = None) -> Iterator[_Group]:
        """The samples, with their images' bytes or without; what belongs to none goes to `left_out`."""
        group = None
        left_out = [] if left_out is None else left_out
        with open_tar(self.path) as tar:
            while (name := tar.next()) is not None:
                if (split := _key_and_suffix(name)) is None:
                    left_out.append(LeftOut(name, "hidden", "its name begins with a dot"))
                    continue
                key, suffix = split
                if "." in suffix and self._dots_in_keys:
                    key, suffix = _at_the_last_dot(key, suffix)
                data, is_image = None, _is_image(suffix)
                if is_image is None:
                    data = tar.read()
                    is_image = starts_an_image(data[:HEAD])
                    if not is_image:
                        left_out.append(LeftOut(name, "no_image", NO_IMAGE))
                        continue
                if group is None or key != group.key or suffix in group.names:
                    if group is not None:
                        yield group
                    group = _Group(key, key)
                group.names.add(suffix)
                if suffix == LABEL:
                    group.label = tar.read().decode("utf-8", "replace").strip()
                elif is_image and group.image is None:
                    group.image = (tar.read() if data is None else data) if images else b""
                    group.member = name
                elif is_image:
                    group.views.append(suffix)
        if group is not None:
            yield group

    @cached_property
    def _dots_in_keys(self) -> bool:
        """Whether keys end at the last dot, from all names of the archive.

        With labels: if more images have one then. Without: unless every image with more than one suffix is a view, as
        `x.seg.png` beside `x.png`: a word, in many of the samples.
        """
        with open_tar(self.path) as tar:
            names = [split for name in iter(tar.next, None) if (split := _key_and_suffix(name)) is not None]
        if any(suffix.rpartition(".")[2] == LABEL for _, suffix in names):
            return _with_label([_at_the_last_dot(*split) for split in names]) > _with_label(names)
        samples = {key for key, suffix in names if "." not in suffix and _is_image(suffix)}
        views = Counter[str]()
        for key, suffix in names:
            word = suffix.rpartition(".")[0]
            if word and _is_image(suffix):
                if key not in samples or not word.isalpha():
                    return True
                views[word] += 1
        return not views or min(views.values()) < VIEW_SHARE * len(samples)


def _with_label(names: list[tuple[str, str]]) -> int:
    """Keys that have an image and a label."""
    images = {key for key, suffix in names if _is_image(suffix)}
    return len(images & {key for key, suffix in names if suffix == LABEL})


def _key_and_suffix(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` → (`a/b`, `seg.png`), as webdataset has it; None for what is hidden.

    A copy that a program numbered, `b.jpg.1`, is a sample of its own: its key is the whole name.
    """
    if name.startswith("./") or "//" in name or "/./" in name:
        name = str(PurePosixPath(name))
    folder, slash, file = name.rpartition("/")
    if file.startswith(".") or folder.startswith(".") or "/." in folder:
        return None
    stem, _, suffix = file.partition(".")
    if not suffix.islower():
        suffix = suffix.lower()
    if "." in suffix and _is_numbered(suffix):
        return name, ""
    return folder + slash + stem, suffix


def _at_the_last_dot(key: str, suffix: str) -> tuple[str, str]:
    head, dot, last = suffix.rpartition(".")
    return key + dot + head, last


@lru_cache(maxsize=1024)
def _is_image(suffix: str) -> bool | None:
    """None: the name does not say."""
    last = "." + suffix.rpartition(".")[2]
    return True if last in IMAGE_SUFFIXES else False if last in OTHER_SUFFIXES else None


def _is_numbered(suffix: str) -> bool:
    head, _, last = suffix.rpartition(".")
    return last.isdecimal() and _is_image(head) is True
