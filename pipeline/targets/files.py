"""The files of the store: what they hold, how they are written and read.

    targets/pool-*.parquet      `key`, `shard`, `row`, `image` (encoded bytes), `distribution`,
                                `classes` (those that the image was kept for), `repeat` (uses per epoch,
                                over all its classes); one row per image, shuffled once, shards of
                                equal length, so that reading in sequence is a random order
    targets/pool-*.tar          in the WebDataset format: whole samples, named NNNNN-RRRRRR by file and row, for any
                                loader: the image, `.npy` with the distribution, `.json` with key, shard, row,
                                classes and repeat. For speed pool-*.parquet holds all of it again but the image,
                                and in its place where it lies in the tar: `offset`, `bytes` and `crc32`
    targets/labelled-*.parquet  `key`, `shard`, `row`, `label`, `distribution`, in the split's order

    `embedding`                 in each of these where the store has embeddings, float16 (`.embedding.npy` in a tar)

A distribution is a dense row of C little-endian float16 or float32 numbers (fixed-size binary: a few times faster than
nested lists). The header has the store's fingerprint and the file's own name, so that a renamed file shows.

A tar is written first and its Parquet file, which states the tar's bytes and SHA-256, last: a training shard is done
when its Parquet file is.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import TargetsError
from pipeline.storage.files import Location, opened, whole_file
from pipeline.storage.ours import is_ours
from pipeline.storage.tables import TableFormat, header_if_whole, open_table, require_absence, write_table

Dtype = Literal["float16", "float32"]
PoolFormat = Literal["parquet", "webdataset"]

TARGETS = TableFormat(
    "mpl-targets",
    3,
    remedy="run `mpl precompute --force`",
    readable=(1, 2, 3),  # 1 had Parquet alone and did not state uses; tars of 2 hold images alone
    error=TargetsError,
    plain=frozenset({"image"}),
    dictionary=("shard",),
    statistics=False,
)
ITEM = {"float16": "<f2", "float32": "<f4"}
EMBEDDING_ITEM = "<f2"
IN_TAR = ("bytes", "crc32")  # columns that are there in place of `image`; from version 3 on also:
OFFSET = "offset"
GROUP = 4096  # rows of a row group, at most …
GROUP_BYTES = 64 << 20  # … and its bytes, about: a reader holds one
BESIDE = ("json", "npy", "embedding.npy")  # of a sample in a tar, beside its image
BLOCK = tarfile.BLOCKSIZE  # bytes; a member of a tar is one block of header, then its content filled up to whole blocks
SIGNATURES = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif")),
    *((b"MM\0*", "tif"), (b"\0\0\0\x0cjP  ", "jp2"), (b"\xffO\xffQ", "jp2"), (b"P1", "pbm"), (b"P4", "pbm")),
    *((b"P2", "pgm"), (b"P5", "pgm"), (b"P3", "ppm"), (b"P6", "ppm")),
)


# -- columns


def embedding_field(numbers: int) -> list[pa.Field]:
    """The column of embeddings of so many numbers; none for 0."""
    return [pa.field("embedding", pa.binary(numbers * np.dtype(EMBEDDING_ITEM).itemsize))] if numbers else []


def pool_schema(classes: int, dtype: Dtype, embedding: int = 0) -> pa.Schema:
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
            *embedding_field(embedding),
        ]
    )


def labelled_schema(classes: int, dtype: Dtype, embedding: int = 0) -> pa.Schema:
    """Of targets/labelled-*.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("label", pa.int64()),
            ("distribution", pa.binary(classes * np.dtype(ITEM[dtype]).itemsize)),
            *embedding_field(embedding),
        ]
    )


# -- writing


def pool_path(folder: Location, number: int) -> Location:
    """The Parquet file of a training shard."""
    return folder / f"pool-{number:05d}.parquet"


def write_targets(path: Location, table: pa.Table, fingerprint: str, tar: Mapping[str, object] | None = None) -> None:
    """Write one Parquet file of the store, whole or not at all.

    Args:
        path: where.
        table: with the columns of one of the schemas.
        fingerprint: of the store.
        tar: notes about the tar beside it.
    """
    notes = {"fingerprint": fingerprint, "file": path.stem, **(tar or {})}
    if "repeat" in table.schema.names:
        notes["uses"] = int(table.column("repeat").to_numpy().sum())
    rows = GROUP_BYTES * max(table.num_rows, 1) // max(table.nbytes, 1)
    write_table(path, TARGETS, table, notes, group=min(max(rows, 64), GROUP))


def write_pool_file(
    folder: Location,
    number: int,
    table: pa.Table,
    fingerprint: str,
    format: PoolFormat = "parquet",
    dtype: Dtype = "float16",
) -> None:
    """Write training shard `number`, whole or not at all.

    Args:
        folder: targets/.
        number: of the shard, from 0.
        table: of `pool_schema`, images included, in the order in which they are to lie.
        fingerprint: of the store.
        format: webdataset writes pool-00000.tar with whole samples, and pool-00000.parquet without images.
        dtype: of its distributions.
    """
    path = pool_path(folder, number)
    if format == "parquet":
        write_targets(path, table, fingerprint)
        return
    samples = TarSamples(f"{number:05d}", table, dtype)
    size, digest = samples.write(path.with_suffix(".tar"))
    place = table.schema.get_field_index("image")
    beside = table.remove_column(place)
    beside = beside.add_column(place, OFFSET, pa.array(samples.offsets, pa.int64()))
    beside = beside.add_column(place, IN_TAR[1], pa.array(samples.sums, pa.uint32()))
    lengths = pc.binary_length(table.column("image")).cast(pa.int64())
    write_targets(path, beside.add_column(place, IN_TAR[0], lengths), fingerprint,
                  {"tar.bytes": size, "tar.sha256": digest})  # fmt: skip


def file_is_done(path: Location, fingerprint: str) -> bool:
    """Whether `path` is a whole file of the store with this fingerprint, under its own name.

    Raises:
        RunError: its place cannot be reached.
    """
    return _notes(path, fingerprint) is not None


def pool_file_is_done(folder: Location, number: int, fingerprint: str, format: PoolFormat = "parquet") -> bool:
    """Whether training shard `number` is whole, in this format and of this fingerprint."""
    return _shard_is_done(pool_path(folder, number), fingerprint, format)


def require_ours(folder: Location) -> None:
    """Refuse files of the store's names that somebody else put there: they would be counted into the store.

    Raises:
        TargetsError: names one.
    """
    for path in [*folder.glob("labelled-*.parquet"), *folder.glob("pool-*.parquet"), *folder.glob("pool-*.tar")]:
        if not is_ours(path):
            raise TargetsError(
                f"{path} is named like a file of the store, and mpl did not write it; move it away. Nothing was changed"
            )


def remove_unfinished(folder: Location, fingerprint: str, format: PoolFormat = "parquet") -> None:
    """Remove files of another selection, of other settings or not finished: they would be counted into the store."""
    for path in folder.glob("labelled-*.parquet"):
        if not file_is_done(path, fingerprint):
            path.unlink()
    for path in folder.glob("pool-*.parquet"):
        if not _shard_is_done(path, fingerprint, format):
            path.unlink()
    for path in folder.glob("pool-*.tar"):
        if format != "webdataset" or not path.with_suffix(".parquet").is_file():
            path.unlink()


def _notes(path: Location, fingerprint: str) -> dict[str, str] | None:
    header = header_if_whole(path, TARGETS)
    if header is None or header.fingerprint != fingerprint or header.notes.get("file", path.stem) != path.stem:
        return None
    return header.notes


def _shard_is_done(path: Location, fingerprint: str, format: PoolFormat) -> bool:
    notes = _notes(path, fingerprint)
    if notes is None or ("tar.bytes" in notes) != (format == "webdataset"):
        return False
    if format == "parquet":
        return True
    try:
        return bool(path.with_suffix(".tar").stat().st_size == int(notes["tar.bytes"]))
    except OSError:
        return False


# -- reading


def record_batches(
    path: Location, columns: Sequence[str], batch: int, *, tar: bool = False
) -> Iterator[pa.RecordBatch]:
    """Rows of a file of the store in order, `batch` at most at a time; every page or image is checked.

    Args:
        path: the Parquet file.
        columns: by name; `image` comes from the tar where there is one.
        batch: rows.
        tar: whether images lie in a tar beside it.

    Raises:
        TargetsError: the file, or the tar, is missing or damaged.
        RunError: it cannot be reached.
    """
    with open_table(path, TARGETS) as file:
        if not tar or "image" not in columns:
            yield from file.batches(columns, batch)
            return
        placed = OFFSET in file.file.schema_arrow.names
        noted = [*IN_TAR, *([OFFSET] if placed else [])]
        beside = [name for name in columns if name != "image"] + noted
        try:
            with opened(path.with_suffix(".tar")) as images:
                for rows in file.batches(beside, batch):
                    encoded = next_images(images, *(rows.column(name).to_numpy() for name in noted))
                    yield rows.append_column("image", pa.array(encoded, pa.large_binary())).select(list(columns))
        except OSError as error:
            require_absence(path.with_suffix(".tar"), error)
            raise TargetsError(f"{path.with_suffix('.tar')} is damaged ({error}); {TARGETS.remedy}") from error


# -- a tar of samples, written by webdataset; where the images lie is noted, so that no header is parsed to read them


class TarSamples:
    """The samples of a training shard as a tar: the same bytes every time.

    Args:
        prefix: of the samples' names.
        table: of `pool_schema`.
        dtype: of its distributions.

    Attributes:
        offsets: of the images in the tar, bytes; once it is written.
        sums: their CRC-32s.
    """

    def __init__(self, prefix: str, table: pa.Table, dtype: Dtype) -> None:
        self.prefix, self.table, self.dtype = prefix, table, dtype
        self.offsets: list[int] = []
        self.sums: list[int] = []

    def write(self, path: Location) -> tuple[int, str]:
        """Write it, whole or not at all; its bytes and SHA-256."""
        from webdataset.writer import TarWriter

        with whole_file(path) as temporary, temporary.open("wb") as file:
            hashed = _Hashed(file)
            with TarWriter(hashed, encoder=False, mtime=0, user="", group="") as tar:
                for number, sample in enumerate(self._samples()):
                    self._note(tar.tarstream.offset, sample)
                    tar.write({"__key__": f"{self.prefix}-{number:06d}", **sample})
        return hashed.size, hashed.digest.hexdigest()

    def _samples(self) -> Iterator[dict[str, bytes]]:
        for batch in self.table.to_batches():
            columns = {name: batch.column(name) for name in batch.schema.names}
            for row in range(batch.num_rows):
                image = columns["image"][row].as_py()
                stored = np.frombuffer(columns["distribution"][row].as_py(), ITEM[self.dtype])
                more = {"embedding.npy": _npy(_embedding(columns, row))} if "embedding" in columns else {}
                told = {name: columns[name][row].as_py() for name in ("key", "shard", "row", "classes", "repeat")}
                yield {
                    suffix(image): image,
                    "json": json.dumps(told, ensure_ascii=False).encode(),
                    "npy": _npy(stored),
                    **more,
                }

    def _note(self, begin: int, sample: Mapping[str, bytes]) -> None:
        """Where the image will lie: members are sorted by suffix, each a header's block and whole blocks."""
        for name in sorted(sample):
            begin += BLOCK
            if name not in BESIDE:
                self.offsets.append(begin)
                self.sums.append(zlib.crc32(sample[name]))
                return
            begin += -(-len(sample[name]) // BLOCK) * BLOCK


class _Hashed:
    """A file that is written to, with its SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def _embedding(columns: Mapping[str, pa.Array], row: int) -> NDArray[np.float16]:
    return np.frombuffer(columns["embedding"][row].as_py(), EMBEDDING_ITEM)


def _npy(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def suffix(image: bytes) -> str:
    """The file name suffix of an encoded image, by its first bytes; `img` where they say nothing."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp":
        return "avif"
    return next((name for signature, name in SIGNATURES if image.startswith(signature)), "img")


def next_images(
    tar: IO[bytes], lengths: NDArray[np.int64], sums: NDArray[np.uint32], offsets: NDArray[np.int64] | None = None
) -> list[bytes]:
    """The next n images of a tar that is read from front to back, of these lengths and CRC-32s, (n,).

    Args:
        tar: at the end of the image before.
        lengths, sums: of the images, bytes and CRC-32.
        offsets: of the images in the tar; None: it holds images alone, one after another.

    Raises:
        OSError: they are not what was written.
    """
    if not len(lengths):
        return []
    first = tar.tell()
    if offsets is None:
        whole = BLOCK + -(-lengths // BLOCK) * BLOCK  # bytes of a member
        begins = np.cumsum(whole) - whole + BLOCK  # of contents
        end = int(whole.sum())
    else:
        begins = offsets - first
        end = int(begins[-1] + lengths[-1])
        if int(begins.min()) < 0 or (np.diff(begins) <= 0).any():
            raise OSError("its images do not lie where its Parquet file says")
    data = tar.read(end)
    images = []
    for number, (begin, length, wanted) in enumerate(
        zip(begins.tolist(), lengths.tolist(), sums.tolist(), strict=True)
    ):
        image = data[begin : begin + length]
        if len(image) != length or zlib.crc32(image) != wanted:
            raise OSError(f"image {number} of {len(lengths)} after byte {first:,} was changed")
        images.append(image)
    return images
