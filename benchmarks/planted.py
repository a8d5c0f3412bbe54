"""Plants copies of test images in the CIFAR-10 pool, and counts after `mpl filter` what became of them.

python -m benchmarks.planted make --data DATA --out FOLDER
mpl filter --run RUN --data FOLDER
python -m benchmarks.planted count --run RUN
"""

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.copy_kinds import HELD_OUT, NAMED
from benchmarks.record import write_table
from pipeline.data.decode import decode
from pipeline.data.get.writing import Row, write_images
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split

KINDS = NAMED | HELD_OUT
PLANTED = "pool-planted"


def rows(data: Path, copies: int) -> Iterator[Row]:
    """Copies of each kind as PNG files; their keys state kind and original."""
    test = open_split(load_manifest("cifar10", data), "test", data)
    originals = [(sample.row, decode(sample.data, 32)[0]) for _, sample in islice(test.read(), copies)]
    for kind, make in KINDS.items():
        for row, pixels in originals:
            if pixels is not None:
                file = io.BytesIO()
                make(Image.fromarray(pixels), np.random.default_rng(row)).save(file, "PNG")
                yield Row(f"{kind}|{row}", file.getvalue(), -1)


def make(data: Path, out: Path, copies: int) -> None:
    """A data folder like `data`, with one more shard in the pool."""
    (out / "tinyimagenet32").mkdir(parents=True)
    (out / "cifar10").symlink_to((data / "cifar10").resolve())
    for shard in sorted((data / "tinyimagenet32").glob("pool-*.parquet")):
        (out / "tinyimagenet32" / shard.name).symlink_to(shard.resolve())
    write_images(out / "tinyimagenet32" / f"{PLANTED}.parquet", rows(data, copies), None)


def count(run: Path) -> None:
    """What became of the planted copies, by kind."""
    fate: dict[str, list[str]] = defaultdict(list)
    for row in pq.read_table(run / "rejected" / f"part-{PLANTED}.parquet").to_pylist():
        kind, original = row["key"].split("|")
        right = row["reason"] == "eval_copy" and row["match"].rsplit("/", 1)[1] == original
        fate[kind].append("own" if right else row["reason"])
    chosen = pq.read_table(run / "selection.parquet", columns=["key", "shard", "row"]).to_pylist()
    for key in {row["key"] for row in chosen if row["shard"] == PLANTED}:
        fate[key.split("|")[0]].append("kept")
    table = [
        [
            kind,
            "named" if kind in NAMED else "held out",
            len(fate[kind]),
            fate[kind].count("own"),
            fate[kind].count("eval_copy"),
            fate[kind].count("repeat_of"),
            len([reason for reason in fate[kind] if reason not in ("own", "eval_copy", "repeat_of")]),
        ]
        for kind in KINDS
    ]
    for group, kinds in (("named", NAMED), ("held out", HELD_OUT)):
        lines = [line for line in table if line[0] in kinds]
        table.append(
            [f"**all {len(kinds)} kinds**", group, *(sum(int(line[i]) for line in lines) for i in range(2, 7))]
        )
    head = ["kind", "group", "planted", "removed as a copy of their original", "… of another", "repeats", "missed"]
    write_table("planted", head, table, "python -m benchmarks.planted count --run RUN")


def main() -> None:
    """Make, or count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--data", type=Path, required=True)
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--copies", type=int, default=100)
    counting = commands.add_parser("count")
    counting.add_argument("--run", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.data, arguments.out, arguments.copies)
    else:
        count(arguments.run)


if __name__ == "__main__":
    main()
