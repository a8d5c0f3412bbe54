"""What a filter kept of a pool that has images of the labelled files: how many, and how many in their true class.

The pool of cifar10-web has CIFAR-10's training images among others; their labels, which no stage reads, are read here.

python -m benchmarks.kept --data DATA RUN/seed-0 RUN/seed-1 RUN/seed-2
"""

import argparse
from pathlib import Path

import numpy as np

from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.pool.selection import read_selection


def counted(run: Path, truth: dict[tuple[str, int], int]) -> tuple[int, int, int]:
    """Images kept, those of them with a true label, and those whose class it is."""
    table = read_selection(run / "selection.parquet").table
    columns = (table.column(name).to_pylist() for name in ("shard", "row", "class"))
    known = [(truth.get((shard, row)), label) for shard, row, label in zip(*columns, strict=True)]
    own = [true == label for true, label in known if true is not None]
    return len(known), len(own), sum(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--manifest", default="cifar10-web")
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    split = open_split(load_manifest(options.manifest, options.data), "labelled", options.data)
    truth = {(shard, sample.row): sample.label for shard, sample in split.read()}
    shares = []
    for run in options.runs:
        kept, own, right = counted(run, truth)
        shares.append((100 * own / kept, 100 * right / own))
        print(f"{run}: {kept:,} kept, {own:,} of them of the labelled files, {right:,} of these in their class")
    for name, values in zip(("of the labelled files", "of these in their class"), np.array(shares).T, strict=True):
        print(f"{name}: {values.mean():.1f} ± {values.std(ddof=len(values) > 1):.1f}%")


if __name__ == "__main__":
    main()
