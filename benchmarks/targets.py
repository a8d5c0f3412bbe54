"""The store of distributions against what others write: bytes per row, rows written and read per second.

    python -m benchmarks.targets          (about three minutes)

Distributions are those of a confident teacher with a long tail. Every reader ends at float32 rows that sum to 1
and every writer at a closed file; files are read from the page cache, by one process with the threads that it
starts itself. Rounds are interleaved, figures are medians.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from numpy.typing import NDArray

from benchmarks.record import write_table
from pipeline.storage.tables import fixed_binary
from pipeline.targets import TargetsStore
from pipeline.targets.files import labelled_schema, pool_schema, write_pool_file, write_targets
from pipeline.targets.manifest import Origin, write_manifest
from pipeline.targets.store import normalised

Rows = NDArray[np.float16]
SHARD_ROWS = 20_000


class Pool:
    """Rows to store: distributions (n, C), and a place in a pool for each.

    Attributes:
        q: (n, C).
        shard, row, best: of each row, (n,).
        tables: training shards as precompute has them; their images are empty.
    """

    def __init__(self, q: Rows, seed: int) -> None:
        random = np.random.RandomState(seed)
        self.q, self.best = q, q.argmax(axis=1).astype(np.int32)
        self.shard, self.row = random.randint(0, 512, len(q)), random.randint(0, 200_000, len(q))
        self.tables = [self._table(slice(i, i + SHARD_ROWS)) for i in range(0, len(q), SHARD_ROWS)]

    def _table(self, part: slice) -> pa.Table:
        shard, row, best = self.shard[part], self.row[part], self.best[part]
        count, schema = len(row), pool_schema(self.q.shape[1], "float16")
        columns = {
            "key": pa.array([f"pool-{s:05d}-{r}" for s, r in zip(shard, row, strict=True)]),
            "shard": pa.array([f"pool-{s:05d}" for s in shard]),
            "row": row,
            "image": pa.array([b""] * count, pa.large_binary()),
            "distribution": fixed_binary(self.q[part]),
            "classes": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), best),
            "repeat": np.ones(count, np.int64),
        }
        return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def teacher(rows: int, classes: int, seed: int = 0) -> Rows:
    """Softmax of logits with one high class; the median of the largest probability is above 0.999."""
    random = np.random.RandomState(seed)
    mixing, result = random.randn(64, classes).astype(np.float32), np.empty((rows, classes), np.float16)
    for begin in range(0, rows, 10_000):
        count = min(10_000, rows - begin)
        z = random.randn(count, 64).astype(np.float32) @ mixing / 4
        z[np.arange(count), random.randint(0, classes, count)] += random.gamma(4, 2.5, count) + np.log(classes)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        result[begin : begin + count] = p / p.sum(axis=1, keepdims=True)
    return result


# What each contender writes to a folder, and how it reads it back to float32 rows that sum to 1.


def write_store(folder: Path, pool: Pool) -> None:
    """All of a row but the image: key, shard, row, distribution, classes, repeat."""
    for number, table in enumerate(pool.tables):
        write_pool_file(folder, number, table, "f")
    none = pa.table({name: [] for name in ("key", "shard", "row", "label", "distribution")})
    write_targets(folder / "labelled-00000.parquet", none.cast(labelled_schema(pool.q.shape[1], "float16")), "f")
    names = [str(c) for c in range(pool.q.shape[1])]
    write_manifest(folder, Origin("f", "t", names, "float16", {}), {})


def read_store(folder: Path, pool: Pool) -> NDArray[np.float32]:
    return TargetsStore.open(folder, verify=False).distributions()


def write_column(folder: Path, pool: Pool) -> None:
    """The distribution alone, to compare with formats that hold no more."""
    for number, table in enumerate(pool.tables):
        write_targets(folder / f"pool-{number:05d}.parquet", table.select(["distribution"]), "f")


def nested(kind: str) -> tuple[Callable[[Path, Pool], None], Callable[[Path, Pool], NDArray[np.float32]]]:
    """pa.list_ or pa.list_(…, C) of float16, zstd as the store has it."""

    def write(folder: Path, pool: Pool) -> None:
        for number, begin in enumerate(range(0, len(pool.q), SHARD_ROWS)):
            part = pool.q[begin : begin + SHARD_ROWS]
            flat = pa.array(part.reshape(-1))
            if kind == "list":
                ends = np.arange(0, part.size + 1, part.shape[1], dtype=np.int32)
                column = pa.ListArray.from_arrays(ends, flat)
            else:
                column = pa.FixedSizeListArray.from_arrays(flat, part.shape[1])
            path = folder / f"part-{number:05d}.parquet"
            pq.write_table(pa.table({"distribution": column}), path, compression="zstd", compression_level=1)

    def read(folder: Path, pool: Pool) -> NDArray[np.float32]:
        parts = []
        for path in sorted(folder.glob("*.parquet")):
            column = pq.read_table(path).column(0).combine_chunks()
            parts.append(normalised(column.flatten().to_numpy().reshape(-1, pool.q.shape[1])))
        return np.concatenate(parts)

    return write, read


def write_tar(folder: Path, pool: Pool, *, more: bool = False) -> None:
    """WebDataset: one .npy a row; `more` adds the row's other columns as .json."""
    with wds.TarWriter(str(folder / "rows.tar")) as tar:
        for i, q in enumerate(pool.q):
            sample: dict[str, Any] = {"__key__": f"{i:09d}", "npy": q}
            if more:
                place = {"shard": f"pool-{pool.shard[i]:05d}", "row": int(pool.row[i])}
                sample["json"] = place | {"classes": [int(pool.best[i])], "repeat": 1}
            tar.write(sample)


def read_tar(folder: Path, pool: Pool) -> NDArray[np.float32]:
    samples = wds.WebDataset(str(folder / "rows.tar"), shardshuffle=False).decode()
    return normalised(np.stack([sample["npy"] for sample in samples]))


def write_files(folder: Path, pool: Pool) -> None:
    for i, q in enumerate(pool.q):
        torch.save(torch.from_numpy(q), folder / f"{i:09d}.pt")


def read_files(folder: Path, pool: Pool) -> NDArray[np.float32]:
    paths = sorted(folder.glob("*.pt"))
    return normalised(np.stack([torch.load(path, weights_only=True).numpy() for path in paths]))


def contenders() -> dict[str, tuple[Callable[[Path, Pool], None], Any, int]]:
    """Name → (write, read or None, rows are divided by)."""
    return {
        "this store, all columns but the image": (write_store, read_store, 1),
        "this store, the distribution alone": (write_column, None, 1),
        "Parquet, list of float16": (*nested("list"), 1),
        "Parquet, fixed-size list of float16": (*nested("fixed"), 1),
        "WebDataset, .npy": (write_tar, read_tar, 20),
        "WebDataset, .npy and .json": (lambda f, p: write_tar(f, p, more=True), read_tar, 20),
        "torch.save, a file each": (write_files, read_files, 50),
    }


def measure(folder: Path, q: Rows, rounds: int) -> list[list[object]]:
    """One line of the table for each contender."""
    pools = {fewer: Pool(q[: len(q) // fewer], 0) for _, _, fewer in contenders().values()}
    figures: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders()}
    for _ in range(rounds):
        for name, (write, read, fewer) in contenders().items():
            pool, place = pools[fewer], folder / "contender"
            place.mkdir()
            written, _ = seconds(write, place, pool)
            size = sum(path.stat().st_size for path in place.iterdir() if path.name != "_manifest.json")
            took = used = float("nan")
            if read is not None:
                assert np.array_equal(read(place, pool), normalised(pool.q)), name  # and the memory is warm
                took, used = sorted(seconds(read, place, pool) for _ in range(3 if fewer == 1 else 1))[fewer == 1]
            shutil.rmtree(place)
            count = len(pool.q)
            figures[name].append((size / count, count / written, count / took, count / used))
    lines: list[list[object]] = []
    for name, rounds_taken in figures.items():
        size, *rates = (statistics.median(values) for values in zip(*rounds_taken, strict=True))
        rows = len(pools[contenders()[name][2]].q)
        shown = ["" if np.isnan(rate) else f"{rate / 1e6:.4f}" for rate in rates]
        lines.append([q.shape[1], name, f"{rows:,}", f"{size:,.1f}", *shown])
    return lines


def seconds(work: Callable[[Path, Pool], object], folder: Path, pool: Pool) -> tuple[float, float]:
    """On the clock, and of the processor in all threads."""
    began, used = time.perf_counter(), time.process_time()
    work(folder, pool)
    return time.perf_counter() - began, time.process_time() - used


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default='{"10": 1000000, "1000": 60000}', help="JSON: rows by number of classes")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for classes, rows in json.loads(arguments.rows).items():
            lines += measure(Path(folder), teacher(rows, int(classes)), arguments.rounds)
    write_table(
        "targets",
        ["C", "format", "rows", "bytes/row", "M rows/s written", "M rows/s read", "M rows read per processor second"],
        lines,
        f"python -m benchmarks.targets --rounds {arguments.rounds}",
        "float16; medians. The store's writing includes its checksums and manifest; slow formats had fewer rows.",
    )


if __name__ == "__main__":
    main()
