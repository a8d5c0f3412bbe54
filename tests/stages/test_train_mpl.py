"""`mpl train-mpl`: teacher and student, the methods alone, what is refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from pipeline import trainings
from pipeline.data.sets import LabelledSet, with_wrong_labels
from pipeline.errors import RunError
from pipeline.networks.loading import load_network
from pipeline.storage.metrics import read_metrics

TINY = """
train_mpl:
  model: {name: wrn_10_1, dropout: 0.1}
  method: {name: uda, threshold: 0.1}
  steps: 12
  batch: 16
  labelled_batch: 10
  ema_decay: 0.9
  checkpoint_every: 5
  log_every: 4
  optimizer: {rule: rmsprop_tf, lr: 0.01, clip_norm: 5}
  weak: {translate: 0.1}
  augment: {rotate: 10, randaugment_layers: 1}
  feedback_options: {batch: 20, weight: 0.01}
"""


@pytest.fixture(scope="session")
def mpl_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mpl-recipe") / "tiny-mpl.yaml"
    path.write_text(recipe.read_text() + TINY)
    return path


def result(outcome) -> dict:
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out.strip().splitlines()[-1])["result"]


@pytest.mark.parametrize("feedback", ["soft", "hard", "none"])
def test_teacher_and_student_then_finetune_and_evaluate(mpl, mpl_recipe, tmp_path, feedback) -> None:
    run = tmp_path / "run"
    arguments = ["train-mpl", "--run", run, "--recipe", mpl_recipe, "--feedback", feedback, "--json"]
    found = result(mpl(*arguments))
    assert found["steps"] == 12
    assert found["pool_images"] == 1347
    assert found["batch_of"] == {"labelled": 10, "pool": 16}
    student, teacher = load_network(run / "student"), load_network(run / "student/teacher")
    a, b = student.model.state_dict(), teacher.model.state_dict()
    assert not torch.equal(a["fc.weight"], b["fc.weight"])
    row = read_metrics(run / "student/metrics.csv")[-1]
    logged = {"soft": {"feedback_loss", "feedback_norm"}, "hard": {"feedback_loss", "h"}, "none": set()}[feedback]
    asked = {"feedback_loss", "feedback_norm", "h"}
    assert {name for name in asked if row.get(name)} == logged
    assert all(row[name] for name in ("teacher_loss", "train_top1", "teacher_train_top1", "teacher_validation_top1"))
    again = mpl(*arguments)
    assert again.status == 0
    assert "already done" in again.err
    assert mpl("finetune", "--run", run).status == 0
    judged = result(mpl("evaluate", "--run", run, "--json"))
    assert judged["network"].endswith("student-finetuned")
    assert judged["images"] == 500
    shown = json.loads(mpl("status", "--run", run, "--json").out)["stages"]
    states = {row["stage"]: row["state"] for row in shown}
    assert states == {"pretrain": "to come", "train-mpl": "done", "finetune": "done", "evaluate": "done"}


def test_feedback_is_the_only_difference(mpl, mpl_recipe, tmp_path) -> None:
    """On, off, flipped: the same data, masks and initial weights; the student's first step does not know."""
    rows = []
    for name, weight, control in (("on", 0.01, "none"), ("off", 0.0, "none"), ("flipped", 0.01, "flipped")):
        changes = ["train_mpl.log_every=1", f"train_mpl.feedback_options.weight={weight}",
                   f"train_mpl.feedback_options.control={control}"]  # fmt: skip
        options = [part for change in changes for part in ("--set", change)]
        outcome = mpl("train-mpl", "--run", tmp_path / "run", "--recipe", mpl_recipe, "--name", name, *options)
        assert outcome.status == 0, outcome.err
        rows.append(read_metrics(tmp_path / f"run/student-{name}/metrics.csv"))
    on, off, flipped = rows
    assert on[0]["loss"] == off[0]["loss"] == flipped[0]["loss"]
    assert on[0]["teacher_loss"] == off[0]["teacher_loss"]
    assert len({run[-1]["teacher_loss"] for run in rows}) == 3


@pytest.mark.parametrize(
    "method", ["supervised", "label_smoothing", "randaugment", "mixup", "pseudo_labels", "uda", "fixmatch"]
)
def test_every_method_alone(mpl, mpl_recipe, tmp_path, method) -> None:
    run = tmp_path / "run"
    outcome = mpl("train-mpl", "--run", run, "--recipe", mpl_recipe, "--alone", "--method", method, "--json")
    found = result(outcome)
    assert found["method"] == method
    assert found["pool_images"] == (1347 if method in ("pseudo_labels", "uda", "fixmatch") else 0)
    assert not (run / "student/teacher").exists()
    assert float(read_metrics(run / "student/metrics.csv")[-1]["train_top1"]) >= 0


def test_the_teacher_starts_from_pretrain(mpl, mpl_recipe, run, tmp_path) -> None:
    """At a learning rate of nearly nothing it stays where pretrain left it."""
    changes = [
        "train_mpl.teacher.start=pretrain",
        "train_mpl.teacher.optimizer={rule: sgd, lr: 1.0e-12, momentum: 0}",
        "train_mpl.feedback=none",
    ]
    options = [part for change in changes for part in ("--set", change)]
    before = load_file(run / "teacher/model.safetensors")
    outcome = mpl("train-mpl", "--run", run, "--recipe", mpl_recipe, "--name", "tuned", *options)
    assert outcome.status == 0, outcome.err
    after = load_file(run / "student-tuned/teacher/model.safetensors")
    torch.testing.assert_close(after["fc.weight"], before["fc.weight"], atol=1e-8, rtol=0)


def test_a_waiting_student_stays_as_it_was(mpl, mpl_recipe, tmp_path) -> None:
    """It waits for 11 of 12 steps and warms up: its one step is at its full rate, the teacher's are 12."""
    changes = ["--set", "train_mpl.student_wait=11", "--set", "train_mpl.log_every=1"]
    outcome = mpl("train-mpl", "--run", tmp_path / "run", "--recipe", mpl_recipe, *changes)
    assert outcome.status == 0, outcome.err
    rows = read_metrics(tmp_path / "run/student/metrics.csv")
    assert [bool(row["loss"]) for row in rows] == [False] * 11 + [True]
    assert all(row["teacher_loss"] for row in rows)
    assert [float(row["learning_rate"]) for row in rows] == [0.0] * 11 + [0.01]


def test_two_methods_do_not_overwrite_each_other(mpl, mpl_recipe, run) -> None:
    refused = mpl("train-mpl", "--run", run, "--recipe", mpl_recipe)
    assert refused.status == 1
    assert "is mpl train-reduced's" in refused.err
    assert "--name" in refused.err
    assert mpl("train-mpl", "--run", run, "--recipe", mpl_recipe, "--force").status == 0
    assert not (run / "train-reduced").exists()
    back = mpl("train-reduced", "--run", run)
    assert back.status == 1
    assert "is mpl train-mpl's" in back.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train_mpl.labelled_batch=51"], "train_mpl.labelled_batch (=51) is more than the 50 labelled images"),
        (["train_mpl.batch=1348"], "train_mpl.batch (=1,348) is more than the 1,347 pool images"),
        (["train_mpl.method=udda"], "did you mean uda?"),
        (["train_mpl.optimizer.lr=1.0e+9"], "training stopped before that update"),
        (["train_mpl.feedback_options.held_out=0.99"], "leaves none"),
    ],
)
def test_bad_input_is_explained(mpl, mpl_recipe, tmp_path, changes, words) -> None:
    options = [part for change in changes for part in ("--set", change)]
    outcome = mpl("train-mpl", "--run", tmp_path / "run", "--recipe", mpl_recipe, *options)
    assert outcome.status in (1, 2)
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_a_teacher_with_other_classes_is_refused(mpl, mpl_recipe, run) -> None:
    config = run / "teacher/config.json"
    tree = json.loads(config.read_text())
    tree["label_names"] = list("abcdefghij")
    config.write_text(json.dumps(tree))
    options = ["--name", "x", "--set", "train_mpl.teacher.start=pretrain"]
    outcome = mpl("train-mpl", "--run", run, "--recipe", mpl_recipe, *options)
    assert outcome.status == 1
    assert "it lacks 0, 1, 2, 3, 4, …; the data set lacks a, b, c, d, e, …" in outcome.err
    tree["label_names"] = [str(c) for c in reversed(range(10))]
    config.write_text(json.dumps(tree))
    outcome = mpl("train-mpl", "--run", run, "--recipe", mpl_recipe, *options)
    assert "the data set's classes in another order" in outcome.err


def test_a_recipe_without_the_section_is_explained(mpl, recipe, tmp_path) -> None:
    outcome = mpl("train-mpl", "--run", tmp_path / "run", "--recipe", recipe)
    assert outcome.status == 2
    assert "has no train_mpl section" in outcome.err


def test_label_noise_moves_that_share_of_each_class_to_the_next(mpl, mpl_recipe, tmp_path) -> None:
    labels = torch.arange(10).repeat(5)
    labelled = LabelledSet(torch.zeros(50, 3, 1, 1), labels, 10)
    noisy = with_wrong_labels(labelled, 0.4, seed=3).labels
    changed = noisy != labels
    assert [int(changed[labels == c].sum()) for c in range(10)] == [2] * 10
    assert torch.equal(noisy[changed], (labels[changed] + 1) % 10)
    assert torch.equal(noisy, with_wrong_labels(labelled, 0.4, seed=3).labels)
    assert not torch.equal(noisy, with_wrong_labels(labelled, 0.4, seed=4).labels)
    copy = Path(shutil.copy(mpl_recipe, tmp_path / "noisy.yaml"))
    tops = []
    for noise in (0, 0.8):
        run = tmp_path / f"run-{noise}"
        change = ["--set", f"pretrain.label_noise={noise}", "--set", "pretrain.steps=60"]
        tops.append(result(mpl("pretrain", "--run", run, "--recipe", copy, "--json", *change))["validation"]["top1"])
    assert tops[1] < tops[0] - 10


def test_a_teacher_that_cannot_be_saved_costs_no_training(mpl, mpl_recipe, tmp_path, monkeypatch) -> None:
    """Checkpoints are kept until everything is written and recorded."""
    command = ["train-mpl", "--run", tmp_path / "run", "--recipe", mpl_recipe]
    with monkeypatch.context() as broken:
        broken.setattr(trainings, "full_state", Mock(side_effect=RunError("No space left on device")))
        failed = mpl(*command)
    assert failed.status == 1
    assert "No space left" in failed.err
    again = mpl(*command)
    assert again.status == 0
    assert "goes on from step 12 of 12" in again.err
    assert (tmp_path / "run/student/teacher/model.safetensors").exists()
    assert not (tmp_path / "run/student/checkpoints").exists()
