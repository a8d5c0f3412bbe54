"""Decoded images, in memory and in a file that others share."""

import errno
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data import decoded
from pipeline.data.decode import Status
from pipeline.data.decoded import Images, load_images
from pipeline.data.readers.shard import Sample
from pipeline.errors import DataError, RunError
from tests.data.made_images import encode, noise

SIZE = 6
IMAGE = 3 * SIZE**2  # bytes


def entries(count: int, bad: tuple[int, ...] = ()) -> list[tuple[str, Sample]]:
    return [
        (
            f"shard-{i // 100}",
            Sample(i % 100, f"key{i}", b"junk" if i in bad else encode(noise(SIZE, i)), i % 3),
        )
        for i in range(count)
    ]


def never() -> Iterator[tuple[str, Sample]]:
    raise AssertionError("read again")
    yield


def check(images: Images, count: int, bad: tuple[int, ...]) -> None:
    good = [i for i in range(count) if i not in bad]
    expected = np.stack([noise(SIZE, i).transpose(2, 0, 1) for i in good])
    assert images.images.dtype == torch.uint8
    np.testing.assert_array_equal(images.images.numpy(), expected)
    assert images.labels.tolist() == [i % 3 for i in good]
    assert images.labels.dtype == torch.int64
    assert images.keys == [f"key{i}" for i in good]
    assert len(images) == len(good)
    assert images.shards == [f"shard-{i // 100}" for i in good]
    assert images.rows.tolist() == [i % 100 for i in good]
    assert [(one.shard, one.row, one.key, one.status) for one in images.skipped] == [
        (f"shard-{i // 100}", i % 100, f"key{i}", Status.decode_error) for i in bad
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1 << 40, 10_000, 0])
def test_pixels_order_and_identity(tmp_path: Path, workers: int, limit: int) -> None:
    """In memory, written to the file half way, and from the start: the same, and at once when it is there."""
    bad = (0, 255, 256, 700)
    place = tmp_path / "decoded/pool"
    check(load_images(entries(701, bad), SIZE, place=place, memory_limit=limit, workers=workers), 701, bad)
    assert (tmp_path / "decoded/pool.pixels").exists() == (limit < 1 << 40)
    if limit < 1 << 40:
        check(load_images(never(), SIZE, place=place, memory_limit=limit), 701, bad)


def decode_beside_others(
    place: Path, start: "multiprocessing.synchronize.Barrier", wrote: "multiprocessing.Queue"
) -> None:
    begin = decoded.remove_leftovers
    written = []
    decoded.remove_leftovers = lambda folder: written.append(1) or begin(folder)
    start.wait()
    check(load_images(entries(300, (7,)), SIZE, place=place, memory_limit=20 * IMAGE), 300, (7,))
    wrote.put(len(written))


def test_of_several_processes_one_writes_and_all_map(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    start, wrote = context.Barrier(3), context.Queue()
    processes = [context.Process(target=decode_beside_others, args=(tmp_path / "pool", start, wrote)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    assert sum(wrote.get() for _ in processes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "pool.parquet", "pool.pixels"]


@pytest.mark.parametrize("damage", ["killed before the index", "cut short", "a bit", "index cut", "index damaged"])
def test_what_is_not_complete_is_made_again(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "pool"
    load_images(entries(20), SIZE, place=place, memory_limit=0)
    pixels, index = tmp_path / "pool.pixels", tmp_path / "pool.parquet"
    if damage == "killed before the index":
        index.unlink()
        (tmp_path / ".pool.pixels.abc.mpl.tmp").write_bytes(b"part")
    elif damage == "cut short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "a bit":
        data = bytearray(pixels.read_bytes())
        data[len(data) // 2] ^= 1
        pixels.write_bytes(data)
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:-9])
    else:
        whole = index.read_bytes()
        index.write_bytes(whole[: len(whole) // 3] + bytes(len(whole) - len(whole) // 3 - 12) + whole[-12:])
    check(load_images(entries(20), SIZE, place=place, memory_limit=0), 20, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "pool.parquet", "pool.pixels"]


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 4 TB, which is not read here: what a private writable mapping is refused for."""
    monkeypatch.setattr(decoded, "_digest", lambda path: "that of the index")
    size, n = 100_000, 134
    with (tmp_path / "pool.pixels").open("wb") as file:
        file.truncate(n * 3 * size**2)
    text, number = ["x"] * n, list(range(n))
    columns = {"shard": text, "row": number, "key": text, "label": number, "status": ["ok"] * n, "detail": text}
    index = pa.table(columns).replace_schema_metadata({decoded.SHA256: "that of the index"})
    pq.write_table(index, tmp_path / "pool.parquet")
    images = load_images(never(), size, place=tmp_path / "pool")
    assert images.images.shape == (n, 3, size, size)
    assert int(images.images[-1, -1, -1, -1]) == 0


def test_a_repeated_key_confuses_nothing() -> None:
    samples = [("a", Sample(i, "same", encode(noise(SIZE, i)), 0)) for i in range(3)]
    images = load_images(samples, SIZE)
    assert images.keys == ["same"] * 3
    assert images.rows.tolist() == [0, 1, 2]


def test_nothing_decoded() -> None:
    with pytest.raises(DataError, match=r"no image could be decoded, of 2 entries; the first: key0: not an image"):
        load_images(entries(2, (0, 1)), SIZE)
    with pytest.raises(DataError, match="of 0 entries"):
        load_images([], SIZE)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(**options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.storage.files.tempfile.mkstemp", no_space)
    with pytest.raises(RunError, match=r"cannot write .*pool\.pixels: No space left on device"):
        load_images(entries(9), SIZE, place=tmp_path / "pool", memory_limit=0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
