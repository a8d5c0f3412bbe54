"""The store's Parquet files: written whole, with a fingerprint and a checksum on every page."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import Location, whole_file
from pipeline.storage.tables import open_parquet, require_absence

GROUP = 4096  # rows of a row group, at most …
GROUP_BYTES = 64 << 20  # … and its bytes, about: a reader holds one


def write_targets(path: Location, table: pa.Table, notes: dict[str, str] | None = None) -> None:
    """Write one Parquet file of the store, whole or not at all.

    Args:
        path: where; its name is noted in it, so that a renamed file shows.
        table: its schema is one of `layout`.
        notes: further ones; those of its schema are kept.
    """
    metadata = {**(table.schema.metadata or {}), "mpl.file": path.stem}
    metadata |= {f"mpl.{name}": value for name, value in (notes or {}).items()}
    if "repeat" in table.schema.names:
        metadata["mpl.uses"] = str(int(table.column("repeat").to_numpy().sum()))
    packed = {name: "none" if name == "image" else "zstd" for name in table.schema.names}
    rows = GROUP_BYTES * max(table.num_rows, 1) // max(table.nbytes, 1)
    with whole_file(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            row_group_size=min(max(rows, 64), GROUP),
            compression=packed,
            compression_level={name: 1 for name, codec in packed.items() if codec == "zstd"},
            use_dictionary=["shard"],
            write_statistics=False,
            write_page_checksum=True,
        )


def footer(path: Location) -> tuple[int, dict[str, str]]:
    """Rows of a Parquet file, and the store's notes in it.

    Raises:
        OSError, pa.ArrowInvalid: it is not there, or not whole.
    """
    with open_parquet(path) as file:
        notes = file.metadata.metadata or {}
        return file.metadata.num_rows, {
            key.decode().removeprefix("mpl."): value.decode() for key, value in notes.items() if key.startswith(b"mpl.")
        }


def notes_of(path: Location) -> dict[str, Any] | None:
    """The notes of a whole file under its own name, or None."""
    try:
        notes = footer(path)[1]
    except (OSError, pa.ArrowInvalid) as error:
        require_absence(path, error)
        return None
    return notes if notes.get("file", path.stem) == path.stem else None


def file_is_done(path: Location, fingerprint: str) -> bool:
    """Whether `path` is a whole file of the store with this fingerprint."""
    notes = notes_of(path)
    return notes is not None and notes.get("fingerprint") == fingerprint
