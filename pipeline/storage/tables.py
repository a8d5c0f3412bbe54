"""Parquet files of ours: one header, one writer, one reader.

The header is the schema's metadata, under names that begin with `mpl.`: `mpl.format`, `mpl.version`, and the notes of
the format, such as `mpl.fingerprint` and `mpl.class_names` (JSON). Every page has a checksum, which reading verifies.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError, RunError, UserError
from pipeline.storage.files import Location, opened, storage_errors, whole_file

PREFIX = "mpl."


@dataclass(frozen=True)
class TableFormat:
    """A kind of file.

    Attributes:
        name: of the format, in the header.
        version: that is written.
        remedy: what a person does about a file that is missing, damaged, or of a version that is not read.
        readable: versions that are read; the one that is written unless given.
        error: raised with the remedy.
        plain: columns that are not compressed, as compression would not make them smaller.
        dictionary: columns whose values recur; True: try all.
        statistics: whether the footer has the least and the greatest value of each row group.
    """

    name: str
    version: int
    remedy: str
    readable: tuple[int, ...] = ()
    error: type[UserError] = DataError
    plain: frozenset[str] = frozenset()
    dictionary: tuple[str, ...] | bool = True
    statistics: bool = True

    def require(self, path: Location, notes: Mapping[str, str]) -> None:
        """Refuse a file with the notes of another format, or of a version that is not read."""
        name, version = notes.get("format", "no file of ours"), notes.get("version", "?")
        if name != self.name or version not in map(str, self.readable or (self.version,)):
            raise self.error(
                f"{path} is {name} version {version}, expected {self.name} version {self.version}; {self.remedy}"
            )


@dataclass(frozen=True)
class Header:
    """What the footer of a file says of it: the rows in it, and the notes in its header by name."""

    rows: int
    notes: dict[str, str]

    @property
    def fingerprint(self) -> str | None:
        """Of all that the file was made from."""
        return self.notes.get("fingerprint")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in order."""
        return tuple(json.loads(self.notes["class_names"]))


class _Notes(dict[str, str]):
    """Of a file that is one of ours: what is not there has been damaged."""

    def __missing__(self, name: str) -> str:
        raise ValueError(f"its header has no {PREFIX}{name}")


class TableReader:
    """A file of ours, opened for reading. See `open_table`."""

    def __init__(self, path: Location, kind: TableFormat, file: pq.ParquetFile):
        self.path, self.kind, self.file = path, kind, file
        self.header = Header(rows=file.metadata.num_rows, notes=_Notes(_notes(file)))

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of the file in order, at most `rows` at a time.

        Raises:
            UserError: the file is damaged (the format's `error`), or cannot be reached (RunError).
        """
        with self._damage():
            yield from self.file.iter_batches(batch_size=rows, columns=list(columns))

    def take(self, places: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """The rows at these places of the file (n,), increasing; row groups without any are not read."""
        tables, begin = [self.file.schema_arrow.empty_table().select(list(columns))], 0
        for group in range(self.file.num_row_groups):
            size = self.file.metadata.row_group(group).num_rows
            first, last = np.searchsorted(places, [begin, begin + size])
            if first < last:
                with self._damage():
                    table = self.file.read_row_group(group, columns=list(columns))
                tables.append(table.take(pa.array(places[first:last] - begin)))
            begin += size
        return pa.concat_tables(tables)

    def read(self) -> pa.Table:
        """The whole file."""
        with self._damage():
            return self.file.read()

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            with storage_errors():
                yield
        except (OSError, pa.ArrowException) as error:
            require_absence(self.path, error)
            raise self.kind.error(f"{self.path} is damaged ({error}); {self.kind.remedy}") from error


@contextmanager
def open_table(path: Location, kind: TableFormat) -> Iterator[TableReader]:
    """Open a file of this format.

    Raises:
        UserError: the format's `error`: the file is missing, cut short, of another format or version.
        RunError: it cannot be reached.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_parquet(path, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            require_absence(path, error)
            what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged, or no Parquet file ({error})"
            raise kind.error(f"{path} {what}; {kind.remedy}") from error
        reader = TableReader(path, kind, file)
        kind.require(path, reader.header.notes)
        try:
            yield reader
        except UserError:
            raise
        except (ValueError, RecursionError) as error:  # of what was read
            raise kind.error(f"{path} is damaged ({error}); {kind.remedy}") from error


def read_header(path: Location, kind: TableFormat) -> Header:
    """The header of a file; raises what `open_table` raises."""
    with open_table(path, kind) as table:
        if "class_names" in table.header.notes:
            table.header.class_names  # noqa: B018  (raises while the file can be named)
        return table.header


def format_of(path: Location) -> str | None:
    """Which format of ours a Parquet file has; None if none, or if it is damaged or not there."""
    try:
        with open_parquet(path) as file:
            return _notes(file).get("format")
    except (OSError, pa.ArrowException):
        return None


def _notes(file: pq.ParquetFile) -> dict[str, str]:
    """What the footer has under names of ours."""
    return {
        name.decode("utf-8", "replace").removeprefix(PREFIX): text.decode("utf-8", "replace")
        for name, text in (file.metadata.metadata or {}).items()
        if name.startswith(PREFIX.encode())
    }


def header_if_whole(path: Location, kind: TableFormat) -> Header | None:
    """The header of a whole file of this format in a version that is read, or None.

    Raises:
        RunError: its place cannot be reached, so that nobody knows.
    """
    try:
        return read_header(path, kind)
    except kind.error:
        return None


def table_writer(path: Path, kind: TableFormat, schema: pa.Schema, notes: Mapping[str, object]) -> pq.ParquetWriter:
    """Begin a file of ours with columns of `schema`; a context manager, whose `write_table` appends.

    Args:
        path: on disk, from `whole_file`.
        kind: of file.
        schema: of the tables that follow.
        notes: for the header; sequences become JSON, everything else text.
    """
    header = {"format": kind.name, "version": kind.version, **notes}
    texts = {
        PREFIX + name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple) else str(value)
        for name, value in header.items()
    }
    codecs = {name: "none" if name in kind.plain else "zstd" for name in schema.names}
    return pq.ParquetWriter(
        path,
        schema.with_metadata(texts),
        compression=codecs,
        compression_level={name: 1 for name, codec in codecs.items() if codec == "zstd"},
        use_dictionary=kind.dictionary if isinstance(kind.dictionary, bool) else list(kind.dictionary),
        write_statistics=kind.statistics,
        write_page_checksum=True,
    )


def write_table(
    path: Location, kind: TableFormat, table: pa.Table, notes: Mapping[str, object], *, group: int | None = None
) -> None:
    """Write a file of ours, whole or not at all, in row groups of `group` rows.

    Raises:
        RunError: it cannot be written.
    """
    with whole_file(path) as temporary, table_writer(temporary, kind, table.schema, notes) as writer:
        writer.write_table(table, row_group_size=group)


def require_absence(place: Location, error: Exception) -> None:
    """Pass where the error of a reader means that there is no file, or none that is whole.

    Raises:
        RunError: it means that nobody knows: the place cannot be reached just now, or may not be read.
    """
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | pa.ArrowException)
    parsed = type(error) is OSError and error.errno is None  # Arrow's, of bytes that it was given
    if not absent and not parsed:
        raise RunError(f"{place} cannot be reached ({error}); run the same command again") from error


@contextmanager
def open_parquet(place: Location, **options: Any) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file on disk or in object storage; `options` of `pyarrow.parquet.ParquetFile`.

    Raises:
        OSError: it is not there, or cannot be read; also inside the `with`.
        pa.ArrowInvalid: it is cut short, or no Parquet file.
    """
    try:
        if isinstance(place, Path):
            with pq.ParquetFile(place, **options) as file:
                yield file
        else:
            with opened(place, random=True) as stream, pq.ParquetFile(stream, pre_buffer=True, **options) as file:
                yield file
    except UnicodeDecodeError as error:  # of a damaged schema
        raise pa.ArrowInvalid(str(error)) from error


def fixed_binary(values: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> pa.Array:
    """(n, C) numbers as n fixed-size binary values; rows that are not valid, (n,), become null."""
    width = values.shape[1] * values.dtype.itemsize
    data = np.ascontiguousarray(values if valid is None else np.where(valid[:, None], values, 0), values.dtype)
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little").tobytes())
    return pa.Array.from_buffers(pa.binary(width), len(values), [bits, pa.py_buffer(data)])


def fixed_numbers(array: pa.Array, dtype: str) -> NDArray[Any]:
    """Fixed-size binary values as read-only numbers (n, C) of little-endian `dtype`; nulls are arbitrary."""
    columns = array.type.byte_width // np.dtype(dtype).itemsize
    if len(array) == 0:
        return np.empty((0, columns), dtype)
    flat = np.frombuffer(array.buffers()[1], dtype)
    return flat[array.offset * columns : (array.offset + len(array)) * columns].reshape(-1, columns)
