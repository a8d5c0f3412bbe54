"""The store of the teacher's distributions: self-contained training shards, checked before use.

    targets/pool-*.parquet      `key`, `shard`, `row`, `image` (encoded bytes), `distribution`,
                                `classes` (those that the image was kept for), `repeat` (uses per epoch,
                                over all its classes); one row per image, shuffled once, shards of
                                equal length, so that reading in sequence is a random order
    targets/pool-*.tar          in the WebDataset format the images lie here, named NNNNN-RRRRRR.jpg by file
                                and row, and pool-*.parquet holds `bytes` and `crc32` in place of `image`
    targets/labelled-*.parquet  `key`, `shard`, `row`, `label`, `distribution`, in the split's order
    targets/_manifest.json      version, counts, checksums, class names, teacher, preprocessing; written
                                last: a folder without it is no store

A distribution is a dense row of C little-endian float16 or float32 numbers (fixed-size binary: a few
times faster than nested lists); reading gives float32 rows that sum to 1. The folder may lie in object storage.
"""

from pipeline.targets.layout import FORMAT, ITEM, MANIFEST, VERSION, Dtype, PoolFormat, labelled_schema, pool_schema
from pipeline.targets.manifest import read_manifest, write_manifest
from pipeline.targets.pool_files import pool_file_is_done, remove_foreign, write_pool_file
from pipeline.targets.store import LabelledTargets, StoredBatch, TargetsStore
from pipeline.targets.tables import file_is_done, write_targets

__all__ = [
    "FORMAT",
    "ITEM",
    "MANIFEST",
    "VERSION",
    "Dtype",
    "LabelledTargets",
    "PoolFormat",
    "StoredBatch",
    "TargetsStore",
    "file_is_done",
    "labelled_schema",
    "pool_file_is_done",
    "pool_schema",
    "read_manifest",
    "remove_foreign",
    "write_manifest",
    "write_pool_file",
    "write_targets",
]
