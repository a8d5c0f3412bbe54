"""A million answers in a thousand classes: rows a second of the import, and its memory.

    python -m benchmarks.predictions [--rows 1000000] [--classes 1000]

The pool is a folder of names alone, which are what is joined; the images are not read. Memory is what the import itself
takes (anonymous pages): of the file, which is mapped, the system keeps in memory what it has room for.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.answers.importing import Predictions, import_predictions
from pipeline.answers.reading import find_predictions
from pipeline.data.readers.shard import Sample, Shard

SHARD = 20_000


@dataclass(frozen=True)
class Names(Shard):
    """Keys without images."""

    name: str
    first: int
    count: int

    def rows(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        return f"{self.first} {self.count}"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        raise NotImplementedError

    def identities(self) -> Iterator[tuple[int, str]]:
        return ((row, f"photos/{self.first + row:09d}.jpg") for row in range(self.count))


def write(path: Path, rows: int, classes: int, shuffled: bool) -> None:
    """Probabilities in float32, as a model's program writes them."""
    draw = np.random.default_rng(0)
    order = draw.permutation(rows) if shuffled else np.arange(rows)
    schema = pa.schema([("key", pa.string()), ("probabilities", pa.list_(pa.float32(), classes))])
    schema = schema.with_metadata({"class_names": json.dumps([f"class {c}" for c in range(classes)])})
    block = draw.dirichlet(np.ones(classes), 4096).astype(np.float32)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for begin in range(0, rows, 4096):
            keys = [f"photos/{row:09d}.jpg" for row in order[begin : begin + 4096]]
            values = pa.FixedSizeListArray.from_arrays(pa.array(block[: len(keys)].ravel()), classes)
            writer.write_table(pa.table([pa.array(keys), values], schema=schema))


class PeakMemory:
    """The most anonymous memory of this process while it is entered, beyond what it had then; GiB."""

    def __enter__(self) -> "PeakMemory":
        self.before, self.most, self._end = anonymous_gib(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, anonymous_gib() - self.before)


def anonymous_gib() -> float:
    """Of this process, now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    arguments = parser.parse_args()
    names = tuple(f"class {c}" for c in range(arguments.classes))
    shards = [
        Names(f"pool-{begin // SHARD:05d}", begin, min(SHARD, arguments.rows - begin))
        for begin in range(0, arguments.rows, SHARD)
    ]
    folder = Path(tempfile.mkdtemp())
    try:
        for shuffled in (False, True):
            write(folder / "answers.parquet", arguments.rows, arguments.classes, shuffled)
            began = time.perf_counter()
            sum(part.num_rows for _, part in find_predictions(str(folder / "answers.parquet"))[0].parts())
            bare = time.perf_counter() - began
            predictions = Predictions((tuple(find_predictions(str(folder / "answers.parquet"))),), None, None, names)
            began = time.perf_counter()
            with PeakMemory() as memory:
                found = import_predictions(
                    folder / "answers", folder / "spill", predictions, {"unlabelled": shards}, str(shuffled)
                )
            seconds = time.perf_counter() - began
            assert found["answered"]["unlabelled"] == arguments.rows
            order = "in any order" if shuffled else "in the pool's order"
            print(
                f"{arguments.rows:,} answers in {arguments.classes:,} classes, {order}: {seconds:.1f} s, "
                f"{arguments.rows / seconds / 1e6:.3f} M rows/s ({seconds / bare:.1f} times bare reading), "
                f"peak memory {memory.most:.2f} GiB",
                flush=True,
            )
            shutil.rmtree(folder / "answers")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
