"""Tables that hold the images themselves: Parquet, and Hugging Face's data sets as it saves and caches them.

Source of the formats: the `datasets` library's documentation of `Dataset.save_to_disk`, of its cache and of `Features`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.data.decode import MAX_BYTES
from pipeline.data.get.layout import SPLIT_WORDS
from pipeline.data.get.tables import find_column
from pipeline.data.manifest import SplitName
from pipeline.errors import DataError
from pipeline.storage.files import read_at_most

SUFFIXES = (".parquet", ".arrow")
BATCH = 256  # rows in memory at a time
CACHED = re.compile(r"cache-[0-9a-f]{8,}")  # what a `map` of the library left; its source lies beside it


class ImageRow(NamedTuple):
    """A row. `data` empty: there is no image in it."""

    key: str
    data: bytes
    class_name: str | None
    """None: it has no label."""


def holds_images(path: Path) -> bool:
    """Whether a Parquet or Arrow file has a column of images.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as (schema, _):
        return _image_columns(schema) != []


def split_of(path: Path, root: Path) -> SplitName | None:
    """The split that the file's folder or its name says, as Hugging Face writes them; None if neither does.

    `train/data-00000-of-00002.arrow`, `data/train-00000-of-00001.parquet`, `imagefolder-train.arrow`.
    """
    words = [*path.relative_to(root).parts[:-1], *re.split(r"[-_.]", path.stem)]
    splits = {SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def is_cache(path: Path) -> bool:
    """Whether it is what a computation left beside the data set."""
    return path.suffix == ".arrow" and CACHED.match(path.stem) is not None


def read_rows(path: Path, columns: Mapping[str, str], name: str) -> Iterator[ImageRow]:
    """The rows of a Parquet or Arrow file, streamed.

    Args:
        path: the file.
        columns: which column is the image (`file`) and which the label, where a person said so.
        name: what keys begin with, where the images have no path.

    Raises:
        DataError: it cannot be read; or what column is meant is not clear; or a label is none of the file's classes.
    """
    _require_flat(path)
    with _opened(path) as (schema, batches):
        image = _image_column(schema, columns, path)
        label = _label_column(schema, columns, path)
        names = _class_names(schema, label)
        row = 0
        for batch in batches:
            labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
            for value, one in zip(batch.column(image).to_pylist(), labels, strict=True):
                data, key = _image(value, path)
                yield ImageRow(key or f"{name}-{row}", data, _class_name(one, names, path, row))
                row += 1


def _image_columns(schema: pa.Schema) -> list[str]:
    features = _features(schema)
    found = [
        name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"
    ]
    return [name for name in found if name in schema.names] or [
        field.name for field in schema
        if (pa.types.is_struct(field.type) and {"bytes"} <= {part.name for part in field.type})
        or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    ]  # fmt: skip


def _image_column(schema: pa.Schema, columns: Mapping[str, str], path: Path) -> str:
    present = _image_columns(schema)
    wanted = columns.get("file")
    if wanted and wanted not in present:
        raise DataError(f"{path}: column {wanted!r} holds no images; {', '.join(present) or 'none'} does")
    if not wanted and len(present) != 1:
        raise DataError(
            f"{path}: {'columns ' + ', '.join(present) + ' hold' if present else 'no column holds'} images. "
            "Say which is meant: --column file=NAME"
        )
    return wanted or present[0]


def _label_column(schema: pa.Schema, columns: Mapping[str, str], path: Path) -> str | None:
    if "label" not in columns:
        features = _features(schema).items()
        classes = [name for name, kind in features if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
        if len(classes) == 1 and classes[0] in schema.names:
            return classes[0]
    return find_column("label", schema.names, columns, path)


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def _class_names(schema: pa.Schema, label: str | None) -> list[str]:
    feature = _features(schema).get(label or "")
    return list(feature.get("names") or ()) if isinstance(feature, dict) else []


def _class_name(label: Any, names: list[str], path: Path, row: int) -> str | None:
    """As text; -1 is how Hugging Face's test splits say that there is none."""
    if label is None or label == "" or label != label or label == -1:
        return None
    if not names or isinstance(label, str):
        return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
    if not 0 <= label < len(names):
        raise DataError(f"{path}: row {row} has label {label}; the file names {len(names)} classes")
    return names[label]


def _image(value: Any, path: Path) -> tuple[bytes, str]:
    """Bytes and key. A data set that was made from files may hold their paths alone."""
    if not isinstance(value, dict):
        return value or b"", ""
    data, key = value.get("bytes"), value.get("path") or ""
    if data is None and key and (file := path.parent / key).is_file():
        data = read_at_most(file, MAX_BYTES + 1)
    return data or b"", key


def _require_flat(path: Path) -> None:
    """Refuse a data set that is a choice of the rows of its files: reading them all would undo the choice."""
    state = path.parent / "state.json"
    if path.suffix == ".arrow" and state.is_file() and json.loads(state.read_text()).get("_indices_data_files"):
        raise DataError(f"{path.parent} is a choice of rows; save it again after `dataset.flatten_indices()`")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Schema and batches; Arrow as a stream, which is how Hugging Face writes it, or as a file."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                yield parquet.schema_arrow, parquet.iter_batches(BATCH)
            return
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                yield stream.schema, iter(stream)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it may have been cut short: get it again") from error
