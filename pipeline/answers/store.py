"""Answers by image: answers/SPLIT--part-SHARD.parquet, one file for each shard of a split, and _manifest.json.

Columns: `row` int64, of the image in its shard, increasing · `distribution`, C_T little-endian float32, rows sum to 1 ·
`embedding`, E little-endian float32, where the predictions have some.
An image without an answer has no row. The header has shard, class names and fingerprint.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.readers.shard import Shard
from pipeline.errors import DataError
from pipeline.storage.files import Location, names_in, opened, unsealed
from pipeline.storage.files import fingerprint as fingerprint_of
from pipeline.storage.tables import TableFormat, fixed_numbers, header_if_whole, open_table

FOLDER = "answers"
MANIFEST = "_manifest.json"
PART = "--part-"  # in a file's name
ANSWERS = TableFormat(
    "mpl-answers",
    1,
    remedy="run mpl filter --force: they are made anew from the predictions",
    plain=frozenset({"distribution"}),
    dictionary=False,
    statistics=False,
)
GROUP_BYTES = 16 << 20  # of a row group


def answers_path(folder: Location, split: str, shard: str) -> Location:
    """Where the answers of a shard lie."""
    return folder / f"{split}{PART}{quote(shard, safe='')}.parquet"


def answers_schema(classes: int, embedding: int = 0) -> pa.Schema:
    """The columns for so many classes, and embeddings of so many numbers."""
    fields = [pa.field("row", pa.int64(), nullable=False), pa.field("distribution", pa.binary(4 * classes))]
    return pa.schema(fields + [pa.field("embedding", pa.binary(4 * embedding))] * (embedding > 0))


def group_rows(classes: int) -> int:
    """Rows of a row group."""
    return max(256, min(1 << 16, GROUP_BYTES // (4 * classes)))


def answers_fingerprint(shard: Shard, fingerprint: str) -> str:
    """Of a shard's answers: its content, and the caller's `fingerprint` of predictions and how they are read."""
    return fingerprint_of(["answers", shard.name, shard.fingerprint(), fingerprint])


def is_imported(folder: Location, split: str, shard: Shard, fingerprint: str) -> bool:
    """Whether the answers of a shard are there, whole and of this fingerprint."""
    header = header_if_whole(answers_path(folder, split, shard.name), ANSWERS)
    return header is not None and header.fingerprint == answers_fingerprint(shard, fingerprint)


def read_answers_manifest(folder: Location) -> dict[str, Any] | None:
    """The manifest of a finished import, or None.

    Raises:
        DataError: it is damaged.
    """
    try:
        with opened(folder / MANIFEST) as file:
            found: dict[str, Any] = unsealed(json.loads(file.read()))
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error}); {ANSWERS.remedy}") from error


def stream_answers(folder: Location, split: str, shard: str, classes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(row, distribution (C_T,)) of the images of a shard that have an answer, in order.

    Raises:
        DataError: the file is missing, damaged, or of other classes.
    """
    with open_table(answers_path(folder, split, shard), ANSWERS) as table:
        for batch in table.batches(["row", "distribution"], group_rows(classes)):
            values = fixed_numbers(batch.column("distribution"), "<f4")
            if values.shape[1] != classes:
                raise DataError(f"{table.path} has {values.shape[1]} classes, expected {classes}; {ANSWERS.remedy}")
            yield from zip(batch.column("row").to_pylist(), values, strict=True)


def embeddings_of_rows(folder: Location, split: str, shard: str, rows: Sequence[int]) -> NDArray[np.float32]:
    """Embeddings of these images of a shard, (n, E), in their order.

    Raises:
        DataError: the predictions have none, or none of one of these images; or the file is damaged.
    """
    found: dict[int, NDArray[np.float32]] = {}
    wanted = set(rows)
    with open_table(answers_path(folder, split, shard), ANSWERS) as table:
        if "embedding" not in table.file.schema_arrow.names:
            raise DataError(
                "precompute.embedding: the predictions have no column `embedding`; add it to the files and run mpl "
                "filter --force, or leave the setting out"
            )
        for batch in table.batches(["row", "embedding"], 4096):
            values = fixed_numbers(batch.column("embedding"), "<f4")
            found |= {row: e for row, e in zip(batch.column("row").to_pylist(), values, strict=True) if row in wanted}
    if lost := [row for row in rows if row not in found]:
        raise DataError(f"{table.path} holds no embedding of row {lost[0]}; {ANSWERS.remedy}")
    return np.stack([found[row] for row in rows])


def answers_trouble(folder: Location) -> str:
    """What is not as it was imported, everything read; empty if all is.

    Raises:
        DataError: a file is damaged.
    """
    manifest = read_answers_manifest(folder)
    if manifest is None:
        return f"{folder} has no manifest; {ANSWERS.remedy}"
    left = Counter(manifest["shards"])
    for name in sorted(name for name in names_in(folder) if PART in name):
        with open_table(folder / name, ANSWERS) as table:
            for _ in table.batches(["row", "distribution"], 4096):
                pass
        header = header_if_whole(folder / name, ANSWERS)
        left[None if header is None else header.fingerprint] -= 1
    if any(left.values()):
        return f"{folder} has other files than were imported; {ANSWERS.remedy}"
    return ""


def answers_of_split(
    folder: Location, split: str, identities: Sequence[tuple[str, int]], classes: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Distributions (m, C_T) of those images of a split that have an answer, and their places (m,).

    Args:
        folder: answers/.
        split: its name.
        identities: (shard, row) of n images.
        classes: C_T.
    """
    found: dict[tuple[str, int], NDArray[np.float32]] = {}
    wanted = set(identities)
    for shard in dict.fromkeys(shard for shard, _ in identities):
        found |= {(shard, row): p for row, p in stream_answers(folder, split, shard, classes) if (shard, row) in wanted}
    places = np.array([place for place, identity in enumerate(identities) if identity in found], np.intp)
    rows = [found[identities[place]] for place in places.tolist()]
    return np.stack(rows) if rows else np.empty((0, classes), np.float32), places
