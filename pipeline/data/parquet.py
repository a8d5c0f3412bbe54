"""Parquet in the Hugging Face image layout: struct<bytes, path> or plain binary, and a label."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.shards import NO_LABEL, Sample, Shard
from pipeline.errors import DataError
from pipeline.files import fingerprint, quick_fingerprint

BATCH = 256  # rows in memory at a time


@dataclass(frozen=True)
class ParquetShard(Shard):
    """One Parquet file; it is read by row groups, and groups before `start` are not touched."""

    name: str
    path: Path
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
            for batch in file.iter_batches(BATCH, row_groups=groups, columns=columns):
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

    def _samples(self, batch: pa.RecordBatch, first: int) -> Iterator[Sample]:
        data, paths = _encoded(batch.column(self.image), self)
        count = batch.num_rows
        labels = self._labels(batch.column(self.label), first) if self.label else np.full(count, NO_LABEL)
        for i in range(count):
            key = paths[i].as_py() or f"{self.name}-{first + i}"
            yield Sample(first + i, key, data[i].as_py() or b"", int(labels[i]))

    def _labels(self, column: Any, first: int) -> np.ndarray:
        """int64; null becomes -1. Strings are looked up among the class names."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            codes = pc.index_in(column, value_set=pa.array(self.names, column.type))
            unknown = np.flatnonzero(pc.and_(pc.is_null(codes), pc.is_valid(column)))
            if len(unknown):
                row = int(unknown[0])
                raise DataError(
                    f"{self.path}: row {first + row} has the label {column[row].as_py()!r}, "
                    "which is no class name of the manifest"
                )
            column = codes
        if pa.types.is_null(column.type):
            column = column.cast(pa.int64())
        if not pa.types.is_integer(column.type):
            raise DataError(f"{self.path}: column {self.label!r} is {column.type}; labels are integers or names")
        return np.asarray(pc.fill_null(column.cast(pa.int64()), NO_LABEL))

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
            with pq.ParquetFile(self.path) as file:
                yield file
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: there is no such file") from error
        except (pa.ArrowException, OSError) as error:
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
    if pa.types.is_struct(column.type):
        fields = {field.name for field in column.type}
        if "bytes" in fields:
            nothing = pa.nulls(len(column), pa.string())
            return pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if "path" in fields else nothing
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column, pa.nulls(len(column), pa.string())
    raise DataError(f"{shard.path}: column {shard.image!r} is {column.type}; images are binary or struct<bytes, path>")


def _declared_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Class names as the Hugging Face metadata of the schema declares them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[label]
        names = feature.get("names") or feature.get("feature", {}).get("names") or ()
        return tuple(str(name) for name in names)
    except (KeyError, ValueError, TypeError, AttributeError):
        return ()
