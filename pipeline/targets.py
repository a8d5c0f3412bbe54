"""The store of the teacher's distributions: self-contained training shards, checked before use.

    targets/pool-*.parquet      `key`, `shard`, `row`, `image` (encoded bytes), `distribution`,
                                `classes` (those that the image was kept for), `repeat` (uses per epoch,
                                over all its classes); one row per image, shuffled once, shards of
                                equal length, so that reading in sequence is a random order
    targets/labelled-*.parquet  `key`, `shard`, `row`, `label`, `distribution`, in the split's order
    targets/_manifest.json      version, counts, checksums, class names, teacher, preprocessing; written
                                last: a folder without it is no store

A distribution is a dense row of C little-endian float16 or float32 numbers (fixed-size binary: a few
times faster than nested lists); reading gives float32 rows that sum to 1.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import Sample
from pipeline.dense import fixed_numbers
from pipeline.errors import TargetsError
from pipeline.files import sha256_file, whole_file, write_json

FORMAT, VERSION = "mpl-targets", 1
MANIFEST = "_manifest.json"
GROUP = 4096  # rows of a row group
HASHED = 4 << 30  # bytes; larger stores are hashed on request only, their pages always
REQUIRED = {"fingerprint", "teacher", "class_names", "dtype", "pool", "labelled"}
ITEM = {"float16": "<f2", "float32": "<f4"}

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True, eq=False)
class LabelledTargets:
    """The teacher's view of the labelled images: n of them, in the split's order.

    Attributes:
        keys: for people.
        shard, row: identity.
        labels: (n,), int64.
        distributions: (n, C), float32, rows sum to 1.
    """

    keys: list[str]
    shard: list[str]
    row: NDArray[np.int64]
    labels: NDArray[np.int64]
    distributions: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """Some rows of the pool: encoded images with their identity, distributions (n, C) and repeats (n,)."""

    samples: list[tuple[str, Sample]]
    distributions: NDArray[np.float32]
    repeats: NDArray[np.int64]


def pool_schema(classes: int, dtype: Dtype, fingerprint: str) -> pa.Schema:
    """Of targets/pool-*.parquet."""
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


def write_targets(path: Path, table: pa.Table) -> None:
    """Write one file of the store, whole or not at all; its schema is one of the two above."""
    packed = {name: "none" if name == "image" else "zstd" for name in table.schema.names}
    with whole_file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=GROUP,
            compression=packed,
            compression_level={name: 1 for name, codec in packed.items() if codec == "zstd"},
            use_dictionary=["shard"],
            write_statistics=False,
            write_page_checksum=True,
        )


def file_is_done(path: Path, fingerprint: str) -> bool:
    """Whether `path` is a whole file of the store with this fingerprint."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return metadata.get(b"mpl.fingerprint") == fingerprint.encode()


def write_manifest(
    folder: Path,
    *,
    fingerprint: str,
    teacher: str,
    class_names: Sequence[str],
    dtype: Dtype,
    preprocessing: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write _manifest.json over the files that lie in `folder`, and return it; this completes the store.

    Args:
        folder: targets/.
        fingerprint: of all that the store was made from.
        teacher: fingerprint of the teacher.
        class_names: in order.
        dtype: of the distributions.
        preprocessing: size, mean, std.
        more: counts for people.
    """
    kinds = {kind: [_entry(path) for path in sorted(folder.glob(f"{kind}-*.parquet"))] for kind in ("pool", "labelled")}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "teacher": teacher,
        "class_names": list(class_names),
        "dtype": dtype,
        "preprocessing": preprocessing,
        **more,
        **{kind: {"rows": sum(file["rows"] for file in files), "files": files} for kind, files in kinds.items()},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


class TargetsStore:
    """A finished store, checked when it was opened. Nothing is read before it is asked for.

    Attributes:
        folder: targets/.
        manifest: the content of _manifest.json.
        class_names: in the order of the distributions.
        count: pool images, each counted once.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.dtype: Dtype = manifest["dtype"]
        self.teacher: str = manifest["teacher"]
        self.fingerprint: str = manifest["fingerprint"]
        self.count: int = manifest["pool"]["rows"]

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        teacher: str | None = None,
        class_names: Sequence[str] | None = None,
        verify: bool | None = None,
    ) -> Self:
        """Open a store.

        Args:
            folder: targets/.
            teacher: the fingerprint that the store's teacher must have; None accepts any.
            class_names: the classes that it must have, in order; None accepts any.
            verify: whether to compare all checksums; None does so up to 4 GiB. Sizes and row counts
                are always compared, and reading always verifies the checksums of the pages read.

        Raises:
            TargetsError: it is not complete, of another version, teacher or class list, or damaged.
        """
        manifest = read_manifest(folder)
        if teacher is not None and manifest["teacher"] != teacher:
            raise TargetsError(
                f"{folder} was written by another teacher ({manifest['teacher'][:12]}…, expected {teacher[:12]}…); "
                "run `mpl precompute` again, or use the run that the store belongs to"
            )
        if class_names is not None and manifest["class_names"] != list(class_names):
            raise TargetsError(f"{folder} has other classes: {_difference(manifest['class_names'], class_names)}")
        files = [file for kind in ("pool", "labelled") for file in manifest[kind]["files"]]
        full = verify if verify is not None else sum(file["bytes"] for file in files) <= HASHED
        for file in files:
            _check_file(folder, file, full)
        return cls(folder, manifest)

    def batches(self, batch: int = GROUP) -> Iterator[StoredBatch]:
        """All rows in their stored, shuffled order, `batch` at most at a time; constant memory."""
        for part in self._read("pool", ["key", "shard", "row", "image", "distribution", "repeat"], batch):
            keys, shards, rows, images = (part.column(name).to_pylist() for name in ("key", "shard", "row", "image"))
            yield StoredBatch(
                samples=[
                    (shard, Sample(row, key, data))
                    for shard, row, key, data in zip(shards, rows, keys, images, strict=True)
                ],
                distributions=self._distributions(part),
                repeats=part.column("repeat").to_numpy(),
            )

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """(shard name, sample) in stored order, as `load_images` takes them."""
        for batch in self.batches():
            yield from batch.samples

    def images(self) -> Iterator[bytes]:
        """Encoded images in stored order."""
        for part in self._read("pool", ["image"]):
            yield from part.column(0).to_pylist()

    def distributions(self) -> NDArray[np.float32]:
        """The teacher's distributions, (N, C), rows sum to 1, in stored order."""
        parts = [self._distributions(part) for part in self._read("pool", ["distribution"])]
        return np.concatenate([np.empty((0, len(self.class_names)), np.float32), *parts])

    def repeats(self) -> NDArray[np.int64]:
        """How often each image is used in an epoch, (N,)."""
        parts = [part.column(0).to_numpy() for part in self._read("pool", ["repeat"])]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def keys(self) -> list[str]:
        """The images' names, for people, in stored order."""
        return [key for part in self._read("pool", ["key"]) for key in part.column(0).to_pylist()]

    def classes(self) -> list[list[int]]:
        """The classes that each image was kept for, in stored order."""
        return [kept for part in self._read("pool", ["classes"]) for kept in part.column(0).to_pylist()]

    def labelled(self) -> LabelledTargets:
        """The labelled images' keys, identity, labels and distributions."""
        parts = list(self._read("labelled", ["key", "shard", "row", "label", "distribution"]))
        empty = np.empty((0, len(self.class_names)), np.float32)
        return LabelledTargets(
            keys=[key for part in parts for key in part.column("key").to_pylist()],
            shard=[name for part in parts for name in part.column("shard").to_pylist()],
            row=np.concatenate([np.empty(0, np.int64), *(part.column("row").to_numpy() for part in parts)]),
            labels=np.concatenate([np.empty(0, np.int64), *(part.column("label").to_numpy() for part in parts)]),
            distributions=np.concatenate([empty, *(self._distributions(part) for part in parts)]),
        )

    def _read(self, kind: str, columns: list[str], batch: int = GROUP) -> Iterator[pa.RecordBatch]:
        for file in self.manifest[kind]["files"]:
            path = self.folder / file["name"]
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as opened:
                    yield from opened.iter_batches(batch_size=batch, columns=columns)
            except (OSError, pa.ArrowInvalid) as error:
                raise TargetsError(f"{path} is damaged ({error}); run `mpl precompute --force`") from error

    def _distributions(self, part: pa.RecordBatch) -> NDArray[np.float32]:
        """(n, C) float32, renormalised: float16 rows sum to 1 only nearly."""
        rows = fixed_numbers(part.column("distribution"), ITEM[self.dtype]).astype(np.float32)
        result: NDArray[np.float32] = rows / rows.sum(axis=1, keepdims=True)
        return result


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        TargetsError: there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TargetsError(f"{folder} is no finished store: {MANIFEST} is missing; run `mpl precompute`") from error
    except (OSError, ValueError) as error:
        raise TargetsError(f"{path} cannot be read ({error}); run `mpl precompute --force`") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise TargetsError(
            f"{path} is {found[0]} version {found[1]}, expected {FORMAT} version {VERSION}; "
            "run `mpl precompute --force`"
        )
    lacking = REQUIRED - manifest.keys()
    if lacking:
        raise TargetsError(f"{path} lacks {', '.join(sorted(lacking))}; run `mpl precompute --force`")
    return manifest


def _metadata(fingerprint: str) -> dict[str, str]:
    return {"mpl.format": FORMAT, "mpl.version": str(VERSION), "mpl.fingerprint": fingerprint}


def _entry(path: Path) -> dict[str, Any]:
    rows = pq.read_metadata(path).num_rows
    return {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _check_file(folder: Path, file: dict[str, Any], full: bool) -> None:
    path = folder / file["name"]
    remedy = "run `mpl precompute --force`"
    if not path.is_file():
        raise TargetsError(f"{path} is missing; {remedy}")
    if (size := path.stat().st_size) != file["bytes"]:
        raise TargetsError(
            f"{path} has {size:,} bytes, its manifest says {file['bytes']:,}: it was cut short or changed; {remedy}"
        )
    try:
        rows = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise TargetsError(f"{path} is not a whole Parquet file ({error}); {remedy}") from error
    if rows != file["rows"]:
        raise TargetsError(f"{path} has {rows:,} rows, its manifest says {file['rows']:,}; {remedy}")
    if full and sha256_file(path) != file["sha256"]:
        raise TargetsError(f"{path} is not the file that was written: its checksum differs; {remedy}")


def _difference(found: Sequence[str], expected: Sequence[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} classes, expected {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"class {at} is {found[at]!r}, expected {expected[at]!r}; run `mpl precompute` again"
