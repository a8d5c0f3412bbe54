"""The rules of a selection, and selection.parquet: one row per image and class that it serves, by class and rank.

Columns: `key` · `shard`, `row`: the image's identity · `class`: its index · `rank`: 0 is the best ·
`log_odds`, nats, float32, and `probability`, of that class · `repeat`: how often it is used for the class.
The header has the rules, the class names, and the fingerprints of rules with scores, and of the scores alone.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.pool.scores import ScoredPool
from pipeline.pool.select.top_k import Assign, Selection, checked_assign, checked_k, upsample
from pipeline.storage.files import Location
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import TableFormat, open_table, write_table

SELECTION = TableFormat("mpl-selection", 1, remedy="run mpl filter again")


@dataclass(frozen=True)
class Rules:
    """What is kept.

    Attributes:
        k: images per class.
        assign: "any" (an image may serve several classes) or "argmax" (its most probable one).
        min_probability: that the teacher must give the class; 0 is no floor.
        copy_threshold: images at least as similar to an evaluation image are copies; None: none is.
        upsample: fill classes short of k by a repeat count.
        copy_calibration: fingerprint of what evaluation images need beyond the threshold; None: nothing.
        keep_copies: whether copies stay candidates.
        correction: fingerprint of what makes the data set's classes of the teacher's; None: they are the same.
    """

    k: int
    assign: Assign = "any"
    min_probability: float = 0.0
    copy_threshold: float | None = None
    upsample: bool = False
    copy_calibration: str | None = None
    keep_copies: bool = False
    correction: str | None = None

    def __post_init__(self) -> None:
        checked_k(self.k)
        checked_assign(self.assign)
        if not 0 <= self.min_probability < 1:
            raise UsageError(f"min_probability (={self.min_probability}) must be at least 0 and below 1")

    @property
    def min_log_odds(self) -> float | None:
        """The floor in nats; None where there is none."""
        p = self.min_probability
        return float(np.log(p) - np.log1p(-p)) if p > 0 else None


@dataclass(frozen=True, eq=False)
class SelectionFile:
    """A selection as read.

    Attributes:
        table: the columns above.
        fingerprint: of the rules and the scores.
        scores: fingerprint of the scores.
        class_names: of the data set.
    """

    table: pa.Table
    fingerprint: str
    scores: str
    class_names: tuple[str, ...]


def selection_fingerprint(pool: ScoredPool, rules: Rules) -> str:
    """Of the scores and the rules; of those that came later, where they change something."""
    later = {"copy_calibration": None, "keep_copies": False, "correction": None}
    values = {name: value for name, value in asdict(rules).items() if name not in later or value != later[name]}
    return fingerprint_of(["selection", pool.fingerprint(), values])


@dataclass(frozen=True, eq=False)
class Kept:
    """The images of a selection, each once.

    Attributes:
        ordinals: increasing, (n,).
        keys: (n,).
        class_names: that they are kept for.
    """

    ordinals: NDArray[np.int64]
    keys: pa.Array
    class_names: tuple[str, ...]


def write_selection(path: Location, pool: ScoredPool, rules: Rules, chosen: Selection, kept: Kept) -> None:
    """Write selection.parquet, whole or not at all.

    Args:
        path: of the file.
        pool: the scores.
        rules: that were followed.
        chosen: rows by ordinal.
        kept: the images in `chosen`.
    """
    counts = [len(rows) for rows in chosen.rows]
    ordinals, scores = np.concatenate(chosen.rows), np.concatenate(chosen.scores)  # (rows,)
    shard, row = pool.place(ordinals)
    names = pa.array([scores.shard for scores in pool.shards], pa.string())
    table = pa.table(
        {
            "key": kept.keys.take(pa.array(np.searchsorted(kept.ordinals, ordinals))),
            "shard": pa.DictionaryArray.from_arrays(pa.array(shard.astype(np.int32)), names),
            "row": row,
            "class": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            "rank": np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
            "log_odds": scores,
            "probability": 1 / (1 + np.exp(-scores.astype(np.float64))),
            "repeat": np.concatenate(upsample(counts, rules.k if rules.upsample else 1)),
        }
    )
    notes = asdict(rules) | {
        "fingerprint": selection_fingerprint(pool, rules),
        "scores": pool.fingerprint(),
        "class_names": kept.class_names,
    }
    write_table(path, SELECTION, table, notes)


def read_selection(path: Location) -> SelectionFile:
    """Read selection.parquet.

    Raises:
        DataError: the file is missing, cut short, damaged, or not a selection of this version.
        RunError: it cannot be reached.
    """
    with open_table(path, SELECTION) as file:
        return SelectionFile(
            table=file.read(),
            fingerprint=file.header.notes["fingerprint"],
            scores=file.header.notes["scores"],
            class_names=file.header.class_names,
        )
