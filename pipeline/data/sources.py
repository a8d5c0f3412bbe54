"""Splits: the rows of a manifest's files, opened as streams of samples."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from pipeline.classes import ClassNames
from pipeline.data.manifest import FileSpec, Manifest, SplitName, SplitSpec
from pipeline.data.readers.digits import digits_shards
from pipeline.data.readers.folder import folder_shards
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.readers.raw import raw_shards
from pipeline.data.readers.shard import NO_LABEL, LeftOut, Renumbered, Sample, Shard, Window
from pipeline.data.readers.svhn import svhn_shards
from pipeline.data.readers.webdataset import TarShard
from pipeline.errors import DataError, MissingDataError
from pipeline.storage.files import Location, fingerprint, storage_errors

REQUESTS = 16  # shards at a time whose fingerprints are asked for: in object storage each is a request
OPEN_END = 1 << 62  # the last row of a split whose rows were not counted

__all__ = ["NO_LABEL", "Sample", "Shard", "Split", "Window", "class_names", "open_split"]


@dataclass(frozen=True)
class Split:
    """A split: its shards, in order, cut to the manifest's rows. Labels of a pool are not read."""

    name: str
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...]
    labelled: bool

    def count(self) -> int:
        """Samples, those that will not decode included."""
        return sum(shard.rows() for shard in self.shards)

    def read(self) -> Iterator[tuple[str, Sample]]:
        """Stream (shard name, sample).

        Raises:
            DataError: a label is missing or out of range, or a shard is cut short or malformed.
        """
        for shard in self.shards:
            for sample in shard.read():
                if self.labelled:
                    self._check_label(shard.name, sample.row, sample.label)
                yield shard.name, sample

    def labels(self) -> np.ndarray:
        """Labels in the order of `read()`, int64 (count,), all checked; -1 throughout for a pool."""
        arrays = [shard.labels() for shard in self.shards]
        if self.labelled:
            for shard, labels in zip(self.shards, arrays, strict=True):
                invalid = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
                if len(invalid):
                    first = shard.start if isinstance(shard, Window) else 0
                    self._check_label(shard.name, first + int(invalid[0]), int(labels[invalid[0]]))
        return np.concatenate(arrays)

    def left_out(self) -> list[tuple[str, LeftOut]]:
        """(shard name, what lies beside its samples and is none), looked for now."""
        return [(shard.name, entry) for shard in self.shards for entry in shard.left_out()]

    def fingerprint(self) -> str:
        """Changes with the rows, the order or the classes of the split."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            marks = list(pool.map(lambda shard: shard.fingerprint(), self.shards))
        shards = [[shard.name, mark] for shard, mark in zip(self.shards, marks, strict=True)]
        return fingerprint([shards, list(self.class_names), self.labelled])

    def _check_label(self, shard: str, row: int, label: int) -> None:
        if 0 <= label < len(self.class_names):
            return
        present = "no label" if label == NO_LABEL else f"label {label}"
        raise DataError(
            f"{self.name} split, {shard}: row {row} has {present}; labels run from 0 to "
            f"{len(self.class_names) - 1} ({len(self.class_names)} classes in the manifest)"
        )


def open_split(
    manifest: Manifest, split: SplitName, data: Location | None = None, *, first: int | None = None
) -> Split:
    """Open a split of a data set.

    Args:
        manifest: from `load_manifest`.
        split: labelled, validation, unlabelled or test.
        data: the data folder; without it, the folder in which the manifest's own file lies.
        first: keep only so many rows of the split, the first ones (fewer labels).

    Raises:
        DataError: the manifest has no such split; a file is missing, broken or of another length than
            the manifest states; class names disagree; the split is empty or has fewer than `first` rows.
    """
    if split not in manifest.splits:
        raise DataError(f"data set {manifest.name} has no {split} split; it has {', '.join(manifest.splits)}")
    spec = manifest.splits[split]
    labelled = split != "unlabelled"
    names = class_names(manifest, data)
    cut = [shard for run in spec.runs for shard in _run(manifest, split, run, data, names if labelled else None)]
    if repeated := [name for name, count in Counter(shard.name for shard in cut).items() if count > 1]:
        raise DataError(
            f"the {split} split of {manifest.name} has two files named {repeated[0]!r}, and a row is known by its "
            "file's name; rename one"
        )
    opened = Split(split, tuple(cut), names, labelled)
    if first is None:
        return opened
    if (count := opened.count()) < first:
        raise DataError(f"the {split} split of {manifest.name} has {count} rows; {first} were asked for")
    return replace(opened, shards=tuple(_cut(cut, range(first))))


def class_names(manifest: Manifest, data: Location | None = None) -> tuple[str, ...]:
    """The manifest's class names, else those that the labelled files state, else the numbers.

    Raises:
        DataError: the files state another number of classes than the manifest.
    """
    if manifest.class_names:
        return manifest.class_names
    if "labelled" in manifest.splits:
        for shard in _shards(manifest, manifest.splits["labelled"].source, data, ()):
            if names := shard.class_names():
                if len(names) != manifest.classes:
                    raise DataError(
                        f"{manifest.name}: {shard.name} has {len(names)} classes, the manifest "
                        f"says {manifest.classes}; correct `classes` or name them in `class_names`"
                    )
                return names
    return tuple(str(label) for label in range(manifest.classes))


def _run(
    manifest: Manifest, split: str, spec: SplitSpec, data: Location | None, names: tuple[str, ...] | None
) -> list[Shard]:
    """The shards of one run of rows, not empty; `names` None leaves labels unread."""
    shards = _shards(manifest, spec.source, data, names)
    if names is not None:
        shards = _by_name(ClassNames(names, manifest.name), shards)
    total = _total(manifest, spec, shards)
    cut = list(_cut(shards, spec.rows(OPEN_END if total is None else total)))
    if not any(not shard.knows_its_rows or shard.rows() for shard in cut):
        raise DataError(
            f"the {split} split of {manifest.name} is empty: splits.{split} leaves no row of "
            f"files.{spec.source}{'' if total is None else f', which has {total}'}"
        )
    return cut


def _by_name(names: ClassNames, shards: list[Shard]) -> list[Shard]:
    """The shards with labels numbered as the data set numbers its classes, whatever order each file has them in.

    Raises:
        DataError: a file states other classes, or its numbers can be read in two ways.
    """
    numbered = []
    for shard in shards:
        if stated := shard.class_names():
            places = names.places(stated, shard.name)
            numbered.append(shard if places == tuple(range(len(names.names))) else Renumbered(shard, places))
            continue
        if shard.has_bare_numbers():
            names.require_one_reading(shard.name)
        numbered.append(shard)
    return numbered


def _total(manifest: Manifest, spec: SplitSpec, shards: list[Shard]) -> int | None:
    """Rows in all shards if that is stated or needed; counting those of many large tars takes long."""
    stated = manifest.files[spec.source].rows
    if stated is None and not spec.counts_from_the_end:
        return None
    total = sum(shard.rows() for shard in shards)
    if stated is not None and total != stated:
        raise DataError(
            f"files.{spec.source} of {manifest.name} has {total:,} rows, the manifest says {stated:,}: "
            "a file is missing, cut short or of another version"
        )
    return total


def _cut(shards: list[Shard], rows: range) -> Iterator[Shard]:
    """The shards that hold `rows`; the first and the last are cut where the rows begin and end."""
    before = 0
    for shard in shards:
        if before >= rows.stop:
            return
        if rows.start <= before and rows.stop == OPEN_END:
            yield shard  # whole, and its rows need not be counted
            continue
        count = shard.rows()
        start, stop = max(rows.start - before, 0), min(rows.stop - before, count)
        if start < stop:
            yield shard if (start, stop) == (0, count) else Window(shard, start, stop)
        before += count


def _shards(manifest: Manifest, source: str, data: Location | None, names: tuple[str, ...] | None) -> list[Shard]:
    """All shards of one entry of `files`; `names` None leaves labels unread."""
    spec = manifest.files[source]
    if spec.reader == "digits":
        return list(digits_shards(spec.path or "", names is not None))
    paths = find_files(manifest, spec, data)
    named = list(zip(_shard_names(paths), paths, strict=True))
    match spec.reader:
        case "parquet":
            label = None if names is None else spec.label
            return [ParquetShard(name, path, spec.image, label, names or ()) for name, path in named]
        case "folder":
            return [shard for name, path in named for shard in folder_shards(name, path, names, spec.shuffle)]
        case "webdataset":
            return [TarShard(name, path, names) for name, path in named]
        case "cifar-binary" | "tinyimages-bin":
            return [s for name, path in named for s in raw_shards(name, path, spec.reader, names is not None)]
        case "svhn-mat":
            return [shard for name, path in named for shard in svhn_shards(name, path, names is not None)]


def find_files(manifest: Manifest, spec: FileSpec, data: Location | None) -> list[Location]:
    """The files of an entry of `files`, in order; none for the embedded digits.

    Raises:
        DataError: there is no data folder, no such file in it, or not the stated number of bytes; or object
            storage does not answer.
    """
    if spec.reader == "digits":
        return []
    folder = data or manifest.folder
    place = spec.path or spec.glob or ""
    if folder is None:
        raise MissingDataError(
            f"data set {manifest.name} needs {place} in a data folder, and none was given: "
            "use --data DIR or set MPL_DATA"
        )
    try:
        with storage_errors():
            paths, size = _look(folder, spec)
    except OSError as error:
        raise DataError(f"{folder / place} cannot be looked up: {error}") from error
    if not paths:
        raise MissingDataError(
            f"data set {manifest.name} needs {place}, and there is nothing of that name in {folder}; "
            "is --data (or MPL_DATA) the right folder?" + _how_to_get(manifest, spec)
        )
    if spec.bytes is not None and size != spec.bytes:
        raise DataError(
            f"{folder / place} has {size:,} bytes, the manifest of {manifest.name} says {spec.bytes:,}: "
            "it was cut short or is another version; get it again"
        )
    return paths


def _look(folder: Location, spec: FileSpec) -> tuple[list[Location], int]:
    """The files of an entry in the order of their paths, and their bytes if those are stated."""
    if spec.path is not None:
        paths: list[Location] = [folder / spec.path] if (folder / spec.path).exists() else []
    else:
        paths = sorted(folder.glob(spec.glob or ""), key=str)
    return paths, sum(path.stat().st_size for path in paths) if spec.bytes is not None else 0


def _how_to_get(manifest: Manifest, spec: FileSpec) -> str:
    if spec.url or spec.archive:
        return f" `mpl data fetch {manifest.name}` downloads it"
    return f" {spec.obtain}" if spec.obtain else ""


def _shard_names(paths: list[Location]) -> list[str]:
    """The files' names without suffixes; with their folders where two files have one name."""
    stems = [path.name.split(".", 1)[0] for path in paths]
    if max(Counter(stems).values()) == 1:
        return stems
    folders = zip(*(path.parts[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, folders))
    return ["--".join(path.parts[shared:]) for path in paths]
