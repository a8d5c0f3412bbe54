"""What to label next, and which labels to doubt, by simulation on the embedded digits.

    python -m benchmarks.labelling [--seeds 5] [--folder DIR]

Next: 50 labels, drawn by the seed, train a network; 50 images of the pool (947 digits, 400 pieces of photographs) are
looked at, chosen by `mpl next` or at random, and those that are digits get their true label; a network trained on what
there is then is judged on the 500 test images. Suspects: of 300 labelled digits a tenth has another label, drawn by the
seed; `mpl suspects` ranks them by cross-fitted networks (pretrain.folds=5).
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.data.draw import stratified
from pipeline.data.get.writing import Row, write_images, write_manifest
from pipeline.data.manifest import FileSpec, SplitSpec, load_manifest
from pipeline.data.readers.digits import digits_shards
from pipeline.data.sources import open_split
from pipeline.report.experiments.statistics import paired_difference, summarise

FEW, LOOKS = 50, 50
DOUBTED, WRONG = 300, 0.1
NAMES = tuple(str(digit) for digit in range(10))


def mpl(*words: object) -> None:
    """A command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "stages", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"mpl {' '.join(map(str, words))} failed:\n{done.stderr}")


def truth() -> dict[str, int]:
    """Class of every digit and piece of a photograph (−1), by key."""
    return {
        s.key: s.label for name in ("train", "photographs") for shard in digits_shards(name, True) for s in shard.read()
    }


def write_data(folder: Path, labelled: list[Row], pool: list[Row]) -> None:
    """A data set whose validation and test images are those of the embedded digits."""
    folder.mkdir(parents=True)
    digits = load_manifest("digits")
    write_images(folder / "labelled.parquet", labelled, NAMES)
    write_images(folder / "pool.parquet", pool, None)
    for split in ("validation", "test"):
        rows = (Row(s.key, s.data, s.label) for _, s in open_split(digits, split).read())  # type: ignore[arg-type]
        write_images(folder / f"{split}.parquet", rows, NAMES)
    files = {n: FileSpec(path=f"{n}.parquet", reader="parquet") for n in ("labelled", "validation", "test", "pool")}
    splits = {n: SplitSpec.model_validate({"from": n}) for n in ("labelled", "validation", "test")}
    splits["unlabelled"] = SplitSpec.model_validate({"from": "pool"})
    changes = {"name": folder.name, "files": files, "splits": splits}
    write_manifest(folder / "manifest.yaml", digits.model_copy(update=changes))


def drawn(seed: int, count: int) -> tuple[list[Row], list[Row]]:
    """Labelled rows drawn by the seed, and all others."""
    split = open_split(load_manifest("digits-draws"), "labelled")
    labelled = [Row(s.key, s.data, s.label) for _, s in stratified(split, count, seed).read()]
    keys = {row.key for row in labelled}
    rest = [
        Row(s.key, s.data, -1)
        for name in ("train", "photographs")
        for shard in digits_shards(name, False)
        for s in shard.read()
        if s.key not in keys
    ]
    return labelled, rest


def supervised(run: Path, data: Path, seed: int) -> float:
    """Top-1 on the test images of a network trained on the labelled ones alone, percent."""
    mpl("train-reduced", "--run", run, "--data", data, "--seed", seed, "--teacher", "none")
    mpl("evaluate", "--run", run)
    return float(json.loads((run / "evaluation.json").read_text())["top1"])


def next_labels(folder: Path, seed: int) -> dict[str, tuple[float, int]]:
    """(Top-1, how many of the images looked at were digits) by way of choosing."""
    labelled, pool = drawn(seed, FEW)
    known = truth()
    write_data(folder / "first", labelled, pool)
    found = {"before": (supervised(folder / "run", folder / "first", seed), 0)}
    mpl("next", "--run", folder / "run", "--n", LOOKS)
    with (folder / "run" / "next.csv").open(newline="") as file:
        chosen = [(row["shard"], int(row["row"]), row["key"]) for row in csv.DictReader(file)]
    random = np.random.default_rng(seed).choice(len(pool), LOOKS, replace=False)
    ways = {"mpl next": chosen, "at random": [("pool", int(row), pool[row].key) for row in random]}
    for way, images in ways.items():
        place = folder / way.replace(" ", "-")
        place.mkdir()
        with (place / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["shard", "row", "key", "label"])
            writer.writerows([*image, NAMES[known[image[2]]] if known[image[2]] >= 0 else ""] for image in images)
        mpl("data", "label", folder / "first", place / "labels.csv", place / "data")
        digits = sum(known[key] >= 0 for _, _, key in images)
        found[way] = (supervised(place / "run", place / "data", seed), digits)
    return found


def suspects(folder: Path, seed: int) -> tuple[float, float]:
    """(Share of wrong labels among the first 5%, share of all wrong labels among the first 10%), percent."""
    labelled, pool = drawn(seed, DOUBTED)
    random = np.random.default_rng(seed)
    wrong = set(random.choice(DOUBTED, round(WRONG * DOUBTED), replace=False).tolist())
    rows = [
        row._replace(label=(row.label + int(random.integers(1, 10))) % 10) if i in wrong else row
        for i, row in enumerate(labelled)
    ]
    write_data(folder / "doubted", rows, pool)
    quick = ("pretrain.folds=5", "pretrain.steps=200", "pretrain.model.name=wrn_10_1")
    settings = [word for change in quick for word in ("--set", change)]
    mpl("pretrain", "--run", folder / "run", "--data", folder / "doubted", "--seed", seed, *settings)
    mpl("suspects", "--run", folder / "run")
    planted = {labelled[i].key for i in wrong}
    with (folder / "run" / "suspects.csv").open(newline="") as file:
        ranked = [row["key"] in planted for row in csv.DictReader(file)]
    first = ranked[: round(0.05 * DOUBTED)]
    return 100 * sum(first) / len(first), 100 * sum(ranked[: round(0.1 * DOUBTED)]) / len(planted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    scores: dict[str, list[tuple[float, int]]] = {}
    doubts = []
    for seed in range(options.seeds):
        for way, value in next_labels(folder / f"next-{seed}", seed).items():
            scores.setdefault(way, []).append(value)
        doubts.append(suspects(folder / f"suspects-{seed}", seed))
        print(
            f"seed {seed}: { ({way: values[-1] for way, values in scores.items()}) }, suspects {doubts[-1]}", flush=True
        )
    for way, values in scores.items():
        print(f"{way}: top-1 {summarise([top1 for top1, _ in values])}%, digits looked at {[n for _, n in values]}")
    ours, chance = ([top1 for top1, _ in scores[way]] for way in ("mpl next", "at random"))
    print(f"mpl next − at random: {paired_difference(ours, chance)}")
    print(f"suspects: wrong among the first 5% {summarise([a for a, _ in doubts])}% (by chance {100 * WRONG:.0f}%); "
          f"of all wrong labels in the first 10% {summarise([b for _, b in doubts])}%")  # fmt: skip


if __name__ == "__main__":
    main()
