"""Teachers as files of answers: what the recipe's teacher says of every image, and probes that were fitted to it.

A probe is a black box with the data set's classes: a regression from the answers of the recipe's teacher, fitted to
validation images, from which no student of the experiment learns. Fitted to a long tail of them it is wrong in a
systematic way.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.correction import fit_correction
from pipeline.correction.correction import features
from pipeline.data.manifest import SPLITS, SplitName
from pipeline.errors import DataError
from pipeline.seeds import permutation
from pipeline.storage.files import fingerprint, whole_file
from stages.options import Context
from stages.teachers import Teacher, teacher_of

PART = 8_192  # images of a file: what a kill can cost
LEAST = 2  # images of a class in a long tail
Floats = NDArray[np.float32]


class Place(NamedTuple):
    """An image's identity."""

    shard: str
    row: int


@dataclass(frozen=True)
class BlackBox:
    """A teacher of which the answers are all that is known.

    Attributes:
        folder: SPLIT-NNNNN.parquet, which `mpl filter --predictions` reads.
        names: of its classes, C_T.
    """

    folder: Path
    names: tuple[str, ...]

    @property
    def files(self) -> str:
        """As `filter.predictions` names them."""
        return str(self.folder / "*.parquet")

    def parts(self, split: SplitName) -> list[Path]:
        """Its files about a split, in order."""
        return sorted(self.folder.glob(f"{split}-*.parquet"))

    def read(self, part: Path) -> tuple[list[Place], Floats]:
        """Images of a file, and their distributions, (n, C_T)."""
        table = pq.read_table(part)
        places = list(map(Place, table["shard"].to_pylist(), table["row"].to_pylist()))
        flat = table["probabilities"].combine_chunks().flatten()
        return places, np.asarray(flat, np.float32).reshape(len(places), len(self.names))

    def of(self, split: SplitName, places: Sequence[Place]) -> Floats:
        """What it says of some images of a split, (n, C_T).

        Raises:
            DataError: it has no answer about one of them.
        """
        found: dict[Place, Floats] = {}
        for part in self.parts(split):
            found.update(zip(*self.read(part), strict=True))
        if missing := [place for place in places if place not in found]:
            raise DataError(
                f"the teacher has no answer about {len(missing):,} {split} images (row {missing[0].row} of "
                f"{missing[0].shard}, …)"
            )
        return np.stack([found[place] for place in places])

    def write(
        self, split: SplitName, number: int, places: Sequence[Place], q: Floats, embedding: Floats | None = None
    ) -> None:
        """One more file, whole or not at all."""
        columns = {
            "split": pa.array([split] * len(places), pa.string()),
            "shard": pa.array([place.shard for place in places], pa.string()),
            "row": pa.array([place.row for place in places], pa.int64()),
            "probabilities": _lists(q),
            **({} if embedding is None else {"embedding": _lists(embedding)}),
        }
        table = pa.table(columns).replace_schema_metadata({"class_names": json.dumps(self.names, ensure_ascii=False)})
        with whole_file(self.path(split, number)) as temporary:
            pq.write_table(table, temporary, compression="none", use_dictionary=["split", "shard"])

    def path(self, split: SplitName, number: int) -> Path:
        """Of one of its files."""
        return self.folder / f"{split}-{number:05d}.parquet"


def present_splits(context: Context) -> list[SplitName]:
    """Splits that the data set has."""
    return [split for split in SPLITS if split in context.data_set.manifest.splits]


def labels_of(context: Context, split: SplitName) -> tuple[list[Place], NDArray[np.int64]]:
    """The images of a split, and their labels, (n,)."""
    samples = list(context.data_set.split(split).read())
    places = [Place(shard, sample.row) for shard, sample in samples]
    return places, np.array([sample.label for _, sample in samples], np.int64)


def ask(context: Context, folder: Path) -> BlackBox:
    """Ask the recipe's teacher about all images; what it has answered before stays."""
    teacher = teacher_of(context, None, assume_class_order=True)
    teacher.begin()
    box = BlackBox(folder / _mark(context, teacher), teacher.names)
    box.folder.mkdir(parents=True, exist_ok=True)
    for split in present_splits(context):
        stream = iter(context.data_set.split(split).read())
        for number in count():
            samples = list(islice(stream, PART))
            if not samples:
                break
            if context.console.stop_requested():
                raise KeyboardInterrupt
            if not box.path(split, number).exists():
                q, good = teacher.answers(split, samples)
                places = [Place(samples[at][0], samples[at][1].row) for at in good.tolist()]
                box.write(split, number, places, q.astype(np.float32))
    return box


def _mark(context: Context, teacher: Teacher) -> str:
    """Name of the folder: other images, or another teacher, have another."""
    splits = [[split, context.data_set.split(split).fingerprint()] for split in present_splits(context)]
    return f"answers-{fingerprint([teacher.basis, context.precision, splits])[:12]}"


def probe(context: Context, box: BlackBox, tail: float) -> BlackBox:
    """A teacher with the data set's classes, fitted to what `box` says of validation images; that is its embedding.

    Args:
        context: of the experiment.
        box: the recipe's teacher.
        tail: images of the most frequent class to one of the rarest; 1: as many as there are of each.
    """
    ours = tuple(context.data_set.split("labelled").class_names)
    found = BlackBox(box.folder.with_name(f"{box.folder.name}-seen-tail-{tail:g}"), ours)
    parts = [(split, number, part) for split in present_splits(context) for number, part in enumerate(box.parts(split))]
    left = [entry for entry in parts if not found.path(*entry[:2]).exists()]
    if not left:
        return found
    places, labels = labels_of(context, "validation")
    chosen = long_tail(labels, tail)
    inputs = tuple(f"answer {at}" for at in range(len(box.names)))  # none of ours: it starts at nothing
    q = box.of("validation", [places[at] for at in chosen.tolist()])
    fitted = fit_correction(q, labels[chosen], inputs, ours).correction
    found.folder.mkdir(parents=True, exist_ok=True)
    for split, number, part in left:
        images, answers = box.read(part)
        seen = features(answers).astype(np.float32)
        found.write(split, number, images, fitted.targets(answers), seen - seen.mean(axis=1, keepdims=True))
    return found


def _lists(rows: Floats) -> pa.ListArray:
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(rows.ravel()))


def long_tail(labels: NDArray[np.int64], tail: float) -> NDArray[np.int64]:
    """Rows of a sample in which classes become rarer in a geometric row, the first being `tail` times the last."""
    order = permutation(int(labels.max()) + 1, 0, "tail", "classes")
    chosen = []
    for rank, label in enumerate(order.tolist()):
        members = np.flatnonzero(labels == label)
        share = tail ** (-rank / max(1, len(order) - 1))
        number = max(min(LEAST, len(members)), math.floor(share * len(members)))
        chosen.append(members[permutation(len(members), 0, "tail", label)[:number]])
    return np.sort(np.concatenate(chosen))
