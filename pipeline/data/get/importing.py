"""A person's own images into a data set: Parquet files, seeded splits and a manifest.

The source is read once, into a temporary file, so that the splits can be written in a random order;
what is no image, or cannot be used, is listed with its reason.
"""

import csv
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from pipeline.data.get.accepted import Accepted, AcceptedImages, Entry, LeftOut, accept
from pipeline.data.get.writing import write_images, write_manifest
from pipeline.data.manifest import SPLITS, FileSpec, ImageSpec, Manifest, SplitName, SplitSpec
from pipeline.data.readers.folder import class_folder, folder_shards
from pipeline.data.readers.webdataset import TarShard
from pipeline.errors import DataError, UsageError
from pipeline.seeds import permutation
from pipeline.storage.files import sync_folder, whole_file

POOL_FOLDERS = ("unlabelled", "unlabeled")
ROWS_PER_FILE = 20_000  # of the pool; a file is a shard, the unit of work


@dataclass(frozen=True)
class ImportSettings:
    """How an import divides the labelled images."""

    validation: float = 0.1
    """Part of each class that is for choosing, never for training; classes of three images give one."""
    test: float = 0.2
    """Part of each class that is for the final evaluation only."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise UsageError(
                f"validation {self.validation:g} and test {self.test:g} are parts of the labelled images: "
                "each at least 0, together less than 1"
            )


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    manifest: Manifest
    counts: dict[SplitName, int]
    """Images in each split."""
    per_class: dict[SplitName, dict[str, int]]
    """Split → class → images, for the splits that have labels."""
    left_out: list[LeftOut]


def import_images(
    source: Path,
    out: Path,
    *,
    name: str | None = None,
    unlabelled: Path | None = None,
    settings: ImportSettings | None = None,
    workers: int = 0,
) -> Imported:
    """Turn a folder or a tar of images into a data folder with a manifest.

    Args:
        source: a folder whose sub-folders are classes, or a tar: WebDataset with `.cls`, or one whose
            folders are classes. What lies in a folder `unlabelled` is the pool.
        out: the data folder to make; it appears whole, when all is written.
        name: of the data set (default: that of `out`).
        unlabelled: a folder or a tar of images that join the pool.
        settings: the splits.
        workers: threads that decode.

    Raises:
        DataError: a source is missing or cut short, `out` is in use, there are fewer than two classes, or
            a split would be empty.
        RunError: `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there and not empty; give a new folder, or remove that one first")
    settings = settings or ImportSettings()
    entries = chain(_entries(source), _as_pool(_entries(unlabelled)) if unlabelled else ())
    work = _work_folder(out)
    try:
        with tempfile.TemporaryFile(dir=work) as file:
            imported = _write(accept(file, entries, workers), work, name or out.resolve().name, settings)
        work.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return imported


def _work_folder(out: Path) -> Path:
    """A folder beside `out`, with the permissions of a new one (mkdtemp's own would hide the data)."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".importing", dir=out.parent))
    except OSError as error:
        raise DataError(f"cannot write beside {out}: {error.strerror or error}") from error
    umask = os.umask(0)
    os.umask(umask)
    work.chmod(0o777 & ~umask)
    return work


def _entries(source: Path) -> Iterator[Entry]:
    if source.is_dir():
        for shard in folder_shards(source.name, source, None):
            for sample in shard.read():
                yield Entry(sample.key, _class_name(class_folder(sample.key)), sample.data)
    elif source.is_file():
        for key, data, label in TarShard(source.name, source).images():
            yield Entry(key, _class_name(label or PurePosixPath(key).parent.name), data)
    else:
        raise DataError(f"{source}: there is no such folder or tar")


def _class_name(folder: str) -> str | None:
    return None if folder.lower() in POOL_FOLDERS else folder


def _as_pool(entries: Iterator[Entry]) -> Iterator[Entry]:
    for entry in entries:
        yield entry._replace(class_name=None)


def _write(accepted: AcceptedImages, folder: Path, name: str, settings: ImportSettings) -> Imported:
    classes = _class_order({image.class_name for image in accepted.images if image.class_name is not None})
    if len(classes) < 2:
        present = f"only {classes[0]!r}" if classes else "none"
        without = sum(entry.reason == "no_class" for entry in accepted.left_out)
        raise DataError(
            f"at least two classes are needed and {present} was found ({without} images in no class folder): "
            "put the images of each class into a sub-folder of its name"
        )
    splits = _divide(accepted.images, classes, settings)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    for split, images in splits.items():
        if split != "unlabelled":
            write_images(folder / f"{split}.parquet", accepted.rows(images, labels), classes)
            continue
        for number, start in enumerate(range(0, len(images), ROWS_PER_FILE)):
            rows = accepted.rows(images[start : start + ROWS_PER_FILE], labels)
            write_images(folder / f"pool-{number:05d}.parquet", rows, None)
    _write_left_out(folder / "left_out.csv", accepted.left_out)
    manifest = _manifest(name, classes, splits, accepted)
    write_manifest(folder / "manifest.yaml", manifest)
    counts = {split: len(images) for split, images in splits.items()}
    per_class: dict[SplitName, dict[str, int]] = {}
    for split, images in splits.items():
        if split != "unlabelled":
            numbers = Counter(image.class_name for image in images)
            per_class[split] = {class_name: numbers[class_name] for class_name in classes}
    return Imported(manifest, counts, per_class, accepted.left_out)


def _class_order(names: set[str]) -> list[str]:
    """Sorted by name, or by value where all are numbers (the labels of `.cls`)."""
    numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))


def _divide(images: list[Accepted], classes: list[str], settings: ImportSettings) -> dict[SplitName, list[Accepted]]:
    """Divide every class at random in the same proportions, and shuffle each split."""
    groups: dict[str | None, list[Accepted]] = {class_name: [] for class_name in (*classes, None)}
    for image in images:
        groups[image.class_name].append(image)
    splits: dict[SplitName, list[Accepted]] = {split: [] for split in SPLITS}
    splits["unlabelled"] = groups[None]
    for class_name in classes:
        group = _shuffled(groups[class_name], settings.seed, class_name)
        test, validation = _held_out(len(group), settings)
        rest = test + validation
        splits["test"] += group[:test]
        splits["validation"] += group[test:rest]
        splits["labelled"] += group[rest:]
    _refuse_empty(splits, settings)
    return {split: _shuffled(group, settings.seed, split) for split, group in splits.items() if group}


def _held_out(count: int, settings: ImportSettings) -> tuple[int, int]:
    """Test and validation images of a class of `count`: at least one each of three or more, and never all."""
    if count < 3:
        return 0, 0
    test = max(round(count * settings.test), 1) if settings.test else 0
    validation = max(round(count * settings.validation), 1) if settings.validation else 0
    test = min(test, count - 1 - (validation > 0))
    return test, min(validation, count - 1 - test)


def _shuffled(images: list[Accepted], seed: int, purpose: str) -> list[Accepted]:
    return [images[i] for i in permutation(len(images), seed, "import", purpose)]


def _refuse_empty(splits: dict[SplitName, list[Accepted]], settings: ImportSettings) -> None:
    shares: dict[SplitName, float] = {"validation": settings.validation, "test": settings.test}
    for split, share in shares.items():
        if share and not splits[split]:
            raise DataError(
                f"the {split} split would be empty: no class has three images or more. "
                f"Add images, or set --{split} to 0"
            )


def _manifest(
    name: str, classes: list[str], splits: dict[SplitName, list[Accepted]], accepted: AcceptedImages
) -> Manifest:
    files: dict[str, FileSpec] = {}
    for split, images in splits.items():
        if split == "unlabelled":
            files["pool"] = FileSpec(glob="pool-*.parquet", reader="parquet")
        else:
            files[split] = FileSpec(path=f"{split}.parquet", reader="parquet", rows=len(images))
    sources = {split: "pool" if split == "unlabelled" else split for split in splits}
    median = sorted(accepted.sides.elements())[accepted.sides.total() // 2]
    return Manifest(
        name=name,
        title="imported images",
        classes=len(classes),
        class_names=tuple(classes),
        image=ImageSpec(size=median, channels=3 if accepted.colour else 1),
        files=files,
        splits={split: SplitSpec.model_validate({"from": source}) for split, source in sources.items()},
    )


def _write_left_out(path: Path, left_out: list[LeftOut]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LeftOut._fields)
        writer.writerows(left_out)
