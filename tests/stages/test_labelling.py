"""`mpl next`, `mpl suspects` and `mpl data label`: from a run to a page, and from answers to a new data set."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.get.writing import Row, write_images, write_manifest
from pipeline.data.manifest import FileSpec, SplitSpec, load_manifest
from pipeline.data.sources import open_split


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def script_data(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_next_chooses_from_the_pool_without_copies_and_repeats(mpl, run: Path) -> None:
    outcome = mpl("next", "--run", run, "--n", 12, "--json")
    assert outcome.status == 0, outcome.err
    rows = table(run / "next.csv")
    assert len(rows) == 12
    places = {(row["shard"], int(row["row"])) for row in rows}
    assert len(places) == 12
    manifest = load_manifest(json.loads((run / "run.json").read_text())["recipe"]["data"]["manifest"])
    pool = {(shard, s.row): s.key for shard, s in open_split(manifest, "unlabelled").read()}
    for row in rows:
        assert pool[row["shard"], int(row["row"])] == row["key"]
        assert 0.1 <= float(row["probability"]) <= 1
        assert row["teacher"] in "0123456789"
        assert 0 <= float(row["disagreement"]) <= 1
    data = script_data(run / "next.html")
    assert [tuple(image[:2]) for image in data["images"]] == [(row["shard"], int(row["row"])) for row in rows]
    assert data["classes"] == [str(digit) for digit in range(10)]
    page = (run / "next.html").read_text()
    assert page.count('src="data:image/') == 12
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "than those are like each other" in outcome.err
    before = (run / "next.csv").read_bytes()
    assert mpl("next", "--run", run, "--n", 12).status == 0
    assert (run / "next.csv").read_bytes() == before
    everything = mpl("next", "--run", run, "--n", 12, "--strange", "--json")
    assert "than those" not in everything.err
    assert json.loads(everything.out.splitlines()[-1])["images"] > json.loads(outcome.out.splitlines()[-1])["images"]


def test_suspects_say_who_has_an_opinion(mpl, run: Path) -> None:
    """The run's teacher learned the labels by heart; its student, of Reduced MPL, never saw one."""
    outcome = mpl("suspects", "--run", run, "--n", 5, "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out.splitlines()[-1])
    assert result["opinions"] == ["the student"]
    assert "pretrain.folds=5" in outcome.err
    rows = table(run / "suspects.csv")
    assert len(rows) == result["suspects"]
    margins = [float(row["margin"]) for row in rows if "contradict" in row["reasons"]]
    assert margins == sorted(margins)
    assert all(row["suggested"] != row["label"] for row in rows if "contradict" in row["reasons"])
    assert len(script_data(run / "suspects.html")["images"]) == min(5, len(rows))


def test_without_a_run_or_a_student_it_is_said(mpl, tmp_path: Path) -> None:
    for command in ("next", "suspects"):
        outcome = mpl(command, "--run", tmp_path / "none")
        assert outcome.status == 1
        assert "there is no run" in outcome.err


@pytest.fixture
def wrong(tmp_path: Path) -> tuple[Path, set[str]]:
    """200 digits, a tenth of them with another label; keys of these."""
    digits = load_manifest("digits")
    pool = [sample for _, sample in open_split(load_manifest("digits-draws"), "labelled").read()][:200]
    random = np.random.default_rng(0)
    wrong = set(random.choice(200, 20, replace=False).tolist())
    names = tuple(str(digit) for digit in range(10))
    rows = [Row(s.key, s.data, (s.label + 1 + int(random.integers(9))) % 10 if i in wrong else s.label)
            for i, s in enumerate(pool)]  # fmt: skip
    folder = tmp_path / "data"
    folder.mkdir()
    write_images(folder / "labelled.parquet", rows, names)
    used = {row.key for row in rows}
    rest = [Row(s.key, s.data, -1) for _, s in open_split(digits, "unlabelled").read() if s.key not in used]
    write_images(folder / "pool.parquet", rest, None)
    files = {
        **digits.files,
        "labelled": FileSpec(path="labelled.parquet", reader="parquet"),
        "pool": FileSpec(path="pool.parquet", reader="parquet"),
    }
    splits = {**digits.splits, "unlabelled": SplitSpec.model_validate({"from": "pool"})}
    changes = {"name": "wrong", "files": files, "splits": splits}
    write_manifest(folder / "manifest.yaml", digits.model_copy(update=changes))
    return folder, {pool[i].key for i in wrong}


def test_planted_errors_come_first_and_the_answers_mend_them(mpl, wrong, tmp_path: Path) -> None:
    """Cross-fitted in seconds: of the first twenty suspects most are planted, where two would be by chance."""
    data, planted = wrong
    run = tmp_path / "run"
    quick = ("pretrain.folds=3", "pretrain.steps=150", "pretrain.model.name=wrn_10_1", "pretrain.ema_decay=0.95")
    settings = [word for change in quick for word in ("--set", change)]
    assert mpl("pretrain", "--run", run, "--data", data, *settings).status == 0
    outcome = mpl("suspects", "--run", run, "--n", 20)
    assert outcome.status == 0, outcome.err
    assert "the teacher (held out)" in outcome.err
    rows = table(run / "suspects.csv")
    first = {row["key"] for row in rows[:20]}
    assert len(first & planted) >= 14
    answers = tmp_path / "labels.csv"
    with answers.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shard", "row", "key", "label"])
        writer.writerows([row["shard"], row["row"], row["key"], ""] for row in rows[:20])
    outcome = mpl("data", "label", data, answers, tmp_path / "mended", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out.splitlines()[-1])["left_out"] == 20
    assert mpl("data", "label", data, answers, tmp_path / "mended").status == 1  # it is there
