"""What a person has, in whatever form, as a stream of images with their classes and splits.

A folder or an archive of images, with folders for classes, or for splits and in them for classes; a folder of
archives; a WebDataset; a table of files and labels, alone or as `metadata.csv` in a folder; tables that hold the
images. What is none of the images is listed with its reason.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from pipeline.data.decode import MAX_BYTES
from pipeline.data.get.accepted import Entry
from pipeline.data.get.archives import is_archive, list_members, read_members
from pipeline.data.get.image_tables import SUFFIXES, holds_images, is_cache, read_rows, split_of
from pipeline.data.get.layout import SPLIT_WORDS, Layout, Place, layout_of
from pipeline.data.get.tables import TABLE_SUFFIXES, Listed, read_table
from pipeline.data.manifest import SplitName
from pipeline.data.readers.folder import list_files, shown
from pipeline.data.readers.shard import LeftOut
from pipeline.errors import DataError
from pipeline.storage.files import read_at_most

POOL = Place("unlabelled", "")


@dataclass(frozen=True)
class Source:
    """Something to import.

    Attributes:
        path: a folder, an archive, a table or one image.
        split: of all that is in it; None: as it says itself.
        columns: of a table: which is the `file`, the `label`, the `split`, where a person said so.
        images: where a table's files lie; None: beside it.
        class_level: which level of folders is the classes', 1 for the topmost, where a person said so.
    """

    path: Path
    split: SplitName | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None
    class_level: int | None = None

    def find(self, left_out: list[LeftOut]) -> Iterator[Entry]:
        """Stream the images; what is none goes to `left_out`.

        Raises:
            DataError: it is not there, cannot be read, or it is not clear what is meant.
        """
        for key, place, data in self._all(left_out):
            yield Entry(key, _class_name(self._placed(place)), data, self._placed(place).split)

    def _placed(self, place: Place) -> Place:
        if self.split == "unlabelled":
            return POOL
        return place if self.split is None or place == POOL else Place(self.split, place.class_name)

    def _all(self, left_out: list[LeftOut]) -> Iterator[tuple[str, Place, bytes]]:
        path = self.path
        if path.is_dir():
            yield from self._in_folder(left_out)
        elif not path.is_file():
            raise DataError(f"{path}: there is no such file or folder")
        elif is_archive(path):
            yield from self._in_archives([(path, "")], left_out, str(path), only=True)
        elif path.suffix.lower() in SUFFIXES and holds_images(path):
            yield from self._in_image_tables([path], path.parent)
        elif path.suffix.lower() in TABLE_SUFFIXES:
            yield from self._in_table(path, self.images or path.parent, left_out)
        else:
            yield shown(path.name), Place(None, ""), read_at_most(path, MAX_BYTES + 1)

    def _in_folder(self, left_out: list[LeftOut]) -> Iterator[tuple[str, Place, bytes]]:
        root = self.path
        images, others = list_files(root)
        files = [root / entry.key for entry in others if entry.reason == "no_image"]
        tables = [path for path in files if path.suffix in SUFFIXES and not is_cache(path) and holds_images(path)]
        archives = [path for path in files if is_archive(path)]
        labelled = [path for path in files if path.stem == "metadata" and path.suffix.lower() in TABLE_SUFFIXES]
        used = {path.relative_to(root).as_posix() for path in (*tables, *archives, *labelled)}
        left_out += [entry._replace(key=shown(entry.key)) for entry in others if entry.key not in used]
        yield from self._in_image_tables(tables, root)
        listed = set[str]()
        for path in labelled:
            rows, has_labels = read_table(path, self.columns, path.parent)
            if has_labels:
                folder = path.parent.relative_to(root)
                listed.update((folder / row.file).as_posix() for row in rows)
                split = SPLIT_WORDS.get(folder.parts[0].lower()) if folder.parts else None
                yield from _listed(rows, path.parent, split, root, left_out)
        rest = [file for file in images if file not in listed]
        layout = self._layout(rest, str(root))
        for file in rest:
            yield shown(file), layout.place(file), read_at_most(root / file, MAX_BYTES + 1)
        if archives:
            within = [(path, path.parent.relative_to(root).as_posix()) for path in sorted(archives)]
            yield from self._in_archives(within, left_out, str(root), only=not images)

    def _in_image_tables(self, paths: Iterable[Path], root: Path) -> Iterator[tuple[str, Place, bytes]]:
        for path in sorted(paths):
            split = split_of(path, root) if path != self.path else None
            for row in read_rows(path, self.columns, path.relative_to(root).as_posix()):
                yield row.key, _of_label(row.class_name, split), row.data

    def _in_table(self, path: Path, root: Path, left_out: list[LeftOut]) -> Iterator[tuple[str, Place, bytes]]:
        rows, has_labels = read_table(path, self.columns, root)
        images, _ = list_files(root)
        rows = _as_they_are_called(rows, images, root)
        if not has_labels and self.split != "unlabelled":
            raise DataError(f"{path}: no column is the label. Say which: --column label=NAME")
        if rows and not any((root / row.file).is_file() for row in rows):
            raise DataError(
                f"{path}: none of its {len(rows):,} files is in {root} (the first is {rows[0].file}). "
                "Say where they lie: --images DIR"
            )
        yield from _listed(rows, root, None, root, left_out)
        named = {PurePosixPath(row.file).as_posix() for row in rows}
        left_out += [LeftOut(shown(file), "not_in_table", f"{path.name} does not name it") for file in images
                     if file not in named]  # fmt: skip

    def _in_archives(
        self, archives: list[tuple[Path, str]], left_out: list[LeftOut], source: str, only: bool
    ) -> Iterator[tuple[str, Place, bytes]]:
        """The images of archives, each at the place that its folder in the source has and the member's name in it.

        Archives in a source are read like its folders; the layout is that of all their names together.
        """
        listings = [list_members(path) for path, _ in archives]
        names = [
            str(PurePosixPath(folder, name))
            for (_, folder), (members, _, _) in zip(archives, listings, strict=True)
            for name in members
        ]
        layout = self._layout(names, source)
        for (path, folder), (_, has_labels, others) in zip(archives, listings, strict=True):
            prefix = "" if only and len(archives) == 1 else f"{path.relative_to(source).as_posix()}/"
            left_out += [entry._replace(key=prefix + entry.key) for entry in others]
            for member in read_members(path):
                place = layout.place(str(PurePosixPath(folder, member.name)))
                if has_labels and place != POOL:
                    place = Place(place.split, member.label or "")
                yield prefix + member.name, place, member.data

    def _layout(self, paths: Iterable[str], source: str) -> Layout:
        """Of a pool nothing need be understood."""
        if self.class_level is not None:
            return Layout(self.class_level - 1)
        return Layout() if self.split == "unlabelled" else layout_of(paths, source)


def _as_they_are_called(rows: list[Listed], images: list[str], root: Path) -> list[Listed]:
    """The rows with the names that their files have: a table may leave the suffix away, or have Windows' separators."""
    stems: dict[str, str | None] = {}
    for file in images:
        stem = PurePosixPath(file).with_suffix("").as_posix()
        stems[stem] = None if stem in stems else file  # of two it is not clear which is meant

    def named(row: Listed) -> Listed:
        if (root / row.file).is_file():
            return row
        file = row.file.replace("\\", "/")
        return replace(row, file=file if (root / file).is_file() else stems.get(file) or row.file)

    return [named(row) for row in rows]


def _class_name(place: Place) -> str | None:
    return None if place.split == "unlabelled" else place.class_name


def _of_label(label: str | None, split: SplitName | None) -> Place:
    """Of an image that a table names. Without a label it is the pool's; in a split of known labels it has no class."""
    if split == "unlabelled" or (label is None and split in (None, "labelled")):
        return POOL
    return Place(split, label or "")


def _listed(
    rows: list[Listed], folder: Path, split: SplitName | None, root: Path, left_out: list[LeftOut]
) -> Iterator[tuple[str, Place, bytes]]:
    """The files that a table names, once each."""
    seen: dict[str, str | None] = {}
    for row in rows:
        path = folder / row.file
        key = shown(path.relative_to(root).as_posix() if path.is_relative_to(root) else row.file)
        if row.file in seen and seen[row.file] == row.label:
            left_out.append(LeftOut(key, "repeat_of", f"{key}: the table names it twice"))
        elif not path.is_file():
            left_out.append(LeftOut(key, "no_file", f"{path} is not there"))
        else:
            seen.setdefault(row.file, row.label)
            yield key, _of_label(row.label, row.split or split), read_at_most(path, MAX_BYTES + 1)
