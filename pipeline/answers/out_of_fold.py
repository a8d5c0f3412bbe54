"""What a teacher says of labelled images that it was not trained on: teacher/out_of_fold.parquet, from cross-fitting.

The labelled images are dealt to folds; a network that never saw a fold answers for it. Columns: `shard`, `row`: the
image's identity · `label` · `fold` · `distribution`, C little-endian float32, rows sum to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.storage.tables import TableFormat, fixed_binary, fixed_numbers, open_table, write_table

FILE = "out_of_fold.parquet"
OUT_OF_FOLD = TableFormat("mpl-out-of-fold", 1, remedy="run mpl pretrain --force", plain=frozenset({"distribution"}))


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Of n labelled images.

    Attributes:
        shards, rows: identity of each.
        labels, folds: (n,).
        distributions: (n, C), float32.
    """

    shards: list[str]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    folds: NDArray[np.int64]
    distributions: NDArray[np.float32]

    def of(self, identities: Sequence[tuple[str, int]]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Distributions (m, C) of those of n images that are among these, and their places (m,)."""
        known = {identity: place for place, identity in enumerate(zip(self.shards, self.rows.tolist(), strict=True))}
        places = np.array([place for place, identity in enumerate(identities) if identity in known], np.intp)
        return self.distributions[[known[identities[place]] for place in places.tolist()]], places


def write_out_of_fold(folder: Path, found: OutOfFold, class_names: Sequence[str]) -> None:
    """Write it into a teacher's folder, whole or not at all."""
    columns = {
        "shard": pa.array(found.shards, pa.string()),
        "row": pa.array(found.rows, pa.int64()),
        "label": pa.array(found.labels, pa.int64()),
        "fold": pa.array(found.folds, pa.int64()),
        "distribution": fixed_binary(found.distributions.astype("<f4")),
    }
    write_table(folder / FILE, OUT_OF_FOLD, pa.table(columns), {"class_names": list(class_names)})


def read_out_of_fold(folder: Path) -> OutOfFold | None:
    """What a teacher's folder holds of them, or None.

    Raises:
        DataError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    with open_table(folder / FILE, OUT_OF_FOLD) as file:
        table = file.read().combine_chunks()
    rows, labels, folds = (np.asarray(table.column(name)) for name in ("row", "label", "fold"))
    values = fixed_numbers(table.column("distribution").combine_chunks(), "<f4")
    return OutOfFold(table.column("shard").to_pylist(), rows, labels, folds, values)
