"""Images per second that reach a training step: in memory, streamed from both formats, and plain webdataset.

    python -m benchmarks.loader           (about four minutes)

Made JPEGs of about 0.9 kB at 32 pixels (as CIFAR-10's) and 20 kB at 224; pixels leave as uint8 (B, 3, S, S), with
their distributions but for plain webdataset, which decodes with Pillow, too, reads no distributions and does not
shuffle. The clock starts with the second batch. Rounds are interleaved, figures are medians.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from benchmarks.record import write_table
from pipeline.data.decoded import load_images
from pipeline.data.sets import PoolSet
from pipeline.storage.tables import fixed_binary
from pipeline.targets import TargetsStore
from pipeline.targets.files import labelled_schema, pool_schema, write_pool_file, write_targets
from pipeline.targets.manifest import Origin, write_manifest
from pipeline.targets.stream import StreamedPool

CLASSES = 10
FILES = 4
KINDS = {32: (20_000, 128, 90), 224: (1_600, 32, 85)}  # side: images, batch, JPEG quality
WORKERS = (0, 1, 2)


def made_jpegs(side: int, count: int, quality: int) -> list[bytes]:
    """Smooth colours under fine grain, 256 different ones."""
    random, files = np.random.RandomState(side), []
    for _ in range(min(count, 256)):
        coarse = random.randint(0, 256, (max(4, side // 16),) * 2 + (3,)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        grain = random.normal(0, 4, (side, side, 1))
        buffer = io.BytesIO()
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        files.append(buffer.getvalue())
    return [files[i % len(files)] for i in range(count)]


def write_store(folder: Path, images: list[bytes], format: str) -> TargetsStore:
    """A finished store of these images."""
    rows = len(images) // FILES
    q = np.random.RandomState(0).dirichlet(np.full(CLASSES, 0.1), rows).astype(np.float16)
    schema = pool_schema(CLASSES, "float16")
    for number in range(FILES):
        table = pa.table(
            {
                "key": [f"pool-{number:05d}-{i}" for i in range(rows)],
                "shard": [f"pool-{number:05d}"] * rows,
                "row": np.arange(rows),
                "image": pa.array(images[number * rows : (number + 1) * rows], pa.large_binary()),
                "distribution": fixed_binary(q),
                "classes": pa.array([[0]] * rows, pa.list_(pa.int32())),
                "repeat": np.ones(rows, np.int64),
            }
        )
        write_pool_file(folder, number, table.cast(schema), "f", format)  # type: ignore[arg-type]
    none = pa.table({name: [] for name in ("key", "shard", "row", "label", "distribution")})
    write_targets(folder / "labelled-00000.parquet", none.cast(labelled_schema(CLASSES, "float16")), "f")
    names = [str(c) for c in range(CLASSES)]
    write_manifest(folder, Origin("f", "t", names, "float16", {}), {})
    return TargetsStore.open(folder)


def from_memory(pool: PoolSet, batch: int) -> Iterator[Tensor]:
    """An epoch of batches."""
    for step in range(len(pool) // batch):
        yield pool.draw(0, step, batch)[0]


def streamed(store: TargetsStore, side: int, batch: int, workers: int) -> Iterator[Tensor]:
    with StreamedPool(store, side, workers=workers) as pool:
        for step in range(len(pool) // batch):
            yield pool.draw(0, step, batch)[0]


def plain(folder: Path, batch: int, workers: int) -> Iterator[Tensor]:
    """The webdataset library with Pillow, on the very tars."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg").batched(batch)
    for (images,) in wds.WebLoader(data, num_workers=workers, batch_size=None):
        yield torch.as_tensor(np.asarray(images)).permute(0, 3, 1, 2)


def contenders(side: int, folder: Path) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Name → an epoch of batches."""
    count, batch, quality = KINDS[side]
    images = made_jpegs(side, count, quality)
    stores = {format: write_store(folder / format, images, format) for format in ("parquet", "webdataset")}
    store = stores["parquet"]
    decoded = load_images(store.samples(), side).images
    pool = PoolSet(decoded, torch.from_numpy(store.repeats()), torch.from_numpy(store.distributions()))
    readers: dict[str, Callable[[], Iterator[Tensor]]] = {"in memory, random access": partial(from_memory, pool, batch)}
    for workers in WORKERS:
        for format in stores:
            readers[f"streamed {format}, {workers} threads"] = partial(streamed, stores[format], side, batch, workers)
        readers[f"plain webdataset, {workers} processes"] = partial(plain, folder / "webdataset", batch, workers)
    return readers


def rates_of(epoch: Iterator[Tensor]) -> tuple[float, float]:
    """Images per second from the second batch on, and per second of processor time of all processes."""
    used = processor_seconds()
    first = len(next(epoch))
    began, count = time.perf_counter(), 0
    for images in epoch:
        count += len(images)
        assert images.dtype == torch.uint8
    return count / (time.perf_counter() - began), (first + count) / (processor_seconds() - used)


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rates: dict[str, list[str]] = {}
    for side in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            made = contenders(side, Path(folder))
            measured: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
            for _ in range(arguments.rounds):
                for name, epoch in made.items():
                    measured[name].append(rates_of(epoch()))
        for name, values in measured.items():
            rates.setdefault(name, []).extend(f"{statistics.median(v):,.0f}" for v in zip(*values, strict=True))
    units = ("images/s", "images per processor second")
    write_table(
        "loader",
        ["source", *(f"{side} px, {unit}" for side in KINDS for unit in units)],
        [[name, *values] for name, values in rates.items()],
        f"python -m benchmarks.loader --rounds {arguments.rounds}",
        "Nothing else is done with the images; plain webdataset yields no distributions, in the tars' order.",
    )


if __name__ == "__main__":
    main()
