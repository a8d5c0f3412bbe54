"""`mpl reproduce table1`: equal budgets, the recipe's settings of methods, and a small one from end to end."""

import csv
import json
from pathlib import Path

from pipeline.config import Recipe
from pipeline.data.manifest import load_manifest
from stages.options import changed
from stages.reproduce import table1 as module
from stages.reproduce.methods import METHODS, NOISY
from tests.stages.reproduce.comparisons import run_here, tiny, tiny_context


def recipes(folder: Path) -> dict[str, Recipe]:
    """What every training stage sees."""
    context = tiny_context(folder)
    tree = context.recipe.model_dump(mode="json")
    trainings = {variant.name: variant.steps(folder)[0] for variant in module.variants(context)}
    return {name: changed(tree, step.changes, "tiny") for name, step in trainings.items()}


def test_all_have_the_same_network_steps_and_batch(tmp_path: Path) -> None:
    found = recipes(tmp_path)
    alone = {f"alone-{name}" for name in METHODS}
    assert set(found) == alone | {f"mpl-{name}" for name in list(METHODS)[:6]}
    for name, recipe in found.items():
        section = recipe.train_reduced if name == "alone-noisystudent" else recipe.train_mpl
        assert section is not None
        assert (section.model.name, section.model.dropout, section.steps, section.batch) == ("wrn_10_1", 0.1, 4, 8)
    assert found["alone-noisystudent"].train_reduced.teacher == "fixed"


def test_a_pair_differs_in_mpl_alone(tmp_path: Path) -> None:
    found = recipes(tmp_path)
    for name in module.WITH_MPL:
        alone, mpl = found[f"alone-{name}"].train_mpl, found[f"mpl-{name}"].train_mpl
        assert alone is not None
        assert mpl is not None
        assert alone.alone
        assert not mpl.alone
        assert mpl.method.name == name
        assert alone.model_copy(update={"alone": False}) == mpl


def test_settings_of_methods_are_the_recipes(tmp_path: Path) -> None:
    found = recipes(tmp_path)

    def of(name: str) -> dict[str, object]:
        section = found[f"alone-{name}"].train_mpl
        assert section is not None
        return section.method.model_dump() | {"recipe's": section.label_smoothing}

    assert of("uda")["threshold"] == 0.3  # train_mpl.method
    assert of("fixmatch")["threshold"] == 0.5  # reproduce.methods
    assert of("pseudo_labels")["threshold"] == 0.0  # its own default
    assert of("randaugment")["recipe's"] == 0.1
    assert of("supervised")["recipe's"] == 0  # else it would be label smoothing
    assert of("label_smoothing") == {"name": "label_smoothing", "smoothing": 0.15, "recipe's": 0}


def test_the_papers_figures() -> None:
    """arXiv:2003.10580v1, table 1; v4, tables 2 and 10."""
    assert module.paper_figure("cifar10-4k", "uda") == "94.53 ± 0.18 → 96.11 ± 0.07"
    assert module.paper_figure("svhn-1k", "supervised") == "88.17 ± 0.47 → 91.89 ± 0.14"
    assert module.paper_figure("cifar10-4k", "label_smoothing") == "82.21 ± 0.18"
    assert module.paper_figure("imagenet-10pct", "uda") == "68.07 → 73.89"
    assert module.paper_figure("svhn-1k", "noisystudent") == "–"
    assert set(METHODS) > set((load_manifest("cifar10-4k").paper or {})["table1"])
    assert "FixMatch 95.74" in module._others("cifar10-4k")


def test_a_small_table_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(module, "METHODS", {name: METHODS[name] for name in ("supervised", "uda", NOISY)})
    monkeypatch.setattr(module, "WITH_MPL", ["uda"])
    run = tmp_path / "run"
    line = ["reproduce", "table1", "--recipe", tiny(tmp_path), "--run", run, "--seed", 1, "--seeds", 1]
    outcome = mpl(*line)
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "table1.json").read_text())
    assert list(found["methods"]) == ["Supervised", "UDA", "NoisyStudent"]
    judged = json.loads((run / "seed-1/evaluation-mpl-uda.json").read_text())
    before = json.loads((run / "seed-1/evaluation-mpl-uda-trained.json").read_text())
    assert judged["network"].endswith("student-mpl-uda-finetuned")
    assert before["network"].endswith("student-mpl-uda")
    assert found["seeds"] == [1]
    assert "--seeds 1 --seed 1" in (run / "table1.md").read_text()
    pair = found["methods"]["UDA"]["mpl"][0]
    assert (pair["top1"], pair["trained_top1"], pair["nll"]) == (judged["top1"], before["top1"], judged["nll"])
    rows = list(csv.DictReader((run / "table1.csv").read_text().splitlines()))
    assert [(row["method"], row["mpl"]) for row in rows] == [
        ("Supervised", "no"), ("UDA", "no"), ("UDA", "yes"), ("NoisyStudent", "no"),
    ]  # fmt: skip
    assert (run / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert "already done" in mpl(*line).err


def test_without_feedback_there_is_nothing_to_compare(mpl, tmp_path: Path) -> None:
    line = ["reproduce", "table1", "--recipe", tiny(tmp_path), "--run", tmp_path / "run", "--dry-run"]
    outcome = mpl(*line, "--set", "train_mpl.feedback=none")
    assert outcome.status == 2
    assert "train_mpl.feedback" in outcome.err
    assert mpl(*line).status == 0
