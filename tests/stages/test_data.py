"""`mpl data` from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline.errors import DataError
from stages.data import group
from tests.data.made_images import encode, noise, write_parquet

CAT, DOG = encode(noise(6, 1)), encode(noise(6, 2))


def mpl_data(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(argument) for argument in arguments], env={"MPL_DATA": ""})


def last_object(result: Result) -> dict[str, Any]:
    """What `--json` promises: one object, the last line of standard output."""
    return json.loads(result.stdout.splitlines()[-1])


def own_photos(root: Path) -> Path:
    for kind in ("cat", "dog", "unlabelled"):
        (root / kind).mkdir(parents=True)
        for number in range(10):
            (root / kind / f"{number}.png").write_bytes(encode(noise(9, hash_of(kind) + number)))
    (root / "cat" / "bad.png").write_bytes(b"junk")
    return root


def hash_of(kind: str) -> int:
    return {"cat": 0, "dog": 100, "unlabelled": 200}[kind]


def test_list_says_what_is_ready(tmp_path: Path) -> None:
    result = mpl_data("list", "--json")
    assert result.exit_code == 0
    missing = {row["name"]: row["missing"] for row in last_object(result)["manifests"]}
    assert missing["digits"] is None
    assert missing["cifar10"] == "cifar10/train.parquet"
    assert "digits" in result.stderr
    assert "ready" in result.stderr
    assert mpl_data("list", "--data", tmp_path).exit_code == 0
    assert mpl_data("list", "--data", tmp_path / "nowhere").exit_code == 2


def test_check_of_the_embedded_digits() -> None:
    result = mpl_data("check", "--all", "--json")
    assert result.exit_code == 0, result.output
    report = last_object(result)
    assert report["usable"]
    assert report["manifest"] == "digits"
    assert {split: one["rows"] for split, one in report["splits"].items()} == {
        "labelled": 50, "validation": 300, "unlabelled": 1347, "test": 500
    }  # fmt: skip
    assert report["splits"]["labelled"]["per_class"] == {str(digit): 5 for digit in range(10)}
    assert report["splits"]["unlabelled"]["read"] == 1347
    assert not report["splits"]["unlabelled"]["undecodable"]


def test_import_then_check_then_use(tmp_path: Path) -> None:
    """The command that is printed at the end works."""
    result = mpl_data("import", own_photos(tmp_path / "photos"), tmp_path / "mine", "--json")
    assert result.exit_code == 0, result.output
    report = last_object(result)
    assert report["counts"] == {"labelled": 14, "validation": 2, "unlabelled": 10, "test": 4}
    assert report["classes"] == ["cat", "dog"]
    assert [(left["key"], left["reason"]) for left in report["left_out"]] == [("cat/bad.png", "decode_error")]
    assert "left out, decode_error: 1" in result.stderr
    assert f"Use it with: mpl pretrain --data {tmp_path / 'mine'}" in result.stderr
    for arguments in (("mine", "--data", tmp_path / "mine"), (report["manifest"],)):
        checked = mpl_data("check", *arguments, "--all", "--json")
        assert checked.exit_code == 0
        assert last_object(checked)["usable"]
    assert "mine" in mpl_data("list", "--data", tmp_path / "mine").stderr


def test_import_without_a_pool_says_so(tmp_path: Path) -> None:
    source = own_photos(tmp_path / "photos")
    pool = source / "unlabelled"
    pool.rename(tmp_path / "pool")
    assert "There is no pool" in mpl_data("import", source, tmp_path / "a").stderr
    result = mpl_data("import", source, tmp_path / "b", "--unlabelled", tmp_path / "pool", "--json")
    assert last_object(result)["counts"]["unlabelled"] == 10
    assert "There is no pool" not in result.stderr


def test_import_refuses_with_one_message(tmp_path: Path) -> None:
    source = own_photos(tmp_path / "photos")
    assert isinstance(mpl_data("import", source, source).exception, DataError)
    assert mpl_data("import", tmp_path / "nowhere", tmp_path / "out").exit_code == 2
    assert mpl_data("import", source, tmp_path / "out", "--seed", "-1").exit_code == 2


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Labels out of range, a class without images, a missing file, a dirty pool."""
    (tmp_path / "manifest.yaml").write_text(
        "{name: broken, classes: 3, class_names: [cat, dog, emu], image: {size: 6}, files: {"
        "train: {path: train.parquet, reader: parquet}, test: {path: test.parquet, reader: parquet},"
        "pool: {path: pool.parquet, reader: parquet}, gone: {path: gone.parquet, reader: parquet}},"
        "splits: {labelled: {from: train}, test: {from: test}, unlabelled: {from: pool},"
        "validation: {from: gone}}}"
    )
    write_parquet(tmp_path / "train.parquet", [CAT, DOG], [0, 1])
    write_parquet(tmp_path / "test.parquet", [CAT, DOG], [0, 3])
    write_parquet(tmp_path / "pool.parquet", [CAT, b"junk", None, DOG])
    return tmp_path


def test_check_tells_every_trouble_and_exits_with_1(broken: Path) -> None:
    result = mpl_data("check", "broken", "--data", broken, "--json")
    assert result.exit_code == 1
    report = last_object(result)
    splits = report["splits"]
    assert not report["usable"]
    assert "gone.parquet" in splits["validation"]["problem"]
    assert "row 1 has label 3" in splits["test"]["problem"]
    assert splits["labelled"]["problem"] is None
    assert splits["labelled"]["per_class"]["emu"] == 0
    assert splits["unlabelled"]["problem"] is None
    assert splits["unlabelled"]["rows"] == 4
    assert [bad[3] for bad in splits["unlabelled"]["undecodable"]] == ["decode_error", "empty"]
    assert "1 classes without an image: emu" in result.stderr
    assert "2 entries that are no image: pool/1.png (not an image" in result.stderr


def test_check_counts_keys_that_occur_twice(broken: Path) -> None:
    write_parquet(broken / "pool.parquet", [CAT] * 600)
    one = mpl_data("check", "broken", "--data", broken, "--sample", "100", "--json")
    assert last_object(one)["splits"]["unlabelled"]["read"] == 100
    folder = broken / "pool.parquet"
    folder.unlink()
    (broken / "manifest.yaml").write_text(
        (broken / "manifest.yaml").read_text().replace("path: pool.parquet", "glob: 'p*/pool.parquet'")
    )
    for name in ("p1", "p2"):
        write_parquet(broken / name / "pool.parquet", [CAT, DOG])
    both = mpl_data("check", "broken", "--data", broken, "--json")
    assert last_object(both)["splits"]["unlabelled"]["repeated_keys"] == ["pool/0.png", "pool/1.png"]
    assert "2 keys that occur more than once" in both.stderr


def test_check_refuses_a_split_of_no_images(broken: Path) -> None:
    write_parquet(broken / "pool.parquet", [b"junk", None])
    splits = last_object(mpl_data("check", "broken", "--data", broken, "--json"))["splits"]
    assert splits["unlabelled"]["problem"] == "none of the 2 entries looked at is an image"


def test_check_of_an_unknown_data_set() -> None:
    result = mpl_data("check", "digitz")
    assert isinstance(result.exception, DataError)
    assert "did you mean digits?" in str(result.exception)


def test_check_of_a_folder_says_what_an_import_would_make(tmp_path: Path) -> None:
    source = own_photos(tmp_path / "photos")
    result = mpl_data("check", source, "--json")
    assert last_object(result)["counts"] == {"labelled": 14, "validation": 2, "unlabelled": 10, "test": 4}
    assert "31 files found: 30 used" in result.stderr
    assert "labelled: 14 images (cat 7, dog 7)" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    mpl_data("import", source, tmp_path / "mine")
    for arguments in ((tmp_path / "mine",), ("--data", tmp_path / "mine")):
        assert last_object(mpl_data("check", *arguments, "--json"))["manifest"] == "mine"


def test_few_labels_are_told_what_was_set_aside(tmp_path: Path) -> None:
    source = own_photos(tmp_path / "photos")
    told = mpl_data("import", source, tmp_path / "a").stderr
    assert "Of 20 labelled images 2 for validation and 4 for test were set aside; 14 are left to train on" in told
    assert "set aside" not in mpl_data("import", source, tmp_path / "b", "--validation", "0", "--test", "0").stderr


def test_several_pools_other_tests_and_a_pool_that_grows(tmp_path: Path) -> None:
    source = own_photos(tmp_path / "photos")
    (source / "unlabelled").rename(tmp_path / "first")
    (tmp_path / "second").mkdir()
    (tmp_path / "second/x.png").write_bytes(encode(noise(9, 999)))
    (tmp_path / "held/dog").mkdir(parents=True)
    (tmp_path / "held/dog/y.png").write_bytes(encode(noise(9, 998)))
    more = ("--unlabelled", tmp_path / "first", "--unlabelled", tmp_path / "second", "--test", tmp_path / "held")
    result = mpl_data("import", source, tmp_path / "out", *more, "--json")
    assert last_object(result)["counts"] == {"labelled": 20, "unlabelled": 11, "test": 1}
    assert last_object(result)["per_class"]["test"] == {"cat": 0, "dog": 1}
    grown = mpl_data("import", "--append", tmp_path / "second", tmp_path / "out")
    assert "1 files found: 1 added to the pool" in grown.stderr
    assert mpl_data("import", source, tmp_path / "z", "--column", "kind=x").exit_code == 1
