"""What the filter did with the pool, gathered from a run's files: figures, examples and their pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.pool.filter import REJECTED_FOLDER, SELECTION_FILE
from pipeline.pool.rejected import REASONS
from pipeline.pool.scores import is_scored, shard_file
from pipeline.report.page.charts import Chart, rank_chart
from pipeline.report.page.dropped import Dropped, DroppedExamples, find_dropped, match_place, rejected_shards
from pipeline.report.page.kept import KeptClass, SelectedRows, choose_shards, kept_classes, open_selected
from pipeline.report.page.pictures import Pictures, Place, take_pictures
from pipeline.storage.files import Location, storage_errors

SCORES = "scores"
POOL = "unlabelled"
FEW_CLASSES, FEW_IMAGES, LEAST_IMAGES, ALL_IMAGES = 50, 24, 6, 1200  # examples by default
SAMPLES = 12  # copies, repeats, and so on

Splits = Callable[[str], Mapping[str, Shard]]
"""The shards of a split by name; raises a DataError where it cannot be opened."""


@dataclass(frozen=True, eq=False)
class ClassReport:
    """One class.

    Attributes:
        name: of the class.
        available, short: candidates, and images missing to k; None where the stage left no record.
        line: log-odds that an image needed, nats: those of the last one kept where the class is full, else the floor;
            None where all that there are were kept.
        kept: examples and curve.
        below: images that were nearest to the line.
        chart: the curve.
    """

    name: str
    available: int | None
    short: int | None
    line: float | None
    kept: KeptClass
    below: tuple[Dropped, ...]
    chart: Chart


@dataclass(frozen=True, eq=False)
class FilterReport:
    """The filter of a run.

    Attributes:
        record: the stage's figures; empty where it left none that belong to this selection.
        rules: as the selection tells them.
        rejected: images by reason, in the order of REASONS.
        classes: in the order of the teacher's.
        dropped: examples of what was left out.
        shards, looked_at: in the pool, and of these looked into for examples.
        pictures: of all examples.
        side: in pixels, of the images as the networks see them.
        notes: what is missing or does not agree.
    """

    record: dict[str, Any]
    rules: dict[str, str]
    rejected: dict[str, int]
    classes: tuple[ClassReport, ...]
    dropped: DroppedExamples
    shards: int
    looked_at: int
    pictures: Pictures
    side: int
    notes: tuple[str, ...]


def default_images(classes: int) -> int:
    """Examples of kept images for each class."""
    return FEW_IMAGES if classes <= FEW_CLASSES else max(LEAST_IMAGES, ALL_IMAGES // classes)


def gather_filter(
    outputs: Location,
    record: dict[str, Any] | None,
    splits: Splits,
    *,
    side: int,
    images: int | None = None,
    most_shards: int,
) -> FilterReport:
    """Gather the filter's part of a report. At most `most_shards` shards of the pool are looked into.

    Args:
        outputs: where selection.parquet, rejected/ and scores/ lie.
        record: the result of the stage's record, or None.
        splits: opens the pool and the evaluation splits, for pictures.
        side: of the images as the networks see them, pixels.
        images: examples of kept images for each class; None: `default_images`.
        most_shards: of the pool.

    Raises:
        DataError: there is no selection, or it is damaged.
    """
    selected = open_selected(outputs / SELECTION_FILE)
    notes = []
    if record is not None and record.get("fingerprint") != selected.fingerprint:
        record = None
        notes.append("The filter's record is of another selection: run mpl filter again. The files are shown.")
    wanted = default_images(len(selected.class_names)) if images is None else images
    shards = rejected_shards(outputs / REJECTED_FOLDER)
    chosen = choose_shards(selected, shards, wanted, most_shards)
    whole = len(chosen) == len(shards)
    kept = kept_classes(selected, chosen, wanted, whole=whole)
    dropped = find_dropped(
        outputs / REJECTED_FOLDER, chosen, len(selected.class_names), selected.fingerprint,
        below=wanted if wanted < 3 else wanted // 3, samples=min(SAMPLES, wanted),
    )  # fmt: skip
    if dropped.missing:
        unread = f"{len(dropped.missing):,} of {len(chosen):,} files of rejected/ cannot be used"
        notes.append(f"{unread}: {dropped.problem}.")
    figures = record or {}
    counted = {name: dropped.counts[name] for name in REASONS if dropped.counts[name]}
    recorded = {name: count for name in REASONS if (count := figures.get("rejected", {}).get(name, 0))}
    if record is not None and whole and not dropped.missing and counted != recorded:
        notes.append(f"The filter's record counts {recorded}, its files hold {counted}.")
    pictures = take_pictures(
        _places(kept, dropped), splits, side, lambda split, shard: split == POOL and _changed(outputs, figures, shard)
    )
    return FilterReport(
        record=figures,
        rules=selected.rules,
        rejected=counted if record is None else recorded,
        classes=tuple(_classes(selected, figures, kept, dropped)),
        dropped=dropped,
        shards=len(shards),
        looked_at=len(chosen),
        pictures=pictures,
        side=side,
        notes=tuple(notes + pictures.notes),
    )


def _lines(selected: SelectedRows, kept: Sequence[KeptClass]) -> NDArray[np.float64]:
    """What each class needed, log-odds (C,): of its last image where it is full, else the floor; NaN: nothing."""
    p, k = float(selected.rules.get("min_probability", 0)), int(selected.rules.get("k", 0))
    floor = np.log(p) - np.log1p(-p) if p > 0 else np.nan
    return np.array([float(c.log_odds[-1]) if c.rows and c.rows >= k else floor for c in kept])


def _classes(
    selected: SelectedRows,
    figures: dict[str, Any],
    kept: Sequence[KeptClass],
    dropped: DroppedExamples,
) -> list[ClassReport]:
    counts: list[dict[str, Any]] = figures.get("classes") or [{}] * len(kept)
    most = int(selected.counts.max(initial=1))
    end = min(int(selected.rules.get("k", most)), int(1.25 * most) + 1)  # room to see which classes are short
    values = np.concatenate([c.log_odds for c in kept])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    margin = 0.04 * (high - low) + 0.1
    span = low - margin, high + margin
    return [
        ClassReport(
            name=name,
            available=count.get("available"),
            short=count.get("short"),
            line=None if np.isnan(line) else float(line),
            kept=mine,
            below=below,
            chart=rank_chart(f"{name}: probability by rank", mine.ranks, mine.log_odds, end=end, span=span),
        )
        for name, count, mine, line, below in zip(
            selected.class_names, counts, kept, _lines(selected, kept), dropped.below, strict=True
        )
    ]


def _changed(outputs: Location, figures: dict[str, Any], shard: Shard) -> bool:
    """Whether the shard's scores are of other content; False where that is not known."""
    mark = figures.get("scores_fingerprint")
    scores = outputs / SCORES
    with storage_errors():
        return bool(mark) and shard_file(scores, shard.name).exists() and not is_scored(shard, scores, str(mark))


def _places(kept: Sequence[KeptClass], dropped: DroppedExamples) -> list[tuple[Place, str | None]]:
    """Where the images of all examples lie, with their keys."""
    lost = [*dropped.least_alike]
    lost += [example for group in (*dropped.below, *dropped.samples.values()) for example in group]
    places: list[tuple[Place, str | None]] = [
        ((POOL, image.shard, image.row), image.key) for group in kept for image in group.examples
    ]
    places += [((POOL, example.shard, example.row), example.key) for example in lost]
    return places + [(place, None) for example in lost if (place := match_place(example)) is not None]
