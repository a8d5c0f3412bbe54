"""How many planted copies the filter finds, how many honest images it takes for copies, and how fast it is.

    python -m benchmarks.copies --data DATA          (cifar10/ and tinyimagenet32/, as data_manifests/cifar10.yaml says)
    python -m benchmarks.copies --data DATA --speed
    python -m benchmarks.copies --data DATA --sets [--also FOLDER]   (the calibration, on sets of any kind)

Copies of CIFAR-10 test images are made in every way of benchmarks/copy_kinds.py, and searched among all validation and
test images; held-out kinds are made of other images than the rest. Honest images are those of the pool, once each, and
the training set. Both hold true copies: what is at least as similar as `--true` counts as such, and `--sheet` writes
the pairs about that similarity to look at.
"""

import argparse
import io
import pickle
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.copy_kinds import DESIGN, HELD_OUT, NAMED, Kind
from benchmarks.copy_sets import MADE
from benchmarks.record import write_table
from pipeline.data.decode import decode
from pipeline.data.decoded import load_images
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.pool.copies.calibration import calibrate
from pipeline.pool.copies.candidates import AROUND, LOOKS, load_faiss
from pipeline.pool.copies.index import CopyIndex, default_threshold
from pipeline.pool.copies.thumbnails import luminance, thumbnails

Pixels = NDArray[np.uint8]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
SIZE, BATCH = 32, 256
THRESHOLDS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
FIGURE = Path(__file__).parents[1] / "docs" / "results" / "copies.png"


def split(data: Path, name: str, count: int | None = None) -> Pixels:
    """The first images of a split of CIFAR-10."""
    manifest = load_manifest("cifar10", data)
    samples = islice(open_split(manifest, name, data).read(), count)
    return load_images(samples, SIZE).images.permute(0, 2, 3, 1).numpy()


def similarities(index: CopyIndex, images: Pixels) -> Found:
    """Best similarity and match of each image."""
    matches = [index.find(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return np.concatenate([match.similarity for match in matches]), np.concatenate([match.index for match in matches])


def copies(originals: Pixels, kind: Kind, size: int = SIZE) -> Pixels:
    """A copy of each image, as the decode stage sees it."""
    made = []
    for seed, pixels in enumerate(originals):
        picture = kind(Image.fromarray(pixels), np.random.default_rng(seed))
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG")  # the kind itself went through a format
        made.append(decode(file.getvalue(), size)[0])
    return np.stack(made)


def shares(similarity: NDArray[np.float32]) -> list[str]:
    """% at each threshold."""
    return [f"{100 * np.mean(similarity >= t):.2f}" for t in THRESHOLDS]


def measure(arguments: argparse.Namespace) -> None:
    """The table of kinds, the honest images, and the figure."""
    test, validation = split(arguments.data, "test"), split(arguments.data, "validation")
    index = CopyIndex(np.concatenate([test, validation]), [str(i) for i in range(len(test) + len(validation))])
    rows: list[list[object]] = []
    curves: dict[str, NDArray[np.float32]] = {}
    groups = {"named in advance": (NAMED, 0), "used in design": (DESIGN, 0), "held out": (HELD_OUT, 5000)}
    for group, (kinds, first) in groups.items():
        scores = []
        for name, kind in kinds.items():
            similarity, match = similarities(index, copies(test[first : first + arguments.copies], kind))
            right = np.where(match == np.arange(first, first + len(match)), similarity, -1)
            removed = 100 * np.mean(similarity >= default_threshold(SIZE))
            rows.append([name, group, *shares(right), f"{removed:.2f}"])
            scores.append(right)
        curves[group] = np.concatenate(scores)
        rows.append([f"**all {len(kinds)} kinds**", group, *shares(curves[group]), ""])
    honest = {
        "pool": np.unique(split(arguments.data, "unlabelled", arguments.honest), axis=0),
        "training set": split(arguments.data, "labelled", arguments.honest // 2),
    }
    for name, images in honest.items():
        similarity, match = similarities(index, images)
        true = similarity >= arguments.true
        curves[name] = similarity[~true]
        rows.append([f"{name}, {len(images):,} images: removed", "", *shares(similarity), ""])
        rows.append([f"… of those below {arguments.true}", "honest", *shares(similarity[~true]), ""])
        if arguments.sheet:
            sheet(arguments.sheet / f"{name}.png", images, index, np.concatenate([test, validation]), similarity, match)
    draw(curves, list(groups))
    write_table(
        "copies",
        ["% with similarity ≥", "", *map(str, THRESHOLDS), "removed"],
        rows,
        f"python -m benchmarks.copies --data DATA --copies {arguments.copies} --honest {arguments.honest}",
        f"{arguments.copies} copies of each kind among {len(index.names):,} images. Found: the right image, at "
        f"that similarity. Removed: any, at {default_threshold(SIZE)}; CIFAR-10 holds near-duplicates.",
    )


def sheet(
    path: Path,
    images: Pixels,
    index: CopyIndex,
    originals: Pixels,
    similarity: NDArray[np.float32],
    match: NDArray[np.int64],
) -> None:
    """Pairs from the most similar to those at 0.6, less the certain ones."""
    order = np.argsort(-similarity)
    order = order[(similarity[order] < 0.95) & (similarity[order] >= 0.6)][:144]
    picture = Image.new("RGB", (12 * 112, 12 * 70), "white")
    draw = ImageDraw.Draw(picture)
    for place, image in enumerate(order):
        x, y = place % 12 * 112, place // 12 * 70
        for which, pixels in enumerate((images[image], originals[match[image]])):
            picture.paste(Image.fromarray(pixels).resize((54, 54), Image.Resampling.NEAREST), (x + 55 * which, y + 12))
        draw.text((x, y), f"{similarity[image]:.3f}", "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def draw(curves: dict[str, NDArray[np.float32]], groups: Iterable[str]) -> None:
    """Copies found against honest images removed, as the threshold moves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = np.linspace(0.45, 0.95, 101)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    chosen = default_threshold(SIZE)
    removed = np.array([100 * np.mean(curves["pool"] >= t) for t in steps])
    for group in groups:
        shares = np.array([100 * np.mean(curves[group] >= t) for t in steps])
        (line,) = axes.plot(np.maximum(removed, 3e-3), shares, label=group)
        chosen_step = int(np.argmin(np.abs(steps - chosen)))
        axes.plot(max(removed[chosen_step], 3e-3), shares[chosen_step], "o", color=line.get_color())
    axes.axvline(0.3, color="grey", lw=0.8, ls=":")
    axes.axhline(98, color="grey", lw=0.8, ls=":")
    axes.set(xscale="log", xlim=(3e-3, 10), ylim=(85, 100.3), xlabel="honest pool images removed, %")
    axes.set(ylabel="planted copies found, %", title=f"Copies of evaluation images (dots: similarity {chosen:g})")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(FIGURE, dpi=150)


def speed(arguments: argparse.Namespace) -> None:
    """Candidates by brute force and by the index, and the whole of `find`; one thread."""
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    test = split(arguments.data, "test")
    pool = split(arguments.data, "unlabelled", 48_000)
    everything = np.concatenate([test, split(arguments.data, "validation"), split(arguments.data, "labelled"), pool])
    kinds = {**NAMED, **DESIGN}
    planted = [
        copies(test[:200], kinds[k]) for k in ("JPEG 40", "shifted by 1", "cropped by 3", "turned by 3°", "text")
    ]
    look, queries = LOOKS[0], split(arguments.data, "unlabelled", 52_000)[-2048:]
    rows = []
    for count in (14_000, 100_000):
        began = time.process_time()
        index = CopyIndex(everything[:count], [str(i) for i in range(count)])
        built = time.process_time() - began
        vectors = thumbnails(luminance(everything[:count]), AROUND).reshape(-1, 48)
        sought = thumbnails(luminance(queries), (look.query,))[:, 0]
        brute = torch.from_numpy(vectors)
        flat = _flat(vectors)
        methods = {
            "matmul and top-k": lambda q, b=brute: (torch.from_numpy(q) @ b.T).topk(look.nearest)[1].numpy(),
            "faiss, flat": lambda q, i=flat: i.search(q, look.nearest)[1],
            "faiss, as used": lambda q, i=index: i._thumbnails._indexes[0].search(q, look.nearest)[1],
        }
        for name, search in methods.items():
            per_query = _seconds(lambda s=search, q=sought: [s(q[i : i + 64]) for i in range(0, 256, 64)]) / 256
            right = [
                (
                    search(thumbnails(luminance(p), (look.query,))[:, 0]) // len(AROUND) == np.arange(len(p))[:, None]
                ).any(1)
                for p in planted
            ]
            rows.append([f"{count:,}", name, f"{1 / per_query:,.0f}", f"{100 * np.mean(right):.2f}", "", "", ""])
        whole = _seconds(lambda i=index: similarities(i, queries)) / len(queries)
        hit = np.mean([similarities(index, p)[1] == np.arange(len(p)) for p in planted])
        size = f"{len(pickle.dumps(index)) / 1e6:.0f}"
        rows.append([f"{count:,}", "find, whole", "", f"{100 * hit:.2f}", f"{1 / whole:,.0f}", f"{built:.0f}", size])
    write_table(
        "copies-speed",
        ["images", "", "thumbnails/s", "right among them, %", "images/s", "built in, s", "MB"],
        rows,
        "python -m benchmarks.copies --data DATA --speed",
        "One thread, processor time. An image asks for two thumbnails of this kind, and for 16 smaller searches.",
    )


def _flat(vectors: NDArray[np.float32]) -> Any:
    index = load_faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _seconds(work: Callable[[], object]) -> float:
    """Processor time, the best of two."""
    took = []
    for _ in range(2):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def sets(arguments: argparse.Namespace) -> None:
    """Honest images removed by the default threshold and by the calibration, and copies found, on sets of any kind."""
    rows = []
    for name, make in MADE.items():
        images, _ = make()
        rows.append(calibrated(name, images[:300], images[300:600], images[600:]))
    for folder in arguments.also:
        manifest = load_manifest(folder / "manifest.yaml")
        size = min(manifest.image.size, 64)
        parts = [load_images(open_split(manifest, name).read(), size) for name in ("test", "labelled", "unlabelled")]
        rows.append(calibrated(manifest.name, *(part.images.permute(0, 2, 3, 1).numpy() for part in parts)))
    pool = np.unique(split(arguments.data, "unlabelled", arguments.honest), axis=0)
    test, labelled = split(arguments.data, "test"), split(arguments.data, "labelled", 4000)
    rows.append(calibrated("CIFAR-10, Tiny-ImageNet as the pool", test, labelled, pool, arguments.true))
    rest = split(arguments.data, "labelled", 4000 + arguments.honest // 2)[4000:]
    rows.append(calibrated("CIFAR-10, more of its training set as the pool", test, labelled, rest, arguments.true))
    head = ["set", "evaluation", "labelled", "pool", "pixels", "default", "honest removed by it, %", "calibrated"]
    head += [
        "honest removed, %",
        *(f"{name}: found, %" for name in NAMED),
        "all 12 kinds",
        "calibrated in, s",
        "pool in, s",
    ]
    also = "".join(f" --also {folder.name}" for folder in arguments.also)
    command = f"python -m benchmarks.copies --data DATA --sets --honest {arguments.honest}{also}"
    note = f"Images of CIFAR-10's pools that are at least {arguments.true} alike are true copies, and not counted."
    write_table("copies-sets", head, rows, command, note)


def calibrated(name: str, evaluation: Pixels, labelled: Pixels, pool: Pixels, true: float = 1.1) -> list[object]:
    """A line of the table. Images of the pool at least as similar as `true` are taken for true copies."""
    size = pool.shape[1]
    index, default = CopyIndex(evaluation, [str(i) for i in range(len(evaluation))]), default_threshold(size)
    began = time.process_time()
    calibration = calibrate(index, evaluation, labelled, default, 0.001)
    took = time.process_time() - began

    def judged(images: Pixels) -> tuple[Found, NDArray[np.bool_]]:
        similarity, match = similarities(index, images)
        return (similarity, match), calibration.are_copies(similarity, [index.names[i] for i in match])

    began = time.process_time()
    (similarity, _), removed = judged(pool)
    compared = time.process_time() - began
    honest = similarity < true
    found = []
    for kind in NAMED.values():
        (_, match), is_copy = judged(copies(evaluation[:100], kind, size))
        found.append(100 * np.mean(is_copy & (match == np.arange(len(match)))))
    line = [name, len(evaluation), len(labelled), int(honest.sum()), size, f"{default:.3g}"]
    line += [f"{100 * np.mean(similarity[honest] >= default):.2f}", calibration.threshold]
    line += [f"{100 * np.mean(removed[honest]):.2f}", *(f"{share:.0f}" for share in found), f"{np.mean(found):.1f}"]
    return [*line, f"{took:.1f}", f"{compared:.1f}"]


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=500)
    parser.add_argument("--honest", type=int, default=20000)
    parser.add_argument("--true", type=float, default=0.85)
    parser.add_argument("--sheet", type=Path, help="a folder for contact sheets")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--sets", action="store_true")
    parser.add_argument("--also", type=Path, action="append", default=[], help="data folders of `mpl data import`")
    arguments = parser.parse_args()
    (speed if arguments.speed else sets if arguments.sets else measure)(arguments)


if __name__ == "__main__":
    main()
