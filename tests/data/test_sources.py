"""Splits over Parquet: which rows, in which order, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import load_manifest
from pipeline.data.readers.parquet import ParquetShard
from pipeline.data.sources import Split, Window, open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise, write_parquet

IMAGE = encode(noise(4))
DataSet = Callable[..., Path]


def opened(path: Path, split: str = "labelled", **options: int) -> Split:
    return open_split(load_manifest(path), split, path.parent, **options)  # type: ignore[arg-type]


def shards_of(folder: Path, sizes: list[int], group: int = 4) -> None:
    """Parquet files `part-0`, `part-1`, …; the bytes and labels count through all of them."""
    total = 0
    for number, size in enumerate(sizes):
        rows = range(total, total + size)
        write_parquet(
            folder / f"part-{number}.parquet",
            [b"%d" % row for row in rows],
            [row % 2 for row in rows],
            group=group,
        )
        total += size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    group=st.integers(1, 5),
    drops=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    count=st.integers(1, 12) | st.none(),
    at_end=st.booleans(),
    first=st.integers(1, 8) | st.none(),
)
def test_split_reads_the_rows_of_one_long_list(
    data_set: DataSet,
    sizes: list[int],
    group: int,
    drops: tuple[int, int],
    count: int | None,
    at_end: bool,
    first: int | None,
) -> None:
    """Oracle: slices of the list of all rows; identities are places in the files."""
    limit = {} if count is None else {"last" if at_end else "first": count}
    path = data_set(
        files={"train": {"glob": "part-*.parquet", "reader": "parquet"}},
        splits={"labelled": {"from": "train", "drop_first": drops[0], "drop_last": drops[1], **limit}},
    )
    for old in path.parent.glob("part-*.parquet"):
        old.unlink()
    shards_of(path.parent, sizes, group)
    rows = list(range(sum(sizes)))[drops[0] :]
    rows = rows[: max(0, len(rows) - drops[1])]
    if count is not None:
        rows = rows[max(0, len(rows) - count) :] if at_end else rows[:count]
    identities = [(f"part-{number}", row) for number, size in enumerate(sizes) for row in range(size)]
    if not rows or (first is not None and len(rows) < first):
        with pytest.raises(DataError, match=r"is empty|were asked for"):
            opened(path, first=first)  # type: ignore[arg-type]
        return
    rows = rows[:first]
    split = opened(path, first=first)  # type: ignore[arg-type]
    read = list(split.read())
    assert [int(sample.data) for _, sample in read] == rows
    assert [(shard, sample.row) for shard, sample in read] == [identities[row] for row in rows]
    assert split.labels().tolist() == [sample.label for _, sample in read] == [row % 2 for row in rows]
    assert split.count() == len(rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(start=st.integers(0, 25), stop=st.integers(0, 25) | st.none(), group=st.integers(1, 7))
def test_shard_and_window_read_slices(tmp_path: Path, start: int, stop: int | None, group: int) -> None:
    """Oracle: slices of the list of rows."""
    path = write_parquet(tmp_path / "a.parquet", [b"%d" % row for row in range(20)], group=group)
    shard = ParquetShard("a", path, label=None)
    assert [sample.row for sample in shard.read(start, stop)] == list(range(20))[start:stop]
    window = Window(shard, 3, 17)
    assert [sample.row for sample in window.read(start, stop)] == list(range(3, 17))[start:stop]
    assert window.rows() == 14


def test_reading_streams(tmp_path: Path) -> None:
    """The first sample is there before the damage at the end of the file is."""
    path = write_parquet(tmp_path / "a.parquet", [noise(24, seed).tobytes() for seed in range(2000)], group=100)
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(15).column(0).data_page_offset
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    samples = ParquetShard("a", path, label=None).read()
    assert next(samples).row == 0
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        list(samples)


def test_keys_are_paths_or_places(tmp_path: Path) -> None:
    rows = write_parquet(tmp_path / "a.parquet", [IMAGE, IMAGE])
    assert [sample.key for sample in ParquetShard("a", rows, label=None).read()] == ["a/0.png", "a/1.png"]
    plain = write_parquet(tmp_path / "b.parquet", [IMAGE, None], plain=True)
    samples = list(ParquetShard("b", plain, label=None).read())
    assert [(sample.key, sample.data) for sample in samples] == [("b-0", IMAGE), ("b-1", b"")]


def test_labels_of_a_pool_are_not_read(data_set: DataSet) -> None:
    path = data_set(splits={"labelled": {"from": "train"}, "unlabelled": {"from": "train"}})
    write_parquet(path.parent / "train.parquet", [IMAGE] * 3, [0, 7, None])
    pool = opened(path, "unlabelled")
    assert [sample.label for _, sample in pool.read()] == [-1, -1, -1] == pool.labels().tolist()


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, 1, 2], None, r"labelled split, train: row 2 has label 2; labels run from 0 to 1 \(2 classes"),
        ([0, -3, 1], None, "row 1 has label -3"),
        ([0, None, 1], None, "row 1 has no label"),
        (["cat", "dog", "cow"], None, "row 2 has the label 'cow', which is no class name"),
        ([0.0, 1.5, 1.0], None, "column 'label' is double; labels are integers or names"),
    ],
)
def test_bad_labels_name_file_row_and_value(
    data_set: DataSet, labels: list[object], kind: pa.DataType | None, message: str
) -> None:
    path = data_set()
    write_parquet(path.parent / "train.parquet", [IMAGE] * 3, labels, label_type=kind)
    for act in (lambda split: list(split.read()), lambda split: split.labels()):
        with pytest.raises(DataError, match=message):
            act(opened(path))


def test_a_cut_split_names_the_row_of_the_file(data_set: DataSet) -> None:
    path = data_set(splits={"labelled": {"from": "train", "drop_first": 2}})
    write_parquet(path.parent / "train.parquet", [IMAGE] * 4, [0, 0, 1, 9])
    with pytest.raises(DataError, match="row 3 has label 9"):
        opened(path).labels()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_labels_may_be_names(data_set: DataSet, kind: pa.DataType) -> None:
    path = data_set()
    write_parquet(path.parent / "train.parquet", [IMAGE] * 3, ["dog", "cat", "dog"], label_type=kind)
    assert opened(path).labels().tolist() == [1, 0, 1]
    assert [sample.label for _, sample in opened(path).read()] == [1, 0, 1]


def test_class_names_come_from_the_file_if_the_manifest_has_none(data_set: DataSet) -> None:
    path = data_set(class_names=[])
    train = path.parent / "train.parquet"
    write_parquet(train, [IMAGE], [1], names=["ape", "bee"])
    assert opened(path).class_names == ("ape", "bee")
    write_parquet(train, [IMAGE], [1])
    assert opened(path).class_names == ("0", "1")
    write_parquet(train, [IMAGE], [1], names=["ape", "bee", "cow"])
    with pytest.raises(DataError, match="train has 3 classes, the manifest says 2"):
        opened(path)


@pytest.mark.parametrize("class_names", [["cat", "dog"], []])
def test_labels_are_read_by_the_names_of_their_file(data_set: DataSet, class_names: list[str]) -> None:
    """In every file of a split: another order, fewer of the classes; what cannot be mapped is refused."""
    path = data_set(
        class_names=class_names,
        files={"a": {"path": "train.parquet", "reader": "parquet"}, "b": {"glob": "b-*.parquet", "reader": "parquet"}},
        splits={"labelled": {"from": "a"}, "test": {"from": "b"}},
    )
    write_parquet(path.parent / "train.parquet", [IMAGE] * 2, [0, 1], names=["cat", "dog"])
    write_parquet(path.parent / "b-0.parquet", [IMAGE] * 2, [0, 1], names=["cat", "dog"])
    write_parquet(path.parent / "b-1.parquet", [IMAGE] * 3, [0, 1, 0], names=["dog", "cat"])
    write_parquet(path.parent / "b-2.parquet", [IMAGE] * 2, [0, 0], names=["dog"])
    split = open_split(load_manifest(path), "test")
    assert split.labels().tolist() == [0, 1, 1, 0, 1, 1, 1] == [sample.label for _, sample in split.read()]
    assert [sample.label for sample in split.shards[1].read(1, 3)] == [0, 1]
    write_parquet(path.parent / "b-2.parquet", [IMAGE], [1], names=["dog"])
    with pytest.raises(DataError, match="b-2: row 0 has label 1; the file names 1 classes"):
        open_split(load_manifest(path), "test").labels()
    write_parquet(path.parent / "b-2.parquet", [IMAGE], [0], names=["cow", "dog"])
    with pytest.raises(DataError, match="states the class 'cow', which the data set lacks; its classes are cat, dog"):
        open_split(load_manifest(path), "test")


def test_a_number_has_one_meaning_in_a_data_set(data_set: DataSet) -> None:
    """Classes named by numbers are read by name; where bare integers could be places or names, they are refused."""
    path = data_set(class_names=["1", "2"])
    train = path.parent / "train.parquet"
    write_parquet(train, [IMAGE] * 3, ["2", "01", "2"], label_type=pa.string())
    assert opened(path).labels().tolist() == [1, 0, 1]
    write_parquet(train, [IMAGE], ["0"], label_type=pa.string())  # no place, although it could be one
    with pytest.raises(DataError, match="label '0', which is no class name"):
        opened(path).labels()
    write_parquet(train, [IMAGE], [1])
    with pytest.raises(DataError, match="does not say whether its numbers are these names or places"):
        opened(path)
    write_parquet(train, [IMAGE] * 2, [0, 1], names=["2", "1"])
    assert opened(path).labels().tolist() == [1, 0]
    path = data_set(class_names=["0", "1"])
    write_parquet(train, [IMAGE] * 2, [0, 1])
    assert opened(path).labels().tolist() == [0, 1]


@pytest.mark.parametrize("names", [["cat", "cat"], ["1", "01"], ["caf\u00e9", "cafe\u0301"], ["a", "a "]])
def test_two_classes_of_one_name_are_refused(data_set: DataSet, names: list[str]) -> None:
    path = data_set(class_names=[])
    write_parquet(path.parent / "train.parquet", [IMAGE], [1], names=names)
    with pytest.raises(DataError, match="two classes have one name"):
        opened(path)
    with pytest.raises(DataError, match="class_names has a name twice"):
        load_manifest(data_set(class_names=names))


def test_missing_things_are_named_with_the_remedy(data_set: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar10 needs cifar10/train\.parquet.*--data DIR or set MPL_DATA"):
        open_split(load_manifest("cifar10"), "labelled")
    with pytest.raises(DataError, match=r"needs cifar10/train\.parquet, and there is nothing of that name in"):
        open_split(load_manifest("cifar10"), "labelled", tmp_path)
    with pytest.raises(DataError, match=r"needs tinyimagenet32/pool-\*\.parquet"):
        open_split(load_manifest("cifar10"), "unlabelled", tmp_path)
    with pytest.raises(DataError, match="no test split; it has labelled"):
        opened(data_set(), "test")


def test_stated_bytes_and_rows_are_checked(data_set: DataSet) -> None:
    path = data_set(files={"train": {"path": "train.parquet", "reader": "parquet", "bytes": 5}})
    write_parquet(path.parent / "train.parquet", [IMAGE] * 3, [0, 1, 0])
    with pytest.raises(DataError, match="the manifest of mine says 5: it was cut short"):
        opened(path)
    path = data_set(files={"train": {"path": "train.parquet", "reader": "parquet", "rows": 4}})
    with pytest.raises(DataError, match=r"has 3 rows, the manifest says 4: a file is missing"):
        opened(path)


def test_empty_splits_are_refused(data_set: DataSet) -> None:
    splits = {"labelled": {"from": "train"}, "unlabelled": {"from": "train", "drop_first": 9}}
    path = data_set(splits=splits)
    write_parquet(path.parent / "train.parquet", [], [], label_type=pa.int64())
    with pytest.raises(DataError, match="the labelled split of mine is empty"):
        opened(path)
    write_parquet(path.parent / "train.parquet", [IMAGE], [0])
    with pytest.raises(DataError, match="the unlabelled split of mine is empty"):
        opened(path, "unlabelled")
    with pytest.raises(DataError, match="has 1 rows; 2 were asked for"):
        opened(path, first=2)


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_file_cut_short_is_refused(data_set: DataSet, keep: int) -> None:
    path = data_set()
    train = write_parquet(path.parent / "train.parquet", [noise(9, i).tobytes() for i in range(9)], [0] * 9)
    train.write_bytes(train.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet.*get it again"):
        opened(path)


def test_a_wrong_column_is_named(data_set: DataSet) -> None:
    path = data_set(files={"train": {"path": "train.parquet", "reader": "parquet", "image": "img"}})
    write_parquet(path.parent / "train.parquet", [IMAGE], [0])
    with pytest.raises(DataError, match=r"no column 'img'; it has image, label\. Name the right one"):
        list(opened(path).read())
    pq.write_table(pa.table({"image": [3], "label": [0]}), path.parent / "train.parquet")
    with pytest.raises(DataError, match="column 'image' is int64; images are binary or struct"):
        list(opened(data_set()).read())


def test_shard_names_are_unique_and_do_not_depend_on_the_place(data_set: DataSet) -> None:
    path = data_set(files={"train": {"glob": "**/*.parquet", "reader": "parquet"}})
    write_parquet(path.parent / "a" / "x.parquet", [IMAGE], [0])
    write_parquet(path.parent / "b" / "y.parquet", [IMAGE], [0])
    assert [shard.name for shard in opened(path).shards] == ["x", "y"]
    write_parquet(path.parent / "b" / "x.parquet", [IMAGE], [0])
    assert [shard.name for shard in opened(path).shards] == ["a--x.parquet", "b--x.parquet", "b--y.parquet"]


def test_fingerprint_follows_content_and_rows(data_set: DataSet) -> None:
    path = data_set()
    train = path.parent / "train.parquet"
    write_parquet(train, [IMAGE] * 3, [0, 1, 0])
    before = opened(path).fingerprint()
    assert opened(path).fingerprint() == before
    assert opened(path, first=2).fingerprint() != before
    write_parquet(train, [IMAGE, IMAGE, encode(noise(4, 1))], [0, 1, 0])
    assert opened(path).fingerprint() != before


def test_whole_shards_of_a_pool_are_not_counted(data_set: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting thousands of tars would take long; only the first is asked whether it has anything."""
    path = data_set(
        files={"train": {"glob": "part-*.parquet", "reader": "parquet"}},
        splits={"unlabelled": {"from": "train"}},
    )
    shards_of(path.parent, [3, 3, 3])
    asked: list[str] = []
    rows = ParquetShard.rows
    monkeypatch.setattr(ParquetShard, "rows", lambda shard: asked.append(shard.name) or rows(shard))
    opened(path, "unlabelled")
    assert asked == ["part-0"]


def test_labels_equal_numpy(tmp_path: Path) -> None:
    labels = np.random.RandomState(0).randint(0, 5, 1000)
    path = write_parquet(tmp_path / "a.parquet", [b"x"] * 1000, labels.tolist(), group=77)
    shard = ParquetShard("a", path)
    np.testing.assert_array_equal(shard.labels(), labels)
    assert [sample.label for sample in shard.read(500, 700)] == labels[500:700].tolist()
