"""Copies of evaluation images, for `mpl filter`: what is looked for, from which similarity on, and what is told."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import WHOLE, Framing
from pipeline.data.decoded import Images
from pipeline.data.sources import Split
from pipeline.errors import DataError, MissingDataError
from pipeline.networks.folders import read_description
from pipeline.pool.copies.calibration import SELF_SIMILAR, Calibration, calibrate
from pipeline.pool.copies.calibration import VERSION as CALIBRATION
from pipeline.pool.copies.index import VERSION, CopyIndex, default_threshold
from pipeline.pool.filter import Filtered
from pipeline.storage.files import fingerprint, read_json, write_json
from stages.options import Context

INDEXED = 64  # pixels of an evaluation image, at most; they are compared at 32
CALIBRATION_FILE = "copies.json"
TOO_MANY = 0.01  # of a pool, to be copies without a warning


def evaluation_splits(context: Context) -> list[Split]:
    """The splits whose copies must not be in the pool.

    Raises:
        DataError: the files of one are not there, and nobody said that this is meant.
    """
    remedy = "To go on without looking for copies of evaluation images: --set filter.copies.enabled=false"
    names = [name for name in ("validation", "test") if name in context.data_set.manifest.splits]
    try:
        return [context.data_set.split(name) for name in names]
    except MissingDataError as error:
        raise DataError(f"{error}. {remedy}") from error


@dataclass(frozen=True)
class Compared:
    """How images are compared: as the teacher sees them, up to a size.

    Attributes:
        size: pixels.
        framing: the teacher's.
    """

    size: int
    framing: Framing

    @classmethod
    def of(cls, folder: Path) -> "Compared":
        """By the teacher in a folder."""
        teacher = read_description(folder)
        return cls(min(INDEXED, teacher.image_size), teacher.framing)

    def images(self, context: Context, split: Split) -> Images:
        """A split's images as they are compared."""
        return context.data_set.images(split, self.size, self.framing)


def evaluation_images(context: Context, compared: Compared) -> tuple[NDArray[np.uint8], list[str]]:
    """The validation and test images, (N, S, S, 3), and their names."""
    pixels, names = [np.zeros((0, compared.size, compared.size, 3), np.uint8)], []
    for split in evaluation_splits(context):
        images = compared.images(context, split)
        pixels.append(images.images.permute(0, 2, 3, 1).numpy())
        names += [f"{split.name}/{shard}/{row}" for shard, row in zip(images.shards, images.rows, strict=True)]
    return np.concatenate(pixels), names


def copy_index(context: Context, compared: Compared) -> CopyIndex | None:
    """Index of the validation and test images; None where the recipe turns it off, or there are none."""
    if not context.recipe.filter.copies.enabled:
        return None
    pixels, names = evaluation_images(context, compared)
    return CopyIndex(pixels, names) if names else None


def calibration_mark(context: Context) -> list[Any] | None:
    """What the calibration depends on beside the evaluation images; None where a threshold is given."""
    settings = context.recipe.filter.copies
    if settings.threshold is not None:
        return None
    return [CALIBRATION, settings.honest, context.data_set.split("labelled").fingerprint()]


def calibrated(context: Context, compared: Compared, mark: list[Any] | None) -> Calibration | None:
    """What makes a copy on this data set; kept in copies.json, and made once. None where a threshold is given."""
    if mark is None:
        return None
    splits = [split.fingerprint() for split in evaluation_splits(context)]
    seen = [compared.size, *([] if compared.framing == WHOLE else [asdict(compared.framing)])]
    made_of = fingerprint([mark, VERSION, splits, *seen])
    path = context.store / CALIBRATION_FILE
    kept = read_json(path) if path.exists() else {}
    if kept.get("fingerprint") == made_of:
        return Calibration(**kept["calibration"])
    pixels, names = evaluation_images(context, compared)
    labelled = compared.images(context, context.data_set.split("labelled")).images.permute(0, 2, 3, 1).numpy()
    honest = context.recipe.filter.copies.honest
    calibration = calibrate(CopyIndex(pixels, names), pixels, labelled, default_threshold(compared.size), honest)
    write_json(path, {"fingerprint": made_of, "calibration": asdict(calibration)})
    return calibration


def tell_copies(context: Context, filtered: Filtered, threshold: float | None, calibration: Calibration | None) -> None:
    """How many copies there are, from which similarity on, and what that rests on."""
    if threshold is None:
        why = "was turned off" if not context.recipe.filter.copies.enabled else "there are no evaluation images"
        context.console.note(f"copies of evaluation images: not looked for ({why})")
        return
    kept = context.recipe.filter.copies.keep
    text = (
        f"copies of evaluation images: {filtered.copies:,}{', kept' if kept else ''}, from similarity {threshold:.2f}"
    )
    if calibration is not None:
        text += (
            f" on; {100 * calibration.above:.1f}% of the {calibration.images:,} labelled and evaluation images are "
            "as like another one"
        )
        if calibration.self_similar:
            honest = 100 * context.recipe.filter.copies.honest
            why = "These images resemble one another" if calibration.above > SELF_SIMILAR else "These are few images"
            text += (
                f". {why}: so that at most {honest:g}% of those that are no copies are "
                "taken for some (filter.copies.honest), the threshold is that high, and altered copies are missed"
            )
    context.console.note(text)
    if filtered.copies > TOO_MANY * filtered.images and not kept:
        context.console.note(
            f"WARNING: {100 * filtered.copies / filtered.images:.1f}% of the pool are taken for copies of evaluation "
            "images and removed. Look at some with their matches (mpl report). If they are no copies: --keep-copies"
        )
