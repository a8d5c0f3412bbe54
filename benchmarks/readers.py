"""Images a second that a reader gives, undecoded, beside the library that people use for the same file.

python -m benchmarks.readers [--rounds 7] [--images 4000]

Each row is a file made for the purpose in a temporary folder, which stays in the page cache; rivals take turns, and
the ratio is the median over the rounds. WebDataset is read with .json and .txt beside each image, as img2dataset
writes them; pyarrow and scipy hold what they read in memory, which the readers here do not.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.record import write_table
from pipeline.data.readers.parquet import BATCH, ParquetShard
from pipeline.data.readers.raw import raw_shards
from pipeline.data.readers.svhn import svhn_shards
from pipeline.data.readers.webdataset import TarShard

Read = Callable[[], int]  # reads a file; gives bytes, so that rivals can be seen to do the same


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4000)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in (32, 256):
            images = [jpeg(side, seed) for seed in range(arguments.images)]
            kilobytes = sum(map(len, images)) / len(images) / 1e3
            for what, ours, theirs in rivals(Path(folder), side, images):
                rows.append(measured(f"{what}, {kilobytes:.1f} kB", ours, theirs, len(images), arguments.rounds))
        for what, ours, theirs in raw_rivals(Path(folder), arguments.images):
            rows.append(measured(what, ours, theirs, arguments.images, arguments.rounds))
    command = f"python -m benchmarks.readers --rounds {arguments.rounds} --images {arguments.images}"
    head = ["file", "ours, images/s", "rival, images/s", "ours / rival", "least", "most"]
    write_table("readers", head, rows, command, "Rival: webdataset, pyarrow (iter_batches, to_pylist), NumPy, SciPy.")


def rivals(folder: Path, side: int, images: list[bytes]) -> list[tuple[str, Read, Read]]:
    """A tar and a Parquet file of JPEGs, with two ways to read each."""
    tar = write_tar(folder / f"{side}.tar", images)
    parquet = folder / f"{side}.parquet"
    struct = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)])
    pq.write_table(pa.table({"image": struct}), parquet, row_group_size=1000)
    shard, table = TarShard("a", tar), ParquetShard("a", parquet, label=None)
    return [
        ("WebDataset", lambda: sum(len(sample.data) for sample in shard.read()), lambda: plain_webdataset(tar)),
        ("Parquet", lambda: sum(len(sample.data) for sample in table.read()), lambda: plain_pyarrow(parquet)),
    ]


def raw_rivals(folder: Path, count: int) -> list[tuple[str, Read, Read]]:
    """CIFAR-10's binary form and SVHN's, against arrays read whole."""
    import scipy.io

    random = np.random.RandomState(0)
    records = random.randint(0, 256, (count, 3073)).astype(np.uint8)
    cifar, svhn = folder / "data_batch_1.bin", folder / "train_32x32.mat"
    records.tofile(cifar)
    variables = {"X": np.asfortranarray(records[:, 1:].reshape(-1, 3, 32, 32).T), "y": records[:, :1] % 10 + 1}
    scipy.io.savemat(svhn, variables, do_compression=True)
    (raw,), (mat,) = raw_shards("a", cifar, "cifar-binary", True), svhn_shards("a", svhn, True)

    def whole_cifar() -> int:
        pixels = np.fromfile(cifar, np.uint8).reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return sum(len(image.tobytes()) for image in pixels)

    def whole_svhn() -> int:
        pixels = scipy.io.loadmat(svhn)["X"].transpose(3, 0, 1, 2)
        return sum(len(image.tobytes()) for image in pixels)

    header = len(b"P6\n32 32\n255\n")
    return [
        ("CIFAR-10 binary", lambda: sum(len(sample.data) - header for sample in raw.read()), whole_cifar),
        ("SVHN .mat", lambda: sum(len(sample.data) - header for sample in mat.read()), whole_svhn),
    ]


def measured(what: str, ours: Read, theirs: Read, images: int, rounds: int) -> list[str]:
    """A row of the table: both in turn, `rounds` times after one that does not count."""
    assert ours() == theirs(), what
    times = max(1, round(0.3 / seconds(ours, 1)))  # a round of a few milliseconds would measure the machine's mood
    rounds_taken = [(seconds(ours, times), seconds(theirs, times)) for _ in range(rounds)]
    our_rate, rival_rate = (times * images / statistics.median(column) for column in zip(*rounds_taken, strict=True))
    ratios = [rival / ours for ours, rival in rounds_taken]
    shown = (f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
    return [what, f"{our_rate:,.0f}", f"{rival_rate:,.0f}", *shown]


def seconds(read: Read, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        read()
    return time.perf_counter() - began


def jpeg(side: int, seed: int) -> bytes:
    """A picture of noise that is smooth enough to compress as photographs do."""
    small = np.random.RandomState(seed).randint(0, 256, (side // 4, side // 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((side, side)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, images: list[bytes]) -> Path:
    """In img2dataset's layout."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            members = (("jpg", data), ("json", b'{"status": "success"}' * 20), ("txt", b"a caption of some length"))
            for suffix, content in members:
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def plain_webdataset(path: Path) -> int:
    """Raw samples, as the library's manual has it."""
    import webdataset

    return sum(len(sample["jpg"]) for sample in webdataset.WebDataset(str(path), shardshuffle=False))


def plain_pyarrow(path: Path) -> int:
    """The same column in batches of the same length, as Python's own bytes."""
    total = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=["image"]):
            total += sum(len(value["bytes"]) for value in batch.column("image").to_pylist())
    return total


if __name__ == "__main__":
    main()
