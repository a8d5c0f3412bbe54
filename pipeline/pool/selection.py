"""The format of selection.parquet: one row per image and class that it serves, by class and rank.

Columns: `key` · `shard`, `row`: the image's identity · `class`: its index · `rank`: 0 is the best ·
`log_odds`, nats, float32, and `probability`, of that class · `repeat`: how often it is used for the class.
The schema's metadata has version, the rules, the class names, and the fingerprints of rules with scores,
and of the scores alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.pool.scored import ScoredPool
from pipeline.pool.select.top_k import Selection
from pipeline.storage.files import Location, whole_file
from pipeline.storage.tables import open_parquet

FORMAT, VERSION = "mpl-selection", "1"


@dataclass(frozen=True, eq=False)
class SelectionFile:
    """A selection as read.

    Attributes:
        table: the columns above.
        fingerprint: of the rules and the scores.
        scores: fingerprint of the scores.
        class_names: of the teacher.
    """

    table: pa.Table
    fingerprint: str
    scores: str
    class_names: tuple[str, ...]


def write_selection(
    path: Location,
    pool: ScoredPool,
    chosen: Selection,
    *,
    kept: NDArray[np.int64],
    keys: pa.Array,
    repeats: Sequence[NDArray[np.int64]],
    fingerprint: str,
    rules: dict[str, object],
) -> None:
    """Write selection.parquet, whole or not at all.

    Args:
        path: of the file.
        pool: the scores.
        chosen: rows by ordinal.
        kept: the ordinals in `chosen`, increasing, each once.
        keys: their keys.
        repeats: per class, how often each row is used.
        fingerprint: of rules and scores.
        rules: to be told in the metadata.
    """
    counts = [len(rows) for rows in chosen.rows]
    ordinals, scores = np.concatenate(chosen.rows), np.concatenate(chosen.scores)  # (rows,)
    part, row = pool.place(ordinals)
    shards = pa.array([info.shard for info in pool.parts], pa.string())
    table = pa.table(
        {
            "key": keys.take(pa.array(np.searchsorted(kept, ordinals))),
            "shard": pa.DictionaryArray.from_arrays(pa.array(part.astype(np.int32)), shards),
            "row": row,
            "class": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            "rank": np.concatenate([np.arange(count, dtype=np.int64) for count in counts]),
            "log_odds": scores,
            "probability": 1 / (1 + np.exp(-scores.astype(np.float64))),
            "repeat": np.concatenate(repeats),
        }
    )
    metadata = {f"mpl.{name}": str(value) for name, value in rules.items()} | {
        "mpl.format": FORMAT,
        "mpl.version": VERSION,
        "mpl.fingerprint": fingerprint,
        "mpl.scores": pool.fingerprint(),
        "mpl.class_names": json.dumps(pool.class_names, ensure_ascii=False),
    }
    with whole_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd", write_page_checksum=True)


def read_selection(path: Location) -> SelectionFile:
    """Read selection.parquet.

    Raises:
        DataError: the file is missing, cut short, damaged, or not a selection of this version.
    """
    try:
        with open_parquet(path, page_checksum_verification=True) as file:
            meta = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
            found = (meta.get("mpl.format", "no selection"), meta.get("mpl.version", "?"))
            if found != (FORMAT, VERSION):
                raise DataError(f"{path} is {found[0]} version {found[1]}, expected {FORMAT} version {VERSION}")
            table = file.read()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not a whole selection ({error}); select again") from error
    return SelectionFile(
        table=table,
        fingerprint=meta["mpl.fingerprint"],
        scores=meta["mpl.scores"],
        class_names=tuple(json.loads(meta["mpl.class_names"])),
    )
