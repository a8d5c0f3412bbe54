"""Tables of a person's images: which file has which label, and in which split it is.

CSV, TSV, JSON lines and Parquet; Hugging Face's `metadata.csv` and `metadata.jsonl` are such tables.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.get.layout import SPLIT_WORDS
from pipeline.data.manifest import SplitName
from pipeline.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
Kind = Literal["file", "label", "split"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "file": ("file_name", "filename", "file", "path", "filepath", "file_path", "image", "image_path", "image_file",
             "image_name", "image_filename", "img", "img_path", "img_name"),
    "label": ("label", "labels", "class", "class_name", "classname", "category", "target", "label_name"),
    "split": ("split", "subset", "partition", "set"),
}  # fmt: skip
"""Names that a column may have, without regard to case, when nobody says which it is."""


@dataclass(frozen=True)
class Listed:
    """A row of a table. `label` None: it has none; `split` None: to be divided."""

    file: str
    label: str | None
    split: SplitName | None


def read_table(path: Path, columns: Mapping[str, str], root: Path) -> tuple[list[Listed], bool]:
    """The rows of a table of files, and whether it has labels at all.

    Args:
        path: the table.
        columns: which column is what, where a person said so: of `file`, `label` and `split`.
        root: where its files lie; a table without a header is recognised by a first row that names one.

    Raises:
        DataError: it cannot be read, has no column of files, or two that may be the label; or a split of no known name.
    """
    table = _columns(path, root)
    names = {kind: find_column(kind, list(table), columns, path) for kind in COLUMNS}
    if names["file"] is None:
        raise DataError(f"{path}: no column names files; it has {', '.join(table)}. Say which: --column file=NAME")
    files = [_text(value) for value in table[names["file"]]]
    count = len(files)
    labels = _labels(table[names["label"]]) if names["label"] else [None] * count
    splits = _splits(table[names["split"]], path, names["split"]) if names["split"] else [None] * count
    rows = [Listed(*row) for row in zip(files, labels, splits, strict=True) if row[0]]
    return rows, names["label"] is not None


def find_column(kind: Kind, present: Sequence[str], given: Mapping[str, str], path: Path) -> str | None:
    """The name of the column that is the file, the label or the split; None if there is none.

    Raises:
        DataError: the column that a person named is not there; or there are two.
    """
    if kind in given:
        if given[kind] and given[kind] not in present:
            raise DataError(f"{path} has no column {given[kind]!r}; it has {', '.join(present)}")
        return given[kind] or None
    known = [name for name in present if name.strip().lower() in COLUMNS[kind]]
    if len(known) > 1:
        raise DataError(f"{path}: the {kind} may be column {' or '.join(known)}. Say which: --column {kind}={known[0]}")
    return known[0] if known else None


def _columns(path: Path, root: Path) -> dict[str, list[Any]]:
    """The columns by name, values as the file has them."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
            return {name: table[name].to_pylist() for name in table.column_names}
        with path.open(encoding=_encoding(path), newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                return _delimited(list(csv.reader(file, delimiter=_delimiter(path))), path, root)
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: each line must be a JSON object")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def _encoding(path: Path) -> str:
    """UTF-8, or UTF-16 as spreadsheets write it."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _delimiter(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding=_encoding(path)) as file:
        first = file.readline()
    return max(",;\t", key=first.count)  # a spreadsheet of many countries writes semicolons


def _delimited(rows: list[list[str]], path: Path, root: Path) -> dict[str, list[Any]]:
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise DataError(f"{path} is empty")
    header: list[str] = [cell.strip() for cell in rows[0]]
    if 2 <= len(header) <= 3 and (root / header[0]).is_file():
        header, rows = (
            [str(kind) for kind in COLUMNS][: len(header)],
            [rows[0], *rows],
        )  # there is none: the first row is an image
    if len(set(header)) < len(header):
        raise DataError(f"{path}: two columns have one name; the header is {', '.join(header)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}")
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(header)}


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()  # NaN is no label


def _labels(values: list[Any]) -> list[str | None]:
    """As text, None for an empty one; whole numbers that were written as real ones (`3.0`) without the point."""
    texts = [_text(value) for value in values]
    whole = all(text.removesuffix(".0").isdecimal() for text in texts if text)
    return [(text.removesuffix(".0") if whole else text) or None for text in texts]


def _splits(values: list[Any], path: Path, column: str) -> list[SplitName | None]:
    unknown = {_text(value) for value in values if _text(value) and _text(value).lower() not in SPLIT_WORDS}
    if unknown:
        raise DataError(
            f"{path}: column {column!r} has {sorted(unknown)[0]!r}, which is no split; splits are "
            f"{', '.join(SPLIT_WORDS)}. If the column is something else: --column split="
        )
    return [SPLIT_WORDS.get(_text(value).lower()) for value in values]
