"""Writing data sets as they are read: Parquet in Hugging Face's format for images, and a manifest."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.data.manifest import Manifest
from pipeline.storage.files import whole_file, write_text

GROUP_ROWS = 1_000
GROUP_BYTES = 64 << 20  # of images; a row group ends at either limit


class Row(NamedTuple):
    """An image to write."""

    key: str
    data: bytes
    label: int


def write_images(path: Path, rows: Iterable[Row], class_names: Sequence[str] | None) -> None:
    """Write one Parquet file, whole or not at all, in bounded memory.

    Args:
        path: the file.
        rows: streamed; their labels are left out when there are no class names.
        class_names: go into the schema's metadata; None for a pool.

    Raises:
        RunError: the file cannot be written.
    """
    schema = _schema(class_names)
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        group: list[Row] = []
        held = 0
        for row in rows:
            group.append(row)
            held += len(row.data)
            if len(group) >= GROUP_ROWS or held >= GROUP_BYTES:
                writer.write_table(_table(group, schema))
                group, held = [], 0
        if group:
            writer.write_table(_table(group, schema))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as YAML, without what is not set.

    Raises:
        RunError: the file cannot be written.
    """
    values = manifest.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _schema(class_names: Sequence[str] | None) -> pa.Schema:
    features: dict[str, object] = {"image": {"_type": "Image"}}
    fields = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    if class_names is not None:
        features["label"] = {"_type": "ClassLabel", "names": list(class_names)}
        fields.append(pa.field("label", pa.int64()))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    columns: list[list[object]] = [[{"bytes": row.data, "path": row.key} for row in rows]]
    if "label" in schema.names:
        columns.append([row.label for row in rows])
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
