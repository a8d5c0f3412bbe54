"""A person's own images into a data set: Parquet files, splits and a manifest.

The source is read once, into a temporary file, so that the splits can be written in a random order;
what is no image, or cannot be used, is listed with its reason: found = used + left out.
"""

import csv
import glob
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import filelock

from pipeline.classes import in_order, require_distinct
from pipeline.data.get.accepted import Accepted, AcceptedImages, accept
from pipeline.data.get.found import Source
from pipeline.data.get.tables import TABLE_SUFFIXES
from pipeline.data.get.writing import write_images, write_manifest
from pipeline.data.manifest import (
    SPLITS,
    FileSpec,
    ImageSpec,
    Manifest,
    SplitName,
    SplitSpec,
    load_manifest,
    require_plain_name,
)
from pipeline.data.readers.shard import LeftOut
from pipeline.errors import DataError, UsageError
from pipeline.seeds import permutation
from pipeline.storage.files import sync_folder, whole_file

ROWS_PER_FILE = 20_000  # of the pool; a file is a shard, the unit of work
POOL_FILE = "pool-{:05d}.parquet"
LEFT_OUT = "left_out.csv"
LOCK = ".lock"  # in the folder of an import under way


@dataclass(frozen=True)
class ImportSettings:
    """How an import divides the labelled images.

    Attributes:
        validation: part of each class that is for choosing, never for training; classes of three images give one.
            None: 0.1, or nothing where the source has splits of its own.
        test: part of each class that is for the final evaluation only. None: 0.2, or nothing likewise.
        seed: of the splits.
    """

    validation: float | None = None
    test: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        validation, test = self.shares({"labelled"})
        if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
            raise UsageError(
                f"validation {validation:g} and test {test:g} are parts of the labelled images: "
                "each at least 0, together less than 1"
            )

    def shares(self, present: set[SplitName | None]) -> tuple[float, float]:
        """Parts for validation and test, where the source has images of these splits already."""
        divided = not present & {"validation", "test"}
        validation = (0.1 if divided else 0.0) if self.validation is None else self.validation
        test = (0.2 if divided else 0.0) if self.test is None else self.test
        return 0.0 if "validation" in present else validation, 0.0 if "test" in present else test


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    manifest: Manifest
    counts: dict[SplitName, int]
    """Images in each split."""
    per_class: dict[SplitName, dict[str, int]]
    """Split → class → images, for the splits that have labels."""
    left_out: list[LeftOut]
    cut: dict[SplitName, int]
    """Images that the import itself set aside from the labelled ones, for validation and test."""


def import_images(
    sources: Sequence[Source], out: Path, *, name: str | None = None, settings: ImportSettings | None = None,
    workers: int = 0,
) -> Imported:  # fmt: skip
    """Turn a person's images into a data folder with a manifest.

    Args:
        sources: what to import, the labelled images first.
        out: the data folder to make; it appears whole, when all is written.
        name: of the data set (default: that of `out`).
        settings: the splits.
        workers: threads that decode.

    Raises:
        DataError: a source is missing or cut short, `out` is in use, there are fewer than two classes, or
            a split would be empty.
        RunError: `out` cannot be written.
    """
    require_free(out)
    settings, name = settings or ImportSettings(), name or out.resolve().name
    try:
        require_plain_name(name)
    except ValueError as error:
        raise UsageError(f"the data set's name: {error}; give another: --name NAME") from error
    with new_folder(out) as work, tempfile.TemporaryFile(dir=work) as file:
        return _write(_accepted(file, sources, workers), work, name, settings)


def require_free(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        DataError: says what to do.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} is there and not empty; give a new folder, or remove that one first. To add images to the pool of "
            "a data set that was imported: --append"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write a data set into; it takes the place of `out` when all is written, and is gone otherwise.

    Raises:
        DataError: `out` is in use, or cannot be written.
    """
    require_free(out)
    with _work_folder(out) as work:
        yield work
        (work / LOCK).unlink()
        work.replace(out)
        sync_folder(out.parent)


def look_at(sources: Sequence[Source], settings: ImportSettings | None = None, *, workers: int = 0) -> Imported:
    """What `import_images` would make of the sources; nothing is written but a temporary file.

    Raises:
        DataError: as `import_images`.
    """
    with tempfile.TemporaryFile() as file:
        accepted = _accepted(file, sources, workers)
        classes = _classes(accepted)
        splits, cut = _divide(accepted.images, classes, settings or ImportSettings())
        return _imported("none", classes, splits, cut, accepted)


def append_images(sources: Sequence[Source], out: Path, *, workers: int = 0) -> tuple[int, list[LeftOut]]:
    """Add images to the pool of a data set that was imported; their classes, if they have any, are not read.

    The files that are there stay as they are, so their scores do.

    Returns:
        How many were added, and what was left out of the sources.

    Raises:
        DataError: `out` is no imported data set with a pool as an import writes it, or a source cannot be read.
    """
    manifest = load_manifest(out / "manifest.yaml")
    files = manifest.files.get("pool")
    if files is not None and files.glob != POOL_FILE.format(0).replace("00000", "*"):
        raise DataError(f"{out} was not made by `mpl data import`: its pool is {files.path or files.glob}")
    numbered = (re.fullmatch(r"pool-(\d{5,9})\.parquet", path.name) for path in out.glob("pool-*.parquet"))
    number = 1 + max((int(found[1]) for found in numbered if found), default=-1)
    with _work_folder(out / "pool") as work:
        with tempfile.TemporaryFile(dir=work) as file:
            accepted = _accepted(file, sources, workers)
            names = _write_pool(accepted, accepted.images, work, number)
        _write_left_out(work / LEFT_OUT, [*_read_left_out(out / LEFT_OUT), *accepted.left_out])
        if files is None:
            write_manifest(work / "manifest.yaml", _with_pool(manifest))
            names.append("manifest.yaml")
        for written in (LEFT_OUT, *names):
            (work / written).replace(out / written)
        sync_folder(out)
    return len(accepted.images), accepted.left_out


def _accepted(file: IO[bytes], sources: Sequence[Source], workers: int) -> AcceptedImages:
    left_out: list[LeftOut] = []
    accepted = accept(file, chain.from_iterable(source.find(left_out) for source in sources), workers)
    accepted.left_out += left_out
    return accepted


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, with the permissions of a new one (mkdtemp's own would hide the data).

    It is locked while it is in use; what a killed import left is removed by the next one.
    """
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".importing", dir=out.parent))
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        with filelock.FileLock(work / LOCK):
            yield work
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; nothing was left there") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.importing"):
        if (left / LOCK).is_file():
            with suppress(filelock.Timeout), filelock.FileLock(left / LOCK, timeout=0):
                shutil.rmtree(left)


def _write(accepted: AcceptedImages, folder: Path, name: str, settings: ImportSettings) -> Imported:
    classes = _classes(accepted)
    splits, cut = _divide(accepted.images, classes, settings)
    labels = {class_name: label for label, class_name in enumerate(classes)}
    for split, images in splits.items():
        if split == "unlabelled":
            _write_pool(accepted, images, folder, 0)
        else:
            write_images(folder / f"{split}.parquet", accepted.rows(images, labels), classes)
    _write_left_out(folder / LEFT_OUT, accepted.left_out)
    imported = _imported(name, classes, splits, cut, accepted)
    write_manifest(folder / "manifest.yaml", imported.manifest)
    return imported


def _imported(
    name: str, classes: list[str], splits: dict[SplitName, list[Accepted]], cut: dict[SplitName, int],
    accepted: AcceptedImages,
) -> Imported:  # fmt: skip
    counts = {split: len(images) for split, images in splits.items()}
    per_class: dict[SplitName, dict[str, int]] = {}
    for split, images in splits.items():
        if split != "unlabelled":
            numbers = Counter(image.class_name for image in images)
            per_class[split] = {class_name: numbers[class_name] for class_name in classes}
    return Imported(_manifest(name, classes, splits, accepted), counts, per_class, accepted.left_out, cut)


def _classes(accepted: AcceptedImages) -> list[str]:
    """The class names in order.

    Raises:
        DataError: there are fewer than two, or two that are one.
    """
    trained = {image.class_name for image in accepted.images if image.split not in ("validation", "test")}
    classes = in_order(trained - {None})  # type: ignore[arg-type]
    _leave_untrained(accepted, set(classes))
    if len(classes) < 2:
        present = f"only {classes[0]!r}" if classes else "none"
        without = sum(entry.reason == "no_class" for entry in accepted.left_out)
        tables = [entry.key for entry in accepted.left_out if entry.key.lower().endswith(TABLE_SUFFIXES)]
        raise DataError(
            f"at least two classes are needed and {present} was found ({without} images in no class folder): "
            "put the images of each class into a sub-folder of its name, or give a table of file and label as SOURCE"
            + (f" (is {tables[0]} one?)" if tables else "")
            + _not_images(accepted.left_out)
        )
    require_distinct(classes, "the source")
    return classes


def _leave_untrained(accepted: AcceptedImages, classes: set[str]) -> None:
    """Take out what lies in a class of validation or test that no image for training has: it may be no class at all."""
    kept = []
    for image in accepted.images:
        if image.class_name is None or image.class_name in classes:
            kept.append(image)
        else:
            detail = f"no image for training is of class {image.class_name}"
            accepted.left_out.append(LeftOut(image.key, "not_trained", detail))
    accepted.images = kept


def _not_images(left_out: list[LeftOut]) -> str:
    keys = [entry.key for entry in left_out if entry.reason in ("no_image", "decode_error")]
    return f". {len(keys):,} files are no images (such as {keys[0]})" if keys else ""


def _write_pool(accepted: AcceptedImages, images: list[Accepted], folder: Path, first: int) -> list[str]:
    """Write pool images as files from number `first` on; their names."""
    names = []
    for number, start in enumerate(range(0, len(images), ROWS_PER_FILE), first):
        names.append(POOL_FILE.format(number))
        write_images(folder / names[-1], accepted.rows(images[start : start + ROWS_PER_FILE], {}), None)
    return names


def _divide(
    images: list[Accepted], classes: list[str], settings: ImportSettings
) -> tuple[dict[SplitName, list[Accepted]], dict[SplitName, int]]:
    """Images to splits, and how many the shares cut off.

    Where an image says its split, it stays there. Of every class of the others, and of those for training, the shares
    are cut at random in the same proportions. Each split is shuffled.
    """
    present = {image.split for image in images if image.class_name is not None}
    validation_share, test_share = settings.shares(present)
    groups: dict[str | None, list[Accepted]] = {class_name: [] for class_name in (*classes, None)}
    splits: dict[SplitName, list[Accepted]] = {split: [] for split in SPLITS}
    for image in images:
        held_out = image.split in ("validation", "test") and image.class_name is not None
        (splits[image.split] if held_out else groups[image.class_name]).append(image)  # type: ignore[index]
    splits["unlabelled"] = groups[None]
    cut: dict[SplitName, int] = {"validation": 0, "test": 0}
    for class_name in classes:
        group = _shuffled(groups[class_name], settings.seed, class_name)
        test, validation = _held_out(len(group), validation_share, test_share)
        rest = test + validation
        splits["test"] += group[:test]
        splits["validation"] += group[test:rest]
        splits["labelled"] += group[rest:]
        cut["test"] += test
        cut["validation"] += validation
    _refuse_empty(splits, {"validation": validation_share, "test": test_share})
    return {split: _shuffled(group, settings.seed, split) for split, group in splits.items() if group}, cut


def _held_out(count: int, validation_share: float, test_share: float) -> tuple[int, int]:
    """Test and validation images of a class of `count`: at least one each of three or more, and never all."""
    if count < 3:
        return 0, 0
    test = max(round(count * test_share), 1) if test_share else 0
    validation = max(round(count * validation_share), 1) if validation_share else 0
    test = min(test, count - 1 - (validation > 0))
    return test, min(validation, count - 1 - test)


def _shuffled(images: list[Accepted], seed: int, purpose: str) -> list[Accepted]:
    return [images[i] for i in permutation(len(images), seed, "import", purpose)]


def _refuse_empty(splits: dict[SplitName, list[Accepted]], shares: dict[SplitName, float]) -> None:
    if not splits["labelled"]:
        raise DataError("no labelled image is left to train on: all are in a validation or a test split")
    for split, share in shares.items():
        if share and not splits[split]:
            raise DataError(
                f"the {split} split would be empty: no class has three images or more. "
                f"Add images, give others with --{split} FOLDER, or go without: --{split} 0"
            )


def _manifest(
    name: str, classes: list[str], splits: dict[SplitName, list[Accepted]], accepted: AcceptedImages
) -> Manifest:
    files: dict[str, FileSpec] = {}
    for split, images in splits.items():
        if split != "unlabelled":
            files[split] = FileSpec(path=f"{split}.parquet", reader="parquet", rows=len(images))
    median = sorted(accepted.sides.elements())[accepted.sides.total() // 2]
    manifest = Manifest(
        name=name,
        title="imported images",
        classes=len(classes),
        class_names=tuple(classes),
        image=ImageSpec(size=median, channels=3 if accepted.colour else 1),
        files=files,
        splits={split: SplitSpec.model_validate({"from": split}) for split in files},
    )
    return _with_pool(manifest) if "unlabelled" in splits else manifest


def _with_pool(manifest: Manifest) -> Manifest:
    files = {**manifest.files, "pool": FileSpec(glob=POOL_FILE.format(0).replace("00000", "*"), reader="parquet")}
    splits = {**manifest.splits, "unlabelled": SplitSpec.model_validate({"from": "pool"})}
    return manifest.model_copy(update={"files": files, "splits": splits})


def _write_left_out(path: Path, left_out: list[LeftOut]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LeftOut._fields)
        writer.writerows(left_out)


def _read_left_out(path: Path) -> list[LeftOut]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [LeftOut(*row) for row in list(csv.reader(file))[1:]]
