"""`mpl reproduce swapped-teacher`: what is swapped, what is won back, and a small one from end to end."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.networks.folders import save_network
from pipeline.networks.loading import load_network
from pipeline.networks.network import build_network
from stages.options import changed
from stages.reproduce import swapped_teacher as module
from stages.reproduce.swapped_teacher import FEEDBACK, FIXED, UNSWAPPED, VARIANTS
from tests.report.experiments.made import results
from tests.stages.reproduce.comparisons import different_keys, run_here, tiny, tiny_context


def test_two_pairs_of_outputs_are_exchanged_and_nothing_else(tmp_path: Path) -> None:
    recipe = tiny_context(tmp_path).recipe
    names = tuple(str(digit) for digit in range(10))
    network = build_network(recipe.pretrain.model, names, 8, recipe.data.mean, recipe.data.std)
    save_network(tmp_path / "teacher", network, network.model.state_dict())
    module.write_swapped(tmp_path / "teacher", tmp_path / "swapped")
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (load_network(tmp_path / name).model.eval()(images) for name in ("teacher", "swapped"))
    torch.testing.assert_close(after, before[:, [1, 0, 3, 2, 4, 5, 6, 7, 8, 9]])


def test_variants_learn_from_the_same_images(tmp_path: Path) -> None:
    tree = tiny_context(tmp_path).recipe.model_dump(mode="json")
    found = {variant.name: changed(tree, variant.changes, "tiny") for variant in VARIANTS}
    assert {(r.train_reduced.student_data, r.train_reduced.feedback.held_out) for r in found.values()} == {("pool", 0)}
    feedback = found["feedback"]
    assert feedback.train_reduced.calibrator.supervised_weight == 0
    for control in ("flipped", "shuffled"):
        assert different_keys(feedback, found[control]) == {"train_reduced.feedback.control"}
    assert different_keys(feedback, found["both"]) == {"train_reduced.calibrator.supervised_weight"}
    assert different_keys(found["both"], found["supervised-term"]) == {"train_reduced.feedback.weight"}


def test_won_back_is_a_share_of_what_the_swap_costs() -> None:
    before = {UNSWAPPED: [90.0, 94], FIXED.name: [80.0, 74], "x": [85.0, 94], "y": [75.0, 74]}
    found = module.won_back(results({name: [99.0, 99.0] for name in before}, before))
    assert found["x"] == {"of_means": pytest.approx(25 / 30), "per_seed": pytest.approx([0.5, 1.0])}
    assert found["y"] == {"of_means": pytest.approx(-5 / 30), "per_seed": pytest.approx([-0.5, 0.0])}
    assert set(found) == {"x", "y"}
    assert module.won_back(results({UNSWAPPED: [90.0], FIXED.name: [90.0], "x": [85.0]}))["x"] == {
        "of_means": None, "per_seed": [None],
    }  # fmt: skip


def test_a_small_one_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(module, "VARIANTS", (FIXED, FEEDBACK))
    run = tmp_path / "run"
    line = ["reproduce", "swapped-teacher", "--recipe", tiny(tmp_path), "--run", run, "--seeds", 1]
    outcome = mpl(*line, "--set", "pretrain.steps=60", "--set", "train_reduced.steps=12")
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "swapped-teacher.json").read_text())
    folders = {"Unswapped teacher, fixed": "seed-0/evaluation-fixed.json"} | {
        variant.label: f"seed-0-swapped/evaluation-{variant.name}.json" for variant in (FIXED, FEEDBACK)
    }
    tops = {label: json.loads((run / path).read_text())["top1"] for label, path in folders.items()}
    assert {label: method["results"][0]["top1"] for label, method in found["methods"].items()} == tops
    before = [json.loads((run / p.replace(".json", "-trained.json")).read_text())["top1"] for p in folders.values()]
    unswapped, fixed, feedback = before
    assert found["won_back"]["feedback"]["of_means"] == pytest.approx((feedback - fixed) / (unswapped - fixed))
    assert "won back:" in outcome.err
    assert "Swapped teacher, feedback alone: **" in (run / "swapped-teacher.md").read_text()
