"""Files of predictions, in parts that fit in memory: Parquet, CSV, JSON lines, npz, a Hugging Face dataset on disk.

Nothing is unpickled. A part is a `pyarrow.RecordBatch`; numbers are given as the file has them.
"""

import csv
import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.answers.forms import KEYS, LABELS, VOTES
from pipeline.data.manifest import require_plain_name
from pipeline.errors import DataError
from pipeline.storage.files import Location, location, names_in, opened, quick_fingerprint, read_at_most, storage_errors

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".npz")
PART_BYTES = 32 << 20  # of numbers in a part, about
STATE_BYTES = 64 << 20  # of a dataset's state.json
LINES = 4096  # JSON lines of a part
MALFORMED = (
    OSError,
    EOFError,
    pa.ArrowException,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    csv.Error,
    struct.error,
    tokenize.TokenError,  # of a header of NumPy's
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,  # recursion; an archive that is encrypted, or compressed in an unknown way
    SystemError,  # text of NumPy's that is no Unicode
)  # what a damaged or foreign file raises
TEXT = {*KEYS, *LABELS, *VOTES, "shard", "split"}
"""CSV columns that are read as text whatever they look like: `0012` is not 12, `1.0` no place, `NA` may be a class."""


@dataclass(frozen=True)
class PredictionFile:
    """One file of predictions; for a dataset on disk one of its Arrow files.

    Attributes:
        place: of the file.
        class_names: that it states, in the order of its columns; empty: it states none.
        kind: parquet, csv, jsonl, npz or arrow.
    """

    place: Location
    class_names: tuple[str, ...]
    kind: str

    def fingerprint(self) -> str:
        """Changes when the file does, wherever it lies."""
        return quick_fingerprint(self.place)

    def parts(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(number of the first row, from 0; a part), in order.

        Raises:
            DataError: it is cut short, malformed, or holds what this project does not read.
        """
        row = 0
        try:
            with storage_errors():
                for part in READERS[self.kind](self.place):
                    yield row, part
                    row += part.num_rows
        except DataError:
            raise
        except MALFORMED as error:
            raise DataError(f"{self.place} cannot be read as predictions, after row {row:,}: {error}") from error


def find_predictions(stated: str) -> list[PredictionFile]:
    """The files of one `--predictions`: a file, a glob, a URL, or a folder that Hugging Face `datasets` saved.

    Raises:
        DataError: there is none, or one is of an unknown kind.
    """
    if not stated.strip():
        raise DataError(f"--predictions {stated!r} names no file")
    try:
        with storage_errors():
            places = _places(location(stated))
    except MALFORMED as error:
        raise DataError(f"--predictions {stated} cannot be looked up: {error}") from error
    if not places:
        raise DataError(f"--predictions {stated}: there is no such file")
    return [_described(found) for found in places]


def _places(place: Location) -> list[Location]:
    """The plain files that a place stands for; a file of that very name comes before a glob."""
    if place.is_file():
        return [place]
    if place.is_dir():
        if (place / "state.json").is_file():  # the order of a dataset's files
            state = json.loads(read_at_most(place / "state.json", STATE_BYTES))
            names = [str(file["filename"]) for file in state["_data_files"]]
            for name in names:
                require_plain_name(name)
            return [place / name for name in names]
        inside = [place / name for name in sorted(names_in(place)) if name.endswith(SUFFIXES)]
        return [found for found in inside if found.is_file()]
    found_by_glob: list[Location] = []
    if set(place.name) & set("*?["):
        found_by_glob = sorted(place.parent.glob(place.name), key=str)
    return [found for found in found_by_glob if found.is_file()]


def _described(place: Location) -> PredictionFile:
    suffix = place.suffix.lower().removeprefix(".")
    kind = {"tsv": "csv", "ndjson": "jsonl"}.get(suffix, suffix)
    if kind not in READERS:
        raise DataError(
            f"{place}: predictions are {', '.join(SUFFIXES)} files or a dataset's folder, not {place.suffix!r}"
        )
    try:
        with storage_errors():
            names = STATED.get(kind, lambda _: ())(place)
    except MALFORMED as error:
        raise DataError(f"{place} cannot be read as {kind}: {error}") from error
    return PredictionFile(place, tuple(str(name) for name in names), kind)


def names_of(text: str | bytes) -> list[str]:
    """Class names from a file of them: a JSON list, or one to a line.

    Raises:
        ValueError: it is JSON of another kind.
    """
    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if decoded.lstrip().startswith("["):
        names = json.loads(decoded)
        if not all(isinstance(name, str | int) for name in names):
            raise ValueError("class names are text")
        return [str(name) for name in names]
    return [line.strip() for line in decoded.splitlines() if line.strip()]


# -- one reader for each kind


def _parquet(place: Location) -> Iterator[pa.RecordBatch]:
    with ExitStack() as stack:
        if isinstance(place, Path):
            file = stack.enter_context(pq.ParquetFile(place, memory_map=True))
        else:
            file = stack.enter_context(pq.ParquetFile(stack.enter_context(opened(place, random=True)), pre_buffer=True))
        for group in range(file.num_row_groups):
            described = file.metadata.row_group(group)
            size = max(1, described.total_byte_size // max(1, described.num_rows))
            yield from file.iter_batches(max(1, min(1 << 16, PART_BYTES // size)), row_groups=[group])


def _arrow(place: Location) -> Iterator[pa.RecordBatch]:
    with ExitStack() as stack:
        stream = stack.enter_context(opened(place))
        try:
            reader: Any = pa.ipc.open_stream(stream)
            batches: Iterator[pa.RecordBatch] = iter(reader)
        except pa.ArrowInvalid:
            stream.seek(0)
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        for batch in batches:
            rows = max(1, PART_BYTES // max(1, batch.nbytes // max(1, batch.num_rows)))
            yield from (batch.slice(begin, rows) for begin in range(0, batch.num_rows, rows))


def _csv(place: Location) -> Iterator[pa.RecordBatch]:
    with opened(place) as file:
        head = file.read(1 << 20)
        encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        first = head.decode("utf-8-sig" if encoding == "utf-8" else encoding, "replace").splitlines()[:1]
        if not first:
            raise DataError(f"{place} is empty")
        delimiter = "\t" if place.suffix.lower() == ".tsv" else max(",;\t", key=first[0].count)
        names = next(csv.reader(first, delimiter=delimiter))
        if len({name.strip() for name in names}) < len(names):
            raise DataError(f"{place}: two columns have one name")
        file.seek(0)
        reader = pyarrow.csv.open_csv(
            file,
            pyarrow.csv.ReadOptions(block_size=16 << 20, encoding=encoding),
            pyarrow.csv.ParseOptions(delimiter=delimiter),
            pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in names if name.strip().lower() in TEXT},
            ),
        )
        with reader:
            yield from reader


def _jsonl(place: Location) -> Iterator[pa.RecordBatch]:
    with opened(place) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        numbered = enumerate(text, 1)
        while lines := list(islice(numbered, LINES)):
            rows = [_object(place, number, line) for number, line in lines if line.strip()]
            if rows:
                yield _of_rows(rows)


def _object(place: Location, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: line {number} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: line {number} must be a JSON object, as in " + '{"key": "cat/1.jpg", "label": "cat"}'
        )
    return value


def _of_rows(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        if all(isinstance(value, str | int | None) and not isinstance(value, bool) for value in values) and any(
            isinstance(value, str) for value in values
        ):
            values = [None if value is None else str(value) for value in values]  # "7" and 7 are one label
        columns.append(pa.array(values))
    return pa.record_batch(columns, names)


def _npz(place: Location) -> Iterator[pa.RecordBatch]:
    with opened(place, random=True) as file, zipfile.ZipFile(file) as archive, ExitStack() as stack:
        arrays = {}
        for name in archive.namelist():
            member = _Member(place, name, stack.enter_context(archive.open(name)))
            arrays[name.removesuffix(".npy")] = member
        count = max((member.shape[0] for member in arrays.values() if member.shape), default=0)
        rows = {
            name: m for name, m in arrays.items() if len(m.shape) in (1, 2) and m.shape[0] == count and name != NAMES
        }
        width = sum(member.row_bytes for member in rows.values())
        step = max(1, PART_BYTES // max(1, width))
        for begin in range(0, count, step):
            n = min(step, count - begin)
            yield pa.record_batch([member.take(n) for member in rows.values()], list(rows))


NAMES = "class_names"


class _Member:
    """An array in an npz, read from front to back."""

    def __init__(self, place: Location, name: str, file: Any) -> None:
        self.name, self.file = name, file
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise DataError(f"{place}: {name} has version {version} of NumPy's format, which is not read")
        self.shape, fortran, self.dtype = read(file, 1 << 16)
        if self.dtype.kind not in "biufUSO":
            raise DataError(f"{place}: {name} holds {self.dtype}, which is neither number nor text")
        if self.dtype.hasobject:
            raise DataError(
                f"{place}: {name} holds Python objects, which only unpickling could read; save it as numbers or text"
            )
        if fortran and len(self.shape) > 1:
            raise DataError(f"{place}: {name} is in column order; save numpy.ascontiguousarray of it")

    @property
    def row_bytes(self) -> int:
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))

    def take(self, rows: int) -> pa.Array:
        data = self.file.read(rows * self.row_bytes)
        if len(data) != rows * self.row_bytes:
            raise DataError(f"{self.name} is cut short")
        values = np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
        if self.dtype.kind in "US":
            return pa.array([str(v) if self.dtype.kind == "U" else v.decode() for v in values.tolist()], pa.string())
        if values.ndim == 1:
            return pa.array(values)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


READERS: dict[str, Callable[[Location], Iterator[pa.RecordBatch]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "jsonl": _jsonl,
    "npz": _npz,
}


# -- class names that a file states


def _of_metadata(metadata: dict[bytes, bytes] | None) -> Sequence[str]:
    stated = (metadata or {}).get(NAMES.encode())
    return () if stated is None else names_of(stated)


def _of_parquet(place: Location) -> Sequence[str]:
    with opened(place, random=True) as stream, pq.ParquetFile(stream) as file:
        return _of_metadata(file.schema_arrow.metadata)


def _of_arrow(place: Location) -> Sequence[str]:
    with opened(place) as stream:
        try:
            return _of_metadata(pa.ipc.open_stream(stream).schema.metadata)
        except pa.ArrowInvalid:
            stream.seek(0)
            return _of_metadata(pa.ipc.open_file(stream).schema.metadata)


def _of_npz(place: Location) -> Sequence[str]:
    with opened(place, random=True) as file, zipfile.ZipFile(file) as archive:
        if f"{NAMES}.npy" not in archive.namelist():
            return ()
        with archive.open(f"{NAMES}.npy") as member:
            found = _Member(place, NAMES, member)
            return [str(name) for name in found.take(found.shape[0]).to_pylist()]


STATED: dict[str, Callable[[Location], Sequence[str]]] = {"parquet": _of_parquet, "arrow": _of_arrow, "npz": _of_npz}
