"""`mpl reproduce labels`: a small one from end to end, and shares that cannot be."""

import csv
import json
from pathlib import Path

from tests.stages.reproduce.comparisons import run_here
from tests.stages.reproduce.test_sweep import SMALL

TINY = (
    *SMALL, "train_mpl.model.name=wrn_10_1", "train_mpl.steps=4", "train_mpl.labelled_batch=32",
    "finetune.steps=2", "finetune.batch=8",
    "finetune.schedule.warmup_steps=0",
)  # fmt: skip


def test_a_small_one_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    run_here(monkeypatch)
    small = [word for change in TINY for word in ("--set", change)]
    line = ["reproduce", "labels", "--run", tmp_path / "run", "--seeds", 2, "--jobs", 1, "--share", 0.4]
    outcome = mpl(*line, *small)
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "run/labels.csv").read_text().splitlines()))
    assert {(row["point"], row["method"]) for row in rows} == {
        ("labels-20", method) for method in ("alone-supervised", "alone-randaugment", "alone-uda", "mpl-uda")
    }
    for row in rows:
        folder = tmp_path / f"run/{row['point']}-seed-{row['seed']}"
        judged = json.loads((folder / f"evaluation-{row['method']}.json").read_text())
        assert float(row["top1"]) == judged["top1"]
        assert judged["split"] == "test"
    labelled = [
        json.loads((tmp_path / f"run/labels-20-seed-{seed}/train-mpl-alone-uda/record.json").read_text())["basis"]
        for seed in (0, 1)
    ]
    assert labelled[0]["data"]["labelled"] == 20
    assert labelled[0]["settings"]["labelled_batch"] == 20  # of 32: there are no more
    assert labelled[0]["labelled"] != labelled[1]["labelled"]  # each seed has a draw of its own
    page = (tmp_path / "run/labels.md").read_text()
    assert "20 (40%)" in page
    assert "--set train_mpl.steps=4" in page  # the command makes the same again
    assert (tmp_path / "run/labels.png").read_bytes().startswith(b"\x89PNG")
    assert "already done" in mpl(*line, *small).err


def test_shares_that_cannot_be(mpl, tmp_path: Path) -> None:
    for share, words in ((0.1, "are 5, fewer than the 10 classes; give at least --share 0.2"), (1.5, "in (0, 1]")):
        outcome = mpl("reproduce", "labels", "--run", tmp_path / "run", "--share", share)
        assert outcome.status == 2
        assert words in outcome.err
