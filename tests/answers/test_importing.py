"""Answers joined to images: by key with or without suffix, by shard and row; what is counted; memory and order."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.answers import buckets
from pipeline.answers.deal import Deal
from pipeline.answers.importing import Predictions, import_predictions
from pipeline.answers.join import NOBODY, SEVERAL, SplitIndex
from pipeline.answers.reading import find_predictions
from pipeline.answers.store import answers_of_split, stream_answers
from pipeline.errors import DataError
from tests.conftest import MemoryShard

NAMES = ("cat", "dog", "owl")


def shard(name: str, keys: list[str], first: int = 0) -> MemoryShard:
    return MemoryShard(name, tuple(b"x" for _ in keys), first, tuple(keys))


def rows(n: int, seed: int = 0, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), n).astype(np.float32)


def write(path: Path, keys: list[str], p: np.ndarray, names: tuple[str, ...] = NAMES, **more: list) -> Path:
    table = pa.table({"key": keys, "probabilities": p.tolist(), **more})
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(names)}), path)
    return path


def take(folder: Path, *paths: Path | list[Path], splits: dict | None = None, **options) -> dict:
    teachers = tuple(
        tuple(f for one in (path if isinstance(path, list) else [path]) for f in find_predictions(str(one)))
        for path in paths
    )
    predictions = Predictions(teachers, options.pop("form", None), options.pop("names", None), NAMES)
    return import_predictions(folder / "answers", folder / "scratch", predictions, splits or SPLITS, "mark", **options)


SPLITS = {
    "unlabelled": [shard("a", ["x/0.png", "x/1.png", "x/2.jpg"]), shard("b", ["3", "4"], first=7)],
    "labelled": [shard("l", ["y/0.png"])],
}


def test_keys_with_or_without_suffix() -> None:
    index = SplitIndex(SPLITS["unlabelled"])
    keys = ["x/1.png", "x/1", "3", "3.jpg", "x/2.png", "nobody", "4.JPEG", "3.v2"]
    assert index.by_key(pa.array(keys)).tolist() == [1, 1, 3, 3, NOBODY, NOBODY, 4, NOBODY]
    assert index.by_place(pa.array(["a", "b", "b", "c"]), np.array([2, 7, 9, 0])).tolist() == [2, 3, NOBODY, NOBODY]
    twice = SplitIndex([shard("a", ["k", "k", "m.png", "m.jpg"])])
    assert twice.by_key(pa.array(["k", "m", "m.png"])).tolist() == [SEVERAL, SEVERAL, 2]


def test_answers_are_dealt_to_shards_and_counted(tmp_path: Path) -> None:
    keys = ["4", "x/1", "y/0.png", "stranger", "x/0.png", "x/0.png", "3.png"]
    p = rows(7)
    p[5] = p[4]
    found = take(tmp_path, write(tmp_path / "p.parquet", keys, p))
    assert found["answered"] == {"unlabelled": 4, "labelled": 1}
    assert (found["rows"], found["unmatched"], found["doubled"], found["ambiguous"]) == (7, 1, 1, 0)
    a = dict(stream_answers(tmp_path / "answers", "unlabelled", "a", 3))
    b = dict(stream_answers(tmp_path / "answers", "unlabelled", "b", 3))
    assert (sorted(a), sorted(b)) == ([0, 1], [7, 8])
    np.testing.assert_allclose(b[8], p[0], atol=1e-6)
    np.testing.assert_allclose(a[1], p[1], atol=1e-6)
    q, places = answers_of_split(tmp_path / "answers", "unlabelled", [("a", 2), ("b", 7)], 3)
    assert places.tolist() == [1]
    np.testing.assert_allclose(q[0], p[6], atol=1e-6)
    assert not (tmp_path / "scratch").exists()
    assert take(tmp_path, tmp_path / "p.parquet") == found  # and nothing is read again


def test_a_key_of_two_splits_is_of_none_unless_the_split_is_said(tmp_path: Path) -> None:
    """Photographs of one name in two folders: an answer about one must not be taken for the other's."""
    splits = {"unlabelled": [shard("p", ["0.jpg", "1.jpg"])], "labelled": [shard("l", ["0.jpg", "2.jpg"])]}
    p = rows(3)
    found = take(tmp_path / "a", write(tmp_path / "a.parquet", ["0.jpg", "1.jpg", "2"], p), splits=splits)
    assert (found["answered"], found["ambiguous"]) == ({"unlabelled": 1, "labelled": 1}, 1)
    said = write(tmp_path / "b.parquet", ["0.jpg", "0.jpg", "1.jpg"], p, split=["pool", "train", "pool"])
    found = take(tmp_path / "b", said, splits=splits)
    assert (found["answered"], found["ambiguous"]) == ({"unlabelled": 2, "labelled": 1}, 0)
    np.testing.assert_allclose(dict(stream_answers(tmp_path / "b/answers", "labelled", "l", 3))[0], p[1], atol=1e-6)


def test_teachers_are_averaged_and_one_teacher_may_not_contradict_itself(tmp_path: Path) -> None:
    p, q = rows(2), rows(2, seed=1)
    one, other = (write(tmp_path / name, ["3", "4"], values) for name, values in (("a.parquet", p), ("b.parquet", q)))
    take(tmp_path, one, other)
    found = dict(stream_answers(tmp_path / "answers", "unlabelled", "b", 3))
    np.testing.assert_allclose([found[7], found[8]], (p + q) / 2, atol=1e-6)
    with pytest.raises(DataError, match=r"two answers about b row 7 \(3\) disagree, by .* rows 0 and 0"):
        take(tmp_path / "again", [one, other])


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    p = rows(2)
    found = take(tmp_path, write(tmp_path / "p.parquet", ["3", "4"], p[:, [2, 0, 1]], ("owl", "cat", "dog")))
    assert found["class_names"] == list(NAMES)
    np.testing.assert_allclose(dict(stream_answers(tmp_path / "answers", "unlabelled", "b", 3))[7], p[0], atol=1e-6)
    more = write(tmp_path / "q.parquet", ["3"], rows(1), ("owl", "cat", "fox"))
    with pytest.raises(DataError, match="has other classes than"):
        take(tmp_path / "more", tmp_path / "p.parquet", more)


def test_what_matches_nothing_is_refused_with_keys_of_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", ["u", "v"], rows(2))
    with pytest.raises(DataError, match=r"no key is that of an image. Keys there: 'u', 'v'; of the images: 'x/0.png'"):
        take(tmp_path, path)
    one = write(tmp_path / "one.parquet", ["3"], np.ones((1, 1), np.float32), ("cat",))
    with pytest.raises(DataError, match="has 1 class; an answer chooses among at least two"):
        take(tmp_path, one)


def test_order_and_buckets_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in any order, by one bucket or by many, from one file or several."""
    keys = [f"k{i}" for i in range(500)]
    splits = {"unlabelled": [shard(f"s{i}", keys[100 * i : 100 * i + 100]) for i in range(5)]}
    p, order = rows(500), np.random.default_rng(1).permutation(500)
    take(tmp_path / "one", write(tmp_path / "a.parquet", keys, p), splits=splits)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 2000)
    monkeypatch.setattr(buckets, "WAITING_BYTES", 3000)
    parts = [
        write(tmp_path / f"{i}.parquet", [keys[j] for j in some], p[some]) for i, some in enumerate(np.split(order, 4))
    ]
    take(tmp_path / "many", parts, splits=splits)
    for path in (tmp_path / "one/answers").glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "many/answers" / path.name))


def test_an_answer_that_comes_late_is_not_lost(tmp_path: Path) -> None:
    """Its shard was written already, by this import or by one that was killed."""
    keys = ["x/0", "x/1", "3", "x/2", "4"]
    p = rows(5)
    path = write(tmp_path / "p.parquet", keys, p)
    take(tmp_path, path)
    (tmp_path / "answers/_manifest.json").unlink()
    early = write(tmp_path / "early.parquet", keys[:3], p[:3])
    take(tmp_path / "early", early)
    for name in ("unlabelled--part-a.parquet", "unlabelled--part-b.parquet"):  # of the same fingerprint
        (tmp_path / "early/answers" / name).replace(tmp_path / "answers" / name)
    found = take(tmp_path, path)
    assert found["answered"]["unlabelled"] == 5
    assert sorted(dict(stream_answers(tmp_path / "answers", "unlabelled", "a", 3))) == [0, 1, 2]
    assert sorted(dict(stream_answers(tmp_path / "answers", "unlabelled", "b", 3))) == [7, 8]


def test_killed_it_begins_again_and_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.parquet", ["x/0", "3", "4", "y/0"], rows(4))
    whole = take(tmp_path / "whole", path)
    original, calls = Deal._finish, []

    def dies(deal) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(deal)

    monkeypatch.setattr(Deal, "_finish", dies)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "killed", path)
    (done,) = (tmp_path / "killed/answers").iterdir()
    before = done.stat().st_mtime_ns
    monkeypatch.setattr(Deal, "_finish", original)
    assert take(tmp_path / "killed", path) == whole
    assert done.stat().st_mtime_ns == before


def test_a_split_that_is_said_and_is_another_is_counted(tmp_path: Path) -> None:
    """The key is of one image alone: the answer is its, and the contradiction is told."""
    path = write(tmp_path / "p.parquet", ["3", "4", "y/0"], rows(3), split=["test", "pool", "labelled"])
    found = take(tmp_path, path)
    assert found["answered"] == {"unlabelled": 2, "labelled": 1}
    assert found["elsewhere"] == 1


def test_classes_that_a_person_states_may_not_contradict_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", ["3", "4"], rows(2))
    take(tmp_path, path, names=NAMES)
    with pytest.raises(DataError, match=r"states its classes .*another order"):
        take(tmp_path / "other", path, names=NAMES[::-1])


def test_only_buckets_are_removed_from_the_folder_of_buckets(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch/mine.txt").write_text("mine")
    (tmp_path / "scratch/unlabelled-00000.rows").write_bytes(b"old")
    take(tmp_path, write(tmp_path / "p.parquet", ["4", "3"], rows(2)))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["mine.txt"]


def test_a_file_of_that_very_name_comes_before_a_glob(tmp_path: Path) -> None:
    for name in ("ans1.parquet", "ans[1].parquet"):
        write(tmp_path / name, ["3"], rows(1))
    assert [file.place.name for file in find_predictions(str(tmp_path / "ans[1].parquet"))] == ["ans[1].parquet"]
    assert [file.place.name for file in find_predictions(str(tmp_path / "ans*.parquet"))] == [
        "ans1.parquet", "ans[1].parquet",
    ]  # fmt: skip
    (tmp_path / "ans[1].parquet").unlink()
    assert [file.place.name for file in find_predictions(str(tmp_path / "ans[1].parquet"))] == ["ans1.parquet"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    for stated in (tmp_path / "a.csv", tmp_path / "*.csv"):
        with pytest.raises(DataError, match="there is no such file"):
            find_predictions(str(stated))
    with pytest.raises(DataError, match="names no file"):
        find_predictions(" ")


@pytest.mark.parametrize(
    "state",
    [
        {"_data_files": [{"filename": "/etc/passwd"}]},
        {"_data_files": [{"filename": "../p.arrow"}]},
        {},
        {"_data_files": [{}]},
        [],
        "text",
        {"_data_files": 3},
    ],
)
def test_a_datasets_state_names_plain_files_in_its_folder(tmp_path: Path, state: object) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="cannot be looked up"):
        find_predictions(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("key,label\n3,1.0\n4,2.0\n", ("0.5", "1.0", "2.0"), [1, 2]),  # names, and no places
        ("key,label\n3,NA\n4,dog\n", ("NA", "dog", "owl"), [0, 1]),
        ("key,label\n3,true\n4,false\n", ("false", "true"), [1, 0]),
        ("key,label\n3,010\n4,08\n", ("08", "010", "16"), [1, 0]),
        ("key,votes\n3,1\n4,2\n", ("2", "1"), [1, 0]),
    ],
)
def test_labels_in_a_csv_are_text(tmp_path: Path, text: str, names: tuple[str, ...], expected: list[int]) -> None:
    """What a program would make of them – reals, nothing, truth values, whole numbers – they are not."""
    (tmp_path / "p.csv").write_text(text)
    teachers = (tuple(find_predictions(str(tmp_path / "p.csv"))),)
    form = "labels" if "label" in text else "votes"
    import_predictions(tmp_path / "a", tmp_path / "s", Predictions(teachers, form, None, names), SPLITS, "mark")
    found = dict(stream_answers(tmp_path / "a", "unlabelled", "b", len(names)))
    assert [int(found[row].argmax()) for row in (7, 8)] == expected
