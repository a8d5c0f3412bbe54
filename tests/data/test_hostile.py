"""Input made to fill the memory or to be taken for something else: refused in words, with little memory.

Broken and cut tars are in test_tar, images that are bombs in test_decode, archives to unpack in test_fetch.
"""

import gzip
import io
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.manifest import load_manifest
from pipeline.data.readers import parquet, tar
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.readers.webdataset import TarShard
from pipeline.data.sources import open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise, write_parquet

IMAGE = encode(noise(4))


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Python's own memory; pyarrow's is asserted where it matters."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, peak


def header(name: str, size: int, kind: bytes = b"0", form: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(form)


def gigabytes(name: str, count: int, kind: bytes = b"0") -> bytes:
    """A .tar.gz of a few MB whose one member has so many GB of zeros."""
    zeros = gzip.compress(bytes(64 << 20), 1)
    return gzip.compress(header(name, count << 30, kind)) + zeros * (16 * count) + gzip.compress(bytes(1024))


@pytest.mark.parametrize("name", ["x.png", "x.cls", "x.json", "README"])
def test_a_gzip_bomb(tmp_path: Path, name: str) -> None:
    """Refused by its header, whether or not its content was wanted."""
    path = tmp_path / "shard.tar.gz"
    path.write_bytes(gigabytes(name, 2))
    assert path.stat().st_size < 20 << 20
    for act in (lambda: list(TarShard("a", path, ()).read()), TarShard("a", path).rows):
        with (
            at_most(8 << 20),
            pytest.raises(DataError, match=r"has 2,147,483,648 bytes when unpacked, and 268,435,456"),
        ):
            act()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_bomb_in_an_extension(tmp_path: Path, kind: bytes) -> None:
    """A long name or pax records of gigabytes."""
    path = tmp_path / "shard.tar.gz"
    path.write_bytes(gigabytes("@LongLink", 2, kind))
    with at_most(8 << 20), pytest.raises(DataError, match=r"a header of 2,147,483,648 bytes, and 1,048,576"):
        list(TarShard("a", path).read())


def test_a_size_in_a_pax_record(tmp_path: Path) -> None:
    """The size that counts is the record's, not the header's."""
    record = b"18 size=999999999\n"
    assert int(record.split()[0]) == len(record)
    path = tmp_path / "shard.tar"
    path.write_bytes(header("x", len(record), b"x") + record.ljust(512, b"\0") + header("x.png", 0) + bytes(1024))
    with pytest.raises(DataError, match=r"x\.png has 999,999,999 bytes when unpacked"):
        list(TarShard("a", path).read())


@pytest.mark.parametrize(
    "record", [b"999 path=x\n", b"8 path=x\n", b"x path=x\n", b"12 path=abcX", b"11 pathabc\n", b"1\n"]
)
def test_damaged_pax_records(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(header("x", len(record), b"x") + record.ljust(512, b"\0") + header("x.png", 0) + bytes(1024))
    with pytest.raises(DataError, match="a pax header is damaged"):
        list(TarShard("a", path).read())


@pytest.mark.parametrize("path_record", [b"17 path=../evil.p\n", b"18 path=/etc/x.png\n"])
def test_a_name_in_a_pax_record_is_checked(tmp_path: Path, path_record: bytes) -> None:
    record = b"%d%s" % (len(path_record), path_record[2:])
    path = tmp_path / "shard.tar"
    path.write_bytes(header("x", len(record), b"x") + record.ljust(512, b"\0") + header("x.png", 0) + bytes(1024))
    with pytest.raises(DataError, match="points outside the archive"):
        list(TarShard("a", path).read())


def test_many_pax_records_are_read_in_one_pass(tmp_path: Path) -> None:
    """A mebibyte of them, each copied once per record before, was 45 seconds; what is counted is copies."""
    record = b"9 a=bcde\n" * 100_000

    class Counted(bytes):
        cut = 0

        def __getitem__(self, place):  # type: ignore[override]
            part = super().__getitem__(place)
            Counted.cut += len(part)
            return part

        def rstrip(self, *what):  # type: ignore[override]
            return Counted(super().rstrip(*what))

    assert tar._pax_records(Counted(record + bytes(100))) == {"a": "bcde"}
    assert Counted.cut < 4 * len(record)
    for text in (b"9" * 5_000 + b" a=b\n", b"\xb2 a=b\n", b" a=b\n", b"3 a\n"):
        with pytest.raises(tarfile.ReadError, match="pax"):
            tar._pax_records(text)


def test_sparse_files(tmp_path: Path) -> None:
    """A few blocks that stand for terabytes: GNU's old form, and pax."""
    path = tmp_path / "shard.tar"
    path.write_bytes(header("x.png", 0, b"S") + bytes(1024))
    with pytest.raises(DataError, match="is a sparse file"):
        list(TarShard("a", path).read())
    record = b"22 GNU.sparse.major=1\n"
    path.write_bytes(header("x", len(record), b"x") + record.ljust(512, b"\0") + header("x.png", 0) + bytes(1024))
    with pytest.raises(DataError, match="is a sparse file"):
        list(TarShard("a", path).read())


@pytest.mark.parametrize("name", ["x.png", "x.json"])
def test_ten_gigabytes_in_a_plain_tar(tmp_path: Path, name: str) -> None:
    path = tmp_path / "shard.tar"
    with path.open("wb") as file:
        file.write(header("a.png", 3) + b"abc".ljust(512, b"\0") + header(name, 10 << 30))
        file.truncate((10 << 30) + 4096)  # a hole
    samples = TarShard("a", path).read()
    if name == "x.png":
        with at_most(4 << 20), pytest.raises(DataError, match=r"x\.png has 10,737,418,240 bytes"):
            list(samples)
    else:
        with at_most(4 << 20), pytest.raises(DataError, match=r"x\.json has 10,737,418,240 bytes"):
            list(samples)


def test_an_endless_tail_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another archive may follow the end, but a gigabyte of zeros is not inflated to see."""
    path = tmp_path / "shard.tar.gz"
    zeros = gzip.compress(bytes(64 << 20), 1)
    path.write_bytes(gzip.compress(header("x.png", 0) + bytes(1024)) + zeros * 16)
    read = []
    original = gzip.GzipFile.readinto
    monkeypatch.setattr(gzip.GzipFile, "readinto", lambda file, b: read.append(n := original(file, b)) or n)
    with pytest.raises(DataError, match="more than 16,777,216 bytes of zeros follow its end"):
        list(TarShard("a", path).read())
    assert sum(read) < 20 << 20


def test_the_checksum_of_a_gzip_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar.gz"
    data = np.random.RandomState(0).bytes((2 << 20) - 1536)  # the archive's end is a buffer's: no read went beyond
    content = bytearray(gzip.compress(header("x.png", len(data)) + data + bytes(1024)))
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read to its end.*CRC"):
        list(TarShard("a", path).read())


def test_random_bytes_never_crash(tmp_path: Path) -> None:
    """A header with a right checksum and any content: a sample or a DataError, nothing else."""
    random = np.random.RandomState(0)
    outcomes = set()
    for _ in range(300):
        block = bytearray(header("x.png", 7))
        for place in random.randint(0, 512, random.randint(1, 6)):
            block[place] = random.randint(256)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        path = tmp_path / "shard.tar"
        path.write_bytes(bytes(block) + bytes(512) * 4)
        try:
            outcomes.add(len(list(TarShard("a", path, ()).read())))
        except DataError:
            outcomes.add(-1)
    assert {-1, 1} <= outcomes <= {-1, 0, 1}


# Parquet


def test_one_value_that_stands_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows of one image of 4 MB: a file of a few KB, and 0.8 GB if read in one piece."""
    value = bytes(4 << 20)
    table = pa.table({"image": pa.DictionaryArray.from_arrays(np.zeros(200, np.int32), [value])})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=8 << 20)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(parquet, "BATCH_BYTES", 64 << 20)
    sizes = []
    original = ParquetShard._samples

    def counted(shard: ParquetShard, batch: pa.RecordBatch, first: int) -> Iterator[object]:
        sizes.append(batch.nbytes)
        return original(shard, batch, first)

    monkeypatch.setattr(ParquetShard, "_samples", counted)
    assert sum(1 for _ in ParquetShard("a", path, label=None).read()) == 200
    assert max(sizes) <= 65 << 20


def test_parquet_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [IMAGE] * 5 + [bytes(100_000)])
    monkeypatch.setattr(parquet, "VALUE_LIMIT", 99_999)
    with pytest.raises(DataError, match="row 5 has 100,000 bytes, and 99,999 are the limit for one image"):
        list(ParquetShard("a", path, label=None).read())
    monkeypatch.setattr(parquet, "GROUP_LIMIT", 50_000)
    with pytest.raises(
        DataError, match=r"row group 1 has 100,\d+ bytes of images when unpacked, from [\d,]+, and 50,000"
    ):
        list(ParquetShard("a", path, label=None).read())


def test_a_row_group_that_unpacks_to_hundreds_of_times_its_size(tmp_path: Path, monkeypatch) -> None:
    """Pages are unpacked whole, so it is refused by its footer; images do not compress, and honest files pass."""
    monkeypatch.setattr(parquet, "UNPACKED", 1 << 20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes(1 << 20)] * 4}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"row group 0 has 4,\d+,\d+ bytes of .*, 200 from each"):
        list(ParquetShard("a", path, label=None).read())
    honest = np.random.RandomState(0).bytes(1 << 20)
    pq.write_table(pa.table({"image": [honest] * 4}), path, compression="zstd", use_dictionary=False)
    assert sum(1 for _ in ParquetShard("a", path, label=None).read()) == 4


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"glob": ""}, "names no file"),
        ({"glob": "a**b"}, "stands between slashes"),
        ({"glob": "x\0y"}, "names no file"),
        ({"path": ""}, "names no file"),
        ({"path": "x" * 5000}, "cannot be looked up"),
        ({"glob": "x" * 5000}, "there is nothing of that name|cannot be looked up"),
    ],
)
def test_names_that_are_none(data_set: Callable[..., Path], place: dict, words: str) -> None:
    path = data_set(files={"train": place | {"reader": "parquet"}}, splits={"unlabelled": {"from": "train"}})

    def opened() -> object:
        return open_split(load_manifest(path), "unlabelled")

    with pytest.raises(DataError, match=words):
        opened()


def test_zero_rows(data_set: Callable[..., Path]) -> None:
    """A file without rows among others is passed over; alone it is an empty split."""
    path = data_set(
        files={"train": {"glob": "*.parquet", "reader": "parquet"}}, splits={"unlabelled": {"from": "train"}}
    )
    write_parquet(path.parent / "a.parquet", [])
    with pytest.raises(DataError, match="the unlabelled split of mine is empty"):
        open_split(load_manifest(path), "unlabelled")
    write_parquet(path.parent / "b.parquet", [IMAGE])
    assert [(shard, sample.row) for shard, sample in open_split(load_manifest(path), "unlabelled").read()] == [("b", 0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [IMAGE]}, "has no column 'image'; it has picture"),
        ({"image": ["text"]}, "column 'image' is string; images are binary or struct<bytes, path>"),
        ({"image": [[1, 2]]}, r"column 'image' is list<"),
        ({"image": [{"url": "x"}]}, r"column 'image' is struct<url: string>"),
        ({"image": [{"bytes": "text"}]}, "image' is struct<bytes: string>"),
        ({"image": [{"bytes": IMAGE, "path": 3}]}, "image' is struct<bytes: binary, path: int64>"),
    ],
)
def test_a_wrong_schema(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        list(ParquetShard("a", tmp_path / "a.parquet", label=None).read())


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    for shard in (ParquetShard("a", tmp_path / "a.parquet"), TarShard("a", tmp_path / "a.tar")):
        for act in (lambda shard=shard: list(shard.read()), shard.rows, shard.fingerprint):
            with pytest.raises(DataError, match="there is no such file"):
                act()


def test_a_parquet_file_overwritten_anywhere(tmp_path: Path) -> None:
    """Either the right rows or one DataError; no other exception."""
    path = write_parquet(tmp_path / "a.parquet", [noise(5, i).tobytes() for i in range(12)], list(range(12)))
    content, random = path.read_bytes(), np.random.RandomState(0)
    failed = 0
    for _ in range(150):
        changed = bytearray(content)
        place = random.randint(4, len(content) - 8)
        changed[place : place + 8] = random.bytes(8)
        path.write_bytes(changed)
        try:
            list(ParquetShard("a", path).read())
        except DataError:
            failed += 1
    assert failed > 20


def test_the_buffer_is_not_the_limit() -> None:
    """A member longer than the buffer and shorter than the limit is read whole."""
    data = np.random.RandomState(0).bytes((3 << 20) + 5)
    archive = header("x.png", len(data)) + data + bytes(-len(data) % 512) + header("y.png", 1) + b"y".ljust(512, b"\0")
    reader = tar.TarReader(io.BytesIO(archive + bytes(512)), "a")
    assert reader.next() == "x.png"
    assert reader.read() == data
    assert reader.next() == "y.png"
    assert b"".join(reader.chunks()) == b"y"
    assert reader.next() is None
