"""The Parquet files of ours: what is written is what is read, and what is not ours is refused with what to do."""

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RunError, TargetsError
from pipeline.storage import tables
from pipeline.storage.tables import (
    TableFormat,
    fixed_binary,
    fixed_numbers,
    header_if_whole,
    open_table,
    read_header,
    write_table,
)

KIND = TableFormat(
    "mpl-test", 3, remedy="make it again", readable=(2, 3), error=TargetsError, plain=frozenset({"number"})
)


def write(path: Path, rows: int = 10, kind: TableFormat = KIND, group: int = 4) -> np.ndarray:
    numbers = np.random.RandomState(rows).rand(rows, 3).astype(np.float32)
    table = pa.table({"row": np.arange(rows), "number": fixed_binary(numbers), "text": [f"t{i}" for i in range(rows)]})
    write_table(path, kind, table, {"fingerprint": "f", "class_names": ("a, b", "☃"), "k": 7}, group=group)
    return numbers


def test_header_and_rows_are_those_that_were_written(tmp_path: Path) -> None:
    numbers = write(tmp_path / "t.parquet")
    header = read_header(tmp_path / "t.parquet", KIND)
    assert (header.rows, header.fingerprint, header.class_names) == (10, "f", ("a, b", "☃"))
    assert {name: header.notes[name] for name in ("format", "version", "k")} == {
        "format": "mpl-test", "version": "3", "k": "7",
    }  # fmt: skip
    with open_table(tmp_path / "t.parquet", KIND) as file:
        batches = list(file.batches(["number"], 4))
        assert file.read().column("text").to_pylist() == [f"t{i}" for i in range(10)]
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([fixed_numbers(b.column(0), "<f4") for b in batches]), numbers)


@settings(deadline=None)
@given(st.sets(st.integers(0, 22)), st.sampled_from([1, 4, 30]))
def test_rows_are_taken_from_any_row_groups(tmp_path_factory, places: set[int], group: int) -> None:
    path = tmp_path_factory.mktemp("take") / "t.parquet"
    write(path, 23, group=group)
    with open_table(path, KIND) as file:
        taken = file.take(np.array(sorted(places), np.int64), ["text", "row"])
    assert taken.column_names == ["text", "row"]
    assert taken.column("row").to_pylist() == sorted(places)


def test_what_is_not_ours_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for version, readable in ((2, True), (1, False), (4, False)):
        write(path, kind=TableFormat("mpl-test", version, remedy=""))
        assert (header_if_whole(path, KIND) is not None) == readable
    says = r"t\.parquet is mpl-test version 4, expected mpl-test version 3; make it again"
    with pytest.raises(TargetsError, match=says):
        read_header(path, KIND)
    write(path, kind=TableFormat("mpl-other", 3, remedy=""))
    with pytest.raises(TargetsError, match="is mpl-other version 3, expected mpl-test version 3"):
        read_header(path, KIND)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TargetsError, match=r"t\.parquet is damaged, or no Parquet file .*make it again"):
        read_header(path, KIND)
    with pytest.raises(TargetsError, match=r"gone\.parquet is missing; make it again"):
        read_header(tmp_path / "gone.parquet", KIND)


def test_a_page_that_changed_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    numbers = write(path)
    data = bytearray(path.read_bytes())
    data[data.find(numbers[6].tobytes())] ^= 1
    path.write_bytes(data)
    with open_table(path, KIND) as file, pytest.raises(TargetsError, match=r"t\.parquet is damaged .*make it again"):
        list(file.batches(["number"], 3))


def test_a_place_that_cannot_be_reached_is_not_taken_for_missing(tmp_path: Path, monkeypatch) -> None:
    def unreachable(*_arguments, **_options):
        raise OSError(errno.EIO, "503")

    write(tmp_path / "t.parquet")
    monkeypatch.setattr(tables.pq, "ParquetFile", unreachable)
    for look in (read_header, header_if_whole):
        with pytest.raises(RunError, match=r"cannot be reached .*run the same command again"):
            look(tmp_path / "t.parquet", KIND)
