"""`mpl reproduce feedback`: what its variants differ in, what a tail is, and a small one from end to end."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import load_recipe
from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.networks.network import build_network
from stages.options import changed
from stages.reproduce import feedback as module
from stages.reproduce.feedback import REFERENCE, TEACHERS, TESTED, VARIANTS
from tests.stages.reproduce.comparisons import different_keys, run_here, tiny_context
from tests.stages.reproduce.test_sweep import SMALL


def test_variants_differ_from_the_reference_in_what_they_are_named_after() -> None:
    tree = load_recipe("digits").model_dump(mode="json")
    found = {variant.name: changed(tree, variant.changes, "digits") for variant in VARIANTS}
    scale, decay = "train_reduced.feedback.scale", "train_reduced.calibrator.weight_decay"
    assert different_keys(found["scaled"], found["scaled-no-decay"]) == {decay}
    assert different_keys(found["scaled"], found["raw-decay"]) == {scale}
    assert different_keys(found["scaled"], found["raw"]) == {scale, decay}
    assert different_keys(found["raw"], found["flipped"]) == {"train_reduced.feedback.control"}
    assert different_keys(found["raw"], found["both"]) == {"train_reduced.calibrator.supervised_weight"}
    assert different_keys(found["both"], found["term"]) == {"train_reduced.feedback.weight"}
    assert set(TESTED) < set(found) - {REFERENCE.name}
    assert {step.changes[-1] for v in VARIANTS for step in v.steps(Path("run")) if step.module == "evaluate"} == {
        "evaluate.split=validation"
    }


def test_a_tail_is_bayes_rule(tmp_path: Path) -> None:
    """Oracle: probabilities times shares, divided by their sum."""
    recipe = tiny_context(tmp_path).recipe
    names = tuple(str(digit) for digit in range(10))
    network = build_network(recipe.pretrain.model, names, 8, recipe.data.mean, recipe.data.std)
    save_network(tmp_path / "teacher", network, network.model.state_dict())
    folder = module._with_a_tail(tmp_path / "teacher", tmp_path / "tail", 50, 3)
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (load_network(f).model.eval()(images).double() for f in (tmp_path / "teacher", folder))
    shares = (after.softmax(1) / before.softmax(1)).numpy()  # (5, 10)
    shares /= shares.max(axis=1, keepdims=True)
    expected = np.sort(50 ** -np.linspace(0, 1, 10))
    np.testing.assert_allclose(np.sort(shares, axis=1), np.tile(expected, (5, 1)), rtol=1e-4)
    assert len({tuple(row.argsort()) for row in shares}) == 1


def test_a_small_one_from_end_to_end(mpl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(module, "SIZE", 40)
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(module, "TEACHERS", (TEACHERS[0], TEACHERS[2]))
    chosen = ("scaled", "raw", "raw-scaling")
    monkeypatch.setattr(module, "VARIANTS", tuple(variant for variant in VARIANTS if variant.name in chosen))
    small = [word for change in SMALL for word in ("--set", change)]
    line = ["reproduce", "feedback", "--run", tmp_path / "run", "--seeds", 1, "--seed", 7, "--jobs", 1, *small]
    outcome = mpl(*line)
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "run/feedback.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(chosen)
    names = {teacher.label: teacher.name for teacher in TEACHERS}
    variants = {variant.label: variant.name for variant in VARIANTS}
    for row in rows:
        folder = tmp_path / f"run/{names[row['group']]}-seed-7"
        judged = json.loads((folder / f"evaluation-{variants[row['variant']]}.json").read_text())
        assert float(row["top1"]) == judged["top1"]
        assert judged["split"] == "validation"
    page = (tmp_path / "run/feedback.md").read_text()
    assert "validation split" in page
    assert "Expects a tail" in page
    assert "already done" in mpl(*line).err


def test_other_data_are_refused(mpl, tmp_path: Path) -> None:
    outcome = mpl("reproduce", "feedback", "--run", tmp_path / "b", "--recipe", "svhn")
    assert outcome.status == 2
    assert "embedded digits" in outcome.err
