"""The files of the store: what they hold, how they are written and read.

    targets/pool-*.parquet      `key`, `shard`, `row`, `image` (encoded bytes), `distribution`,
                                `classes` (those that the image was kept for), `repeat` (uses per epoch,
                                over all its classes); one row per image, shuffled once, shards of
                                equal length, so that reading in sequence is a random order
    targets/pool-*.tar          in the WebDataset format the images lie here, named NNNNN-RRRRRR.jpg by file
                                and row, and pool-*.parquet holds `bytes` and `crc32` in place of `image`
    targets/labelled-*.parquet  `key`, `shard`, `row`, `label`, `distribution`, in the split's order

A distribution is a dense row of C little-endian float16 or float32 numbers (fixed-size binary: a few times faster than
nested lists). The header has the store's fingerprint and the file's own name, so that a renamed file shows.

A tar is written first and its Parquet file, which states the tar's bytes and SHA-256, last: a training shard is done
when its Parquet file is.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Literal

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
    2,
    remedy="run `mpl precompute --force`",
    readable=(1, 2),  # version 1 had Parquet alone and did not state uses
    error=TargetsError,
    plain=frozenset({"image"}),
    dictionary=("shard",),
    statistics=False,
)
ITEM = {"float16": "<f2", "float32": "<f4"}
IN_TAR = ("bytes", "crc32")  # columns that are there in place of `image`
GROUP = 4096  # rows of a row group, at most …
GROUP_BYTES = 64 << 20  # … and its bytes, about: a reader holds one
BLOCK = tarfile.BLOCKSIZE  # bytes; a member of a tar is one block of header, then its content filled up to whole blocks
SIGNATURES = (
    *((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif")),
    *((b"MM\0*", "tif"), (b"\0\0\0\x0cjP  ", "jp2"), (b"\xffO\xffQ", "jp2"), (b"P1", "pbm"), (b"P4", "pbm")),
    *((b"P2", "pgm"), (b"P5", "pgm"), (b"P3", "ppm"), (b"P6", "ppm")),
)


# -- columns


def pool_schema(classes: int, dtype: Dtype) -> pa.Schema:
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
        ]
    )


def labelled_schema(classes: int, dtype: Dtype) -> pa.Schema:
    """Of targets/labelled-*.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("shard", pa.string()),
            ("row", pa.int64()),
            ("label", pa.int64()),
            ("distribution", pa.binary(classes * np.dtype(ITEM[dtype]).itemsize)),
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
    folder: Location, number: int, table: pa.Table, fingerprint: str, format: PoolFormat = "parquet"
) -> None:
    """Write training shard `number`, whole or not at all.

    Args:
        folder: targets/.
        number: of the shard, from 0.
        table: of `pool_schema`, images included, in the order in which they are to lie.
        fingerprint: of the store.
        format: webdataset writes pool-00000.tar with the images, and pool-00000.parquet without them.
    """
    path = pool_path(folder, number)
    if format == "parquet":
        write_targets(path, table, fingerprint)
        return
    sums: list[int] = []
    size, digest = write_tar(path.with_suffix(".tar"), f"{number:05d}", _summed(table.column("image"), sums))
    place = table.schema.get_field_index("image")
    beside = table.remove_column(place).add_column(place, IN_TAR[1], pa.array(sums, pa.uint32()))
    lengths = pc.binary_length(table.column("image")).cast(pa.int64())
    write_targets(path, beside.add_column(place, IN_TAR[0], lengths), fingerprint,
                  {"tar.bytes": size, "tar.sha256": digest})  # fmt: skip


def _summed(images: pa.ChunkedArray, sums: list[int]) -> Iterator[bytes]:
    """The images one by one; their CRC-32s are appended to `sums`."""
    for chunk in images.chunks:
        for value in chunk:
            image = value.as_py()
            sums.append(zlib.crc32(image))
            yield image


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
        beside = [name for name in columns if name != "image"] + list(IN_TAR)
        try:
            with opened(path.with_suffix(".tar")) as images:
                for rows in file.batches(beside, batch):
                    encoded = next_images(images, *(rows.column(name).to_numpy() for name in IN_TAR))
                    yield rows.append_column("image", pa.array(encoded, pa.large_binary())).select(list(columns))
        except OSError as error:
            require_absence(path.with_suffix(".tar"), error)
            raise TargetsError(f"{path.with_suffix('.tar')} is damaged ({error}); {TARGETS.remedy}") from error


# -- a tar as WebDataset has it, whose members lie where their lengths say: no header is parsed to read it


def write_tar(path: Location, prefix: str, images: Iterable[bytes]) -> tuple[int, str]:
    """Write `images` as members PREFIX-000000.jpg, …, whole or not at all; the same bytes every time.

    Returns:
        Bytes and SHA-256 of the tar.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        digest, size = hashlib.sha256(), 0
        for number, image in enumerate(images):
            info = tarfile.TarInfo(f"{prefix}-{number:06d}.{suffix(image)}")
            info.size = len(image)
            member = b"".join((info.tobuf(tarfile.USTAR_FORMAT), image, b"\0" * (-len(image) % BLOCK)))
            digest.update(member)
            file.write(member)
            size += len(member)
        # two empty blocks end it, whole records fill it
        end = b"\0" * (-(size + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK)
        digest.update(end)
        file.write(end)
    return size + len(end), digest.hexdigest()


def suffix(image: bytes) -> str:
    """The file name suffix of an encoded image, by its first bytes; `img` where they say nothing."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp":
        return "avif"
    return next((name for signature, name in SIGNATURES if image.startswith(signature)), "img")


def next_images(tar: IO[bytes], lengths: NDArray[np.int64], sums: NDArray[np.uint32]) -> list[bytes]:
    """The next n images of a tar that is read from front to back, of these lengths and CRC-32s, (n,).

    Raises:
        OSError: they are not what was written.
    """
    whole = BLOCK + -(-lengths // BLOCK) * BLOCK  # bytes of a member
    begins = (np.cumsum(whole) - whole + BLOCK).tolist()  # of contents
    data = tar.read(int(whole.sum()))
    images = []
    for number, (begin, length, wanted) in enumerate(zip(begins, lengths.tolist(), sums.tolist(), strict=True)):
        image = data[begin : begin + length]
        if len(image) != length or zlib.crc32(image) != wanted:
            raise OSError(f"image {number} of {len(lengths)} after byte {tar.tell() - len(data):,} was changed")
        images.append(image)
    return images
