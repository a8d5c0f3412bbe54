"""A data set with a person's labels: what changes, what stays, and answers that cannot be taken."""

from pathlib import Path

import pytest

from pipeline.data.get.found import Source
from pipeline.data.get.importing import ImportSettings, import_images
from pipeline.data.get.relabel import Answer, Relabelled, read_answers, relabel
from pipeline.data.manifest import load_manifest
from pipeline.data.sources import open_split
from pipeline.errors import DataError
from tests.data.made_images import encode, noise

NAMES = ("cat", "dog", "emu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of six images, two of them for test and validation, and a pool of five."""
    for c, name in enumerate((*NAMES, "unlabelled")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(5 if name == "unlabelled" else 6):
            (folder / f"{number}.png").write_bytes(encode(noise(8, 10 * c + number)))
    import_images([Source(tmp_path / "photos", None, {}, None)], tmp_path / "data", settings=ImportSettings(0.2, 0.2))
    return tmp_path / "data"


def rows(folder: Path, split: str) -> dict[tuple[str, int], tuple[str, bytes, int]]:
    opened = open_split(load_manifest(folder / "manifest.yaml"), split, folder)  # type: ignore[arg-type]
    return {(shard, s.row): (s.key, s.data, s.label) for shard, s in opened.read()}


def test_labels_change_images_join_and_leave_and_the_rest_stays(data: Path, tmp_path: Path) -> None:
    labelled, pool = rows(data, "labelled"), rows(data, "unlabelled")
    (a, (key_a, data_a, label_a)), (b, (key_b, _, _)), (c, (key_c, data_c, label_c)) = list(labelled.items())[:3]
    (p, (key_p, data_p, _)), (q, (key_q, _, _)) = list(pool.items())[:2]
    other = NAMES[(label_a + 1) % 3]
    answers = {
        a: Answer(key_a, other, 2), b: Answer(key_b, None, 3), c: Answer(key_c, NAMES[label_c], 4),
        p: Answer(key_p, "emu", 5), q: Answer(key_q, None, 6),
    }  # fmt: skip
    found = relabel(data, answers, tmp_path / "new")
    assert found == Relabelled(1, 1, 1, 1, len(labelled), len(pool) - 1)
    new = {(key, content): label for key, content, label in rows(tmp_path / "new", "labelled").values()}
    expected = {(key, content): label for key, content, label in labelled.values() if key != key_b}
    assert new == expected | {(key_a, data_a): NAMES.index(other), (key_c, data_c): label_c, (key_p, data_p): 2}
    assert {key for key, _, _ in rows(tmp_path / "new", "unlabelled").values()} == {
        key for key, _, _ in pool.values() if key != key_p
    }
    for split in ("validation", "test"):
        assert rows(tmp_path / "new", split) == rows(data, split)
    assert rows(data, "labelled") == labelled  # nothing is lost
    assert load_manifest(tmp_path / "new/manifest.yaml").class_names == NAMES


def test_a_pool_that_is_all_labelled_is_gone(data: Path, tmp_path: Path) -> None:
    answers = {identity: Answer(key, "dog", 2) for identity, (key, _, _) in rows(data, "unlabelled").items()}
    assert relabel(data, answers, tmp_path / "new").unlabelled == 0
    assert "unlabelled" not in load_manifest(tmp_path / "new/manifest.yaml").splits


def test_answers_that_cannot_be_taken(data: Path, tmp_path: Path) -> None:
    """One sentence each, and nothing appears."""
    labelled = rows(data, "labelled")
    identity, (key, _, label) = next(iter(labelled.items()))
    all_of_a_class = {i: Answer(k, None, 2) for i, (k, _, each) in labelled.items() if each == label}
    for answers, words in (
        ({identity: Answer("other.png", "cat", 7)}, "line 7 is of other.png"),
        ({identity: Answer(key, "Cat", 3)}, "line 3: 'Cat' is no class of the data set; there are cat, dog, emu"),
        ({("test", 0): Answer("x", "cat", 4)}, "1 answers are of no labelled and no pool image"),
        (all_of_a_class, f"no labelled image of {NAMES[label]} would be left"),
    ):
        with pytest.raises(DataError, match=words):
            relabel(data, answers, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        relabel(data, {identity: Answer(key, "cat", 2)}, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "new", "photos"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column shard, row, key, label"),
        ("shard,row,key\na,0,x\n", "has no column label"),
        ("shard,row,key,label\n", "has no answer"),
        ("shard,row,key,label\na,0,x,cat", "cut short"),
        ("shard,row,key,label\na,0,x\n", "line 2: 3 cells, and the head has 4"),
        ("shard,row,key,label\na,one,x,cat\n", "row 'one' is no number"),
        ("shard,row,key,label\na,-1,x,cat\n", "row '-1' is no number"),
        ("shard,row,key,label\na,0,x,cat\na,0,x,dog\n", "two things of x: 'cat' in line 2 and 'dog' in line 3"),
        ('shard,row,key,label\na,0,"x,cat\n', "is no CSV"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_answers(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as a table"):
        read_answers(tmp_path / "a.csv")


def test_names_with_commas_quotes_and_line_ends_come_back(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbflabel,key,row,shard,more\r\n"a, ""b""","x\ny",3,s,1\r\n,z,4,s,\r\n')
    assert read_answers(tmp_path / "a.csv") == {
        ("s", 3): Answer("x\ny", 'a, "b"', 3), ("s", 4): Answer("z", None, 4)
    }  # fmt: skip
