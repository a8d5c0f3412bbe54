"""Training shards: a Parquet file with the images in it, or a tar of images with a Parquet sidecar.

A tar is written first and its sidecar, which states the tar's bytes and SHA-256, last: a shard is done
when its Parquet file is.
"""

import zlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.storage.files import Location, opened
from pipeline.storage.tables import open_parquet
from pipeline.targets.layout import PoolFormat, sidecar_schema
from pipeline.targets.tables import file_is_done, notes_of, write_targets
from pipeline.targets.tar import TarReader, write_tar

IN_TAR = ("bytes", "crc32")


def pool_path(folder: Location, number: int) -> Location:
    """The Parquet file of a training shard."""
    return folder / f"pool-{number:05d}.parquet"


def write_pool_file(folder: Location, number: int, table: pa.Table, format: PoolFormat = "parquet") -> None:
    """Write training shard `number`, whole or not at all.

    Args:
        folder: targets/.
        number: of the shard, from 0.
        table: of `pool_schema`, images included, in the order in which they are to lie.
        format: webdataset writes pool-00000.tar with the images, and pool-00000.parquet without them.
    """
    path = pool_path(folder, number)
    if format == "parquet":
        write_targets(path, table)
        return
    sums: list[int] = []
    size, digest = write_tar(path.with_suffix(".tar"), f"{number:05d}", _summed(table.column("image"), sums))
    lengths = pc.binary_length(table.column("image"))
    columns = {"bytes": lengths, "crc32": pa.array(sums, pa.uint32())}
    schema = sidecar_schema(table.schema)
    beside = pa.table(
        [columns[name] if name in columns else table.column(name) for name in schema.names], schema=schema
    )
    write_targets(path, beside, {"tar.bytes": str(size), "tar.sha256": digest})


def pool_file_is_done(folder: Location, number: int, fingerprint: str, format: PoolFormat = "parquet") -> bool:
    """Whether training shard `number` is whole, in this format and of this fingerprint."""
    return _is_done(pool_path(folder, number), fingerprint, format)


def remove_foreign(folder: Location, fingerprint: str, format: PoolFormat = "parquet") -> None:
    """Remove files of another selection, of other settings or not finished: they would be counted into the store."""
    for path in folder.glob("labelled-*.parquet"):
        if not file_is_done(path, fingerprint):
            path.unlink()
    for path in folder.glob("pool-*.parquet"):
        if not _is_done(path, fingerprint, format):
            path.unlink()
    for path in folder.glob("pool-*.tar"):
        if format != "webdataset" or not path.with_suffix(".parquet").is_file():
            path.unlink()


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
        OSError, pa.ArrowInvalid: the file is missing or damaged.
    """
    if not tar or "image" not in columns:
        with open_parquet(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=batch, columns=list(columns))
        return
    beside = [name for name in columns if name != "image"] + list(IN_TAR)
    with (
        open_parquet(path, page_checksum_verification=True) as file,
        opened(path.with_suffix(".tar")) as images,
    ):
        reader = TarReader(images)
        for part in file.iter_batches(batch_size=batch, columns=beside):
            found = reader.next(*(part.column(name).to_numpy() for name in IN_TAR))
            whole = part.append_column("image", pa.array(found, pa.large_binary()))
            yield whole.select(list(columns))


def _is_done(path: Location, fingerprint: str, format: PoolFormat) -> bool:
    notes = notes_of(path)
    if notes is None or notes.get("fingerprint") != fingerprint or ("tar.bytes" in notes) != (format == "webdataset"):
        return False
    if format == "parquet":
        return True
    try:
        return bool(path.with_suffix(".tar").stat().st_size == int(notes["tar.bytes"]))
    except OSError:
        return False


def _summed(images: pa.ChunkedArray, sums: list[int]) -> Iterator[bytes]:
    """The images one by one; their CRC-32s are appended to `sums`."""
    for chunk in images.chunks:
        for value in chunk:
            image = value.as_py()
            sums.append(zlib.crc32(image))
            yield image
