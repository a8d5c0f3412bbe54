"""What the files of the store hold: names, schemas, versions."""

from typing import Literal

import numpy as np
import pyarrow as pa

FORMAT, VERSION = "mpl-targets", 2
READABLE = (1, 2)  # version 1 had Parquet alone and did not state uses
MANIFEST = "_manifest.json"
ITEM = {"float16": "<f2", "float32": "<f4"}
REMEDY = "run `mpl precompute --force`"

Dtype = Literal["float16", "float32"]
PoolFormat = Literal["parquet", "webdataset"]


def pool_schema(classes: int, dtype: Dtype, fingerprint: str) -> pa.Schema:
    """Of the selected images: targets/pool-*.parquet, where the images lie in it."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("image", pa.large_binary()),
            ("distribution", pa.binary(classes * np.dtype(ITEM[dtype]).itemsize)),
            ("classes", pa.list_(pa.int32())),
            ("repeat", pa.int64()),
        ],
        metadata=_metadata(fingerprint),
    )


def sidecar_schema(pool: pa.Schema) -> pa.Schema:
    """Of targets/pool-*.parquet beside a tar: the length and CRC-32 of each image take the image's place."""
    at = pool.get_field_index("image")
    lengths, sums = pa.field("bytes", pa.int64()), pa.field("crc32", pa.uint32())
    return pool.remove(at).insert(at, lengths).insert(at + 1, sums)


def labelled_schema(classes: int, dtype: Dtype, fingerprint: str) -> pa.Schema:
    """Of targets/labelled-*.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("label", pa.int64()),
            ("distribution", pa.binary(classes * np.dtype(ITEM[dtype]).itemsize)),
        ],
        metadata=_metadata(fingerprint),
    )


def _metadata(fingerprint: str) -> dict[str, str]:
    return {"mpl.format": FORMAT, "mpl.version": str(VERSION), "mpl.fingerprint": fingerprint}
