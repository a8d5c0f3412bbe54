"""Parquet in Hugging Face's format for images: struct<bytes, path> or plain binary, and a label."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.classes import ClassNames
from pipeline.data.readers.shard import NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, fingerprint, is_local, opened, quick_fingerprint

BATCH = 256  # rows in memory at a time, or fewer:
BATCH_BYTES = 512 << 20  # what they can come to at worst, all of one value that is stored once
PLAIN = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})  # encodings that store each value itself
UNPACKED = 256 << 20  # bytes of a column of one row group that may come from any number …
RATIO = 200  # … and of more, at most so many from each: images do not compress
VALUE_LIMIT = 256 << 20  # bytes of one image
GROUP_LIMIT = 8 << 30  # bytes of a column of one row group, as the file states them


@dataclass(frozen=True)
class ParquetShard(Shard):
    """One Parquet file; it is read by row groups, and groups before `start` are not touched."""

    name: str
    path: Location
    image: str = "image"
    label: str | None = "label"
    """None: labels are not read (a pool's)."""
    names: tuple[str, ...] = ()
    """Class names by label, to understand labels that are strings."""

    def rows(self) -> int:
        with self._open() as file:
            return file.metadata.num_rows

    def fingerprint(self) -> str:
        with self._open():  # a clear error for a missing or broken file
            return fingerprint([quick_fingerprint(self.path), self.image, self.label])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        with self._open() as file:
            columns = [self.image] + ([self.label] if self.label else [])
            self._require(file.schema_arrow, columns)
            row, groups = _skip_groups(file, start)
            for group in groups:
                batches = file.iter_batches(self._batch_rows(file, group), row_groups=[group], columns=columns)
                for batch in batches:
                    end = row + batch.num_rows
                    last = end if stop is None else min(stop, end)
                    if (first := max(start, row)) < last:
                        yield from self._samples(batch.slice(first - row, last - first), first)
                    row = end
                    if stop is not None and row >= stop:
                        return

    def labels(self) -> np.ndarray:
        if self.label is None:
            return np.full(self.rows(), NO_LABEL, np.int64)
        with self._open() as file:
            self._require(file.schema_arrow, [self.label])
            return self._labels(file.read([self.label]).column(0).combine_chunks(), 0)

    def class_names(self) -> tuple[str, ...]:
        with self._open() as file:
            return _declared_names(file.schema_arrow, self.label) if self.label else ()

    def has_bare_numbers(self) -> bool:
        if self.label is None or self.class_names():
            return False
        with self._open() as file:
            self._require(file.schema_arrow, [self.label])
            kind = file.schema_arrow.field(self.label).type
            return not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)

    def _samples(self, batch: pa.RecordBatch, first: int) -> Iterator[Sample]:
        data, paths = _encoded(batch.column(self.image), self)
        count = batch.num_rows
        labels = self._labels(batch.column(self.label), first) if self.label else np.full(count, NO_LABEL)
        self._require_small(data, first)
        rows = zip(range(first, first + count), paths.to_pylist(), data.to_pylist(), labels.tolist(), strict=True)
        for row, path, value, label in rows:
            yield Sample(row, path or f"{self.name}-{row}", value or b"", label)

    def _batch_rows(self, file: pq.ParquetFile, group: int) -> int:
        """So few that a small file cannot fill the memory: a value stored once may stand in every row."""
        described = file.metadata.row_group(group)
        columns = [described.column(number) for number in range(described.num_columns)]
        chunks = [chunk for chunk in columns if chunk.path_in_schema.partition(".")[0] == self.image]
        held, stored = (
            sum(getattr(c, f"total_{kind}_size") for c in chunks) for kind in ("uncompressed", "compressed")
        )
        if held > GROUP_LIMIT or held > max(UNPACKED, RATIO * stored):
            raise DataError(
                f"{self.path}: row group {group} has {held:,} bytes of images when unpacked, from {stored:,}, and "
                f"{GROUP_LIMIT:,} are the limit, {RATIO} from each; write it with smaller row groups"
            )
        if all(PLAIN.issuperset(chunk.encodings) for chunk in chunks):
            return BATCH
        return max(1, min(BATCH, BATCH_BYTES // max(1, held)))

    def _require_small(self, data: Any, first: int) -> None:
        longest = pc.max(pc.binary_length(data)).as_py() or 0
        if longest > VALUE_LIMIT:
            row = first + pc.index(pc.binary_length(data), longest).as_py()
            raise DataError(
                f"{self.path}: row {row} has {longest:,} bytes, and {VALUE_LIMIT:,} are the limit for one image"
            )

    def _labels(self, column: Any, first: int) -> np.ndarray:
        """int64; null and empty text become -1. Text is read as `ClassNames` says."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if _is_text(column.type):
            column = self._numbers(column, first)
        if pa.types.is_floating(column.type) and pc.all(pc.equal(pc.floor(column), column)).as_py() is not False:
            column = column.cast(pa.int64())  # pandas makes whole numbers real where one is missing
        if pa.types.is_null(column.type):
            column = column.cast(pa.int64())
        if not pa.types.is_integer(column.type):
            raise DataError(f"{self.path}: column {self.label!r} is {column.type}; labels are integers or names")
        return np.asarray(pc.fill_null(column.cast(pa.int64()), NO_LABEL))

    def _numbers(self, column: Any, first: int) -> Any:
        """Labels that are text, as numbers."""
        encoded = column.dictionary_encode()
        labels = [self._classes.label(text) if text.strip() else NO_LABEL for text in encoded.dictionary.to_pylist()]
        unknown = [place for place, label in enumerate(labels) if label is None]
        if unknown:
            codes = np.asarray(pc.fill_null(encoded.indices, -1))
            row = int(np.flatnonzero(np.isin(codes, unknown))[0])
            raise DataError(
                f"{self.path}: row {first + row} has the label {column[row].as_py()!r}, "
                "which is no class name of the manifest"
            )
        return pa.array(labels, pa.int64()).take(encoded.indices)

    @cached_property
    def _classes(self) -> ClassNames:
        return ClassNames(self.names, self.name)

    def _require(self, schema: pa.Schema, columns: list[str]) -> None:
        for column in columns:
            if column not in schema.names:
                kind = "image" if column == self.image else "label"
                raise DataError(
                    f"{self.path} has no column {column!r}; it has {', '.join(schema.names)}. "
                    f"Name the right one in the manifest, as `{kind}:` of this entry of `files`"
                )

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        try:
            if is_local(self.path):
                with pq.ParquetFile(self.path) as file:
                    yield file
            else:
                with opened(self.path) as stream, pq.ParquetFile(stream) as file:
                    yield file
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: there is no such file") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.path} cannot be read as Parquet ({error}); it may have been cut short: get it again"
            ) from error


def _skip_groups(file: pq.ParquetFile, start: int) -> tuple[int, list[int]]:
    """The first row of the group that holds row `start`, and that group with all later ones."""
    row, group = 0, 0
    while group < file.num_row_groups:
        size = file.metadata.row_group(group).num_rows
        if row + size > start:
            break
        row, group = row + size, group + 1
    return row, list(range(group, file.num_row_groups))


def _encoded(column: Any, shard: ParquetShard) -> tuple[Any, Any]:
    """The columns of encoded bytes and of paths (null where there is none)."""
    data, paths = column, pa.nulls(len(column), pa.string())
    if pa.types.is_struct(column.type):
        fields = {field.name for field in column.type}
        data = pc.struct_field(column, "bytes") if "bytes" in fields else None
        if "path" in fields:
            paths = pc.struct_field(column, "path")
    if data is not None and _is_any(data, "binary") and (_is_any(paths, "string") or pa.types.is_null(paths.type)):
        return data, paths
    raise DataError(f"{shard.path}: column {shard.image!r} is {column.type}; images are binary or struct<bytes, path>")


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_any(column: Any, kind: str) -> bool:
    """Whether it is of that type, or of the same with long offsets."""
    return str(column.type) in (kind, f"large_{kind}")


def _declared_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Class names as the Hugging Face metadata of the schema declares them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        names = feature.get("names") or feature.get("feature", {}).get("names") or ()
        return tuple(str(name) for name in names)
    except (KeyError, ValueError, TypeError, AttributeError):
        return ()
