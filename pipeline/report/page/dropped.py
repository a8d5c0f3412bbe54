"""Examples out of rejected/part-*.parquet: those just below each line, copies, repeats, and a few of the rest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.pool.rejected import BELOW_K, BELOW_PROBABILITY, EVAL_COPY, REASONS, REJECTED, REPEAT_OF, SCHEMA
from pipeline.pool.scores import shard_file, shard_of_file
from pipeline.report.page.examples import TopRows, scramble
from pipeline.report.page.kept import codes
from pipeline.storage.files import Location, storage_errors
from pipeline.storage.tables import open_table

BATCH = 1 << 16  # rows in memory at a time
LEAST_ALIKE = len(REASONS)  # a group of its own: the copies that are nearest to being honest images
TEXTS = {"shard": pa.string(), "reason": pa.string()}  # columns that are dictionaries in the file
FIELDS = pa.schema([(field.name, TEXTS.get(field.name, field.type)) for field in SCHEMA])


@dataclass(frozen=True)
class Dropped:
    """An image that was left out.

    Attributes:
        key, shard, row: of the image.
        reason: one of REASONS.
        label: where it missed a line, the class that it missed by least, or None.
        log_odds, needed: of that class, nats, or None.
        similarity, match: to the evaluation image or the earlier image of the pool that it repeats, or None.
        mirrored: whether it is like the mirrored evaluation image, or None.
        detail: what the decoder said, or None.
    """

    key: str
    shard: str
    row: int
    reason: str
    label: int | None
    log_odds: float | None
    needed: float | None
    similarity: float | None
    match: str | None
    mirrored: bool | None
    detail: str | None


@dataclass(frozen=True)
class DroppedExamples:
    """Examples, and how many images there are.

    Attributes:
        counts: images by reason, in the shards looked at.
        below: per class, those nearest to its line, nearest first. An image stands at the class that it missed
            by least.
        least_alike: removed copies with the lowest similarity, lowest first.
        samples: by reason, drawn evenly.
        missing: shards whose rejects are not there, or belong to another selection.
        problem: what is wrong with the first of them.
    """

    counts: Counter[str]
    below: list[tuple[Dropped, ...]]
    least_alike: tuple[Dropped, ...]
    samples: dict[str, tuple[Dropped, ...]]
    missing: tuple[str, ...]
    problem: str


def nats(log_odds: float) -> str:
    """Log-odds to four decimals."""
    return f"{log_odds:.4f}".replace("-", "−")


def why(dropped: Dropped, class_names: Sequence[str]) -> str:
    """In a sentence, why an image was left out."""
    if dropped.label is not None and dropped.log_odds is not None and dropped.needed is not None:
        return f"{class_names[dropped.label]}: log-odds {nats(dropped.log_odds)}, needs {nats(dropped.needed)}"
    if dropped.match is not None:
        mirrored = ", mirrored" if dropped.mirrored else ""
        return f"similarity {dropped.similarity:.4f} to {dropped.match}{mirrored}"
    return dropped.detail or dropped.reason


def rejected_shards(folder: Location) -> list[str]:
    """The shards of the pool, sorted, as the files in `folder` name them.

    Raises:
        DataError: object storage does not answer.
    """
    try:
        with storage_errors():
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}") from error
    return sorted(shard_of_file(name) for name in names if name.startswith("part-"))


def find_dropped(
    folder: Location,
    shards: Sequence[str],
    classes: int,
    fingerprint: str,
    *,
    below: int,
    samples: int,
) -> DroppedExamples:
    """Read the rejects of `shards` once, in batches.

    Args:
        folder: rejected/.
        shards: to look into.
        classes: of the teacher.
        fingerprint: of the selection that the rejects must belong to.
        below: examples per class below its line.
        samples: examples per reason.
    """
    near, rest = TopRows(classes, below, FIELDS), TopRows(len(REASONS) + 1, samples, FIELDS)
    counts = np.zeros(len(REASONS), np.int64)
    missing: dict[str, str] = {}
    for number, shard in enumerate(shards):
        path = shard_file(folder, shard)
        try:
            with open_table(path, REJECTED) as file:
                if file.header.fingerprint != fingerprint:
                    missing[shard] = f"{path} belongs to another selection; {REJECTED.remedy}"
                    continue
                for batch in file.batches(FIELDS.names, BATCH):
                    rows = pa.Table.from_batches([batch]).cast(FIELDS)
                    reason = codes(batch.column("reason"), REASONS)
                    counts += np.bincount(reason, minlength=len(REASONS))
                    _offer_below(near, rows, classes)
                    _offer_others(rest, rows, reason, number)
        except DataError as error:
            missing[shard] = str(error)
    return DroppedExamples(
        counts=Counter({name: int(n) for name, n in zip(REASONS, counts, strict=True) if n}),
        below=[_examples(near, label) for label in range(classes)],
        least_alike=_examples(rest, LEAST_ALIKE),
        samples={name: examples for code, name in enumerate(REASONS) if (examples := _examples(rest, code))},
        missing=tuple(missing),
        problem=next(iter(missing.values()), ""),
    )


def _offer_below(near: TopRows, rows: pa.Table, classes: int) -> None:
    """Offer those that missed a line to its class, by their log-odds."""
    label = rows.column("class").fill_null(-1).to_numpy()
    places = np.flatnonzero((label >= 0) & (label < classes))
    log_odds = rows.column("log_odds").to_numpy().astype(np.float64)
    near.add(label[places].astype(np.int64), log_odds[places], rows.take(pa.array(places)))


def _offer_others(rest: TopRows, rows: pa.Table, reason: NDArray[np.int64], shard: int) -> None:
    """Offer all others by chance, and copies also by how little they are alike."""
    places = np.flatnonzero((reason != BELOW_K) & (reason != BELOW_PROBABILITY))
    others, reason = rows.take(pa.array(places)), reason[places]
    rest.add(reason, scramble(shard, others.column("row").to_numpy()), others)
    copies = np.flatnonzero(reason == EVAL_COPY)
    alike = others.column("similarity").to_numpy().astype(np.float64)[copies]
    rest.add(np.full(len(copies), LEAST_ALIKE), -alike, others.take(pa.array(copies)))


def _examples(best: TopRows, group: int) -> tuple[Dropped, ...]:
    return tuple(Dropped(label=row.pop("class"), **row) for row in best.of(group)[1])


def match_place(dropped: Dropped) -> tuple[str, str, int] | None:
    """Where the image lies that a copy or a repeat matches: split, shard, row; None where that is not known."""
    split, rest = "unlabelled", dropped.match or ""
    if dropped.reason == REASONS[EVAL_COPY]:
        split, _, rest = rest.partition("/")
    elif dropped.reason != REASONS[REPEAT_OF]:
        return None
    shard, _, row = rest.rpartition("/")
    return (split, shard, int(row)) if shard and row.isdigit() else None
