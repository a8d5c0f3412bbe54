"""`mpl reproduce table1`: equal budgets, the recipe's settings of methods, and a small one from end to end."""

import csv
import json
from pathlib import Path

import pytest
from scipy import stats

from pipeline.config import Recipe
from pipeline.data.manifest import load_manifest
from pipeline.report.experiments.with_mpl import Row, WithMpl
from stages.console import Console
from stages.options import Context, Options, changed, make_context
from stages.reproduce import parts as parts_module
from stages.reproduce import table1 as module
from tests.stages.reproduce.comparisons import run_here, tiny


def context(folder: Path, *changes: str) -> Context:
    return make_context(Options(folder / "run", str(tiny(folder)), changes), console=Console(quiet=True))


def recipes(context: Context) -> dict[str, Recipe]:
    """What every training stage sees."""
    tree = context.recipe.model_dump(mode="json")
    found = {part.name: part.steps[0] for part in module.parts_of(context, 3) if part.name != "teacher"}
    return {name: changed(tree, step.changes, "tiny") for name, step in found.items()}


def test_all_have_the_same_network_steps_and_batch(tmp_path: Path) -> None:
    found = recipes(context(tmp_path))
    alone = {f"alone-{name}" for name in module.METHODS}
    assert set(found) == alone | {f"mpl-{name}" for name in list(module.METHODS)[:6]}
    for name, recipe in found.items():
        section = recipe.train_reduced if name == "alone-noisystudent" else recipe.train_mpl
        assert section is not None
        assert (section.model.name, section.model.dropout, section.steps, section.batch) == ("wrn_10_1", 0.1, 4, 8)
    assert found["alone-noisystudent"].train_reduced.teacher == "fixed"


def test_a_pair_differs_in_mpl_alone(tmp_path: Path) -> None:
    found = recipes(context(tmp_path))
    for name in module.WITH_MPL:
        alone, mpl = found[f"alone-{name}"].train_mpl, found[f"mpl-{name}"].train_mpl
        assert alone is not None
        assert mpl is not None
        assert alone.alone
        assert not mpl.alone
        assert mpl.method.name == name
        assert alone.model_copy(update={"alone": False}) == mpl


def test_settings_of_methods_are_the_recipes(tmp_path: Path) -> None:
    found = recipes(context(tmp_path))

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
    assert set(module.METHODS) > set((load_manifest("cifar10-4k").paper or {})["table1"])
    assert "FixMatch 95.74" in module._others("cifar10-4k")


def result(top1: float, trained: float | None = None) -> dict[str, float]:
    figures = dict.fromkeys(("validation_top1", "top5", "nll", "ece", "seconds", "memory_mib"), 1.0)
    return figures | {"top1": top1, "trained_top1": top1 if trained is None else trained}


def test_differences_are_paired_and_adjusted() -> None:
    """Oracle: scipy's paired t-test; Holm by hand."""
    a, b, c = [80.0, 82, 84, 81], [85.0, 86.5, 88, 86], [80.5, 81, 84.5, 80.8]
    rows = [
        Row("Better", [result(x) for x in a], [result(x, x - 4) for x in b], ("–",)),
        Row("Same", [result(x) for x in a], [result(x) for x in c], ("1 → 2",)),
        Row("Alone", [result(x) for x in a], None, ("–",)),
    ]
    table = WithMpl("T", [0, 1, 2, 3], rows, ("P",), [], "c", {})
    p = [stats.ttest_rel(b, a).pvalue, stats.ttest_rel(c, a).pvalue]
    assert table.adjusted() == pytest.approx({"Better": 2 * p[0], "Same": p[1]})
    assert table.answer() == (
        "With MPL on top and finetuned, better: Better (+4.62); undecided: Same (-0.05). "
        "Before finetuning, at equal steps, undecided: Better (+0.62), Same (-0.05)."
    )
    before = stats.ttest_rel([x - 4 for x in b], a)
    assert before.pvalue > 0.05
    interval = before.confidence_interval(0.95)
    holm = max(2 * min(before.pvalue, p[1]), before.pvalue)
    told = table.as_json()["methods"]["Better"]["difference_before_finetuning"]
    assert (told["mean"], told["p"], told["holm"]) == pytest.approx((0.625, before.pvalue, holm))
    assert f"| +0.62 [{interval.low:+.2f}, {interval.high:+.2f}], p {holm:.3f} | – |" in table.markdown("f.png")
    assert len(table.csv().splitlines()) == 1 + 3 * 4 + 2 * 4
    assert "| Alone | 81.75 ± 1.71 | – | – | – | – | – | – | – |" in table.markdown("f.png")


def test_a_small_table_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts_module, "run_chains", run_here)
    methods = {name: module.METHODS[name] for name in ("supervised", "uda", module.NOISY)}
    monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(module, "WITH_MPL", ["uda"])
    run = tmp_path / "run"
    line = ["reproduce", "table1", "--recipe", tiny(tmp_path), "--run", run, "--seed", 1, "--seeds", 2]
    outcome = mpl(*line)
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "table1.json").read_text())
    assert list(found["methods"]) == ["Supervised", "UDA", "NoisyStudent"]
    judged = json.loads((run / "seed-1/evaluation-mpl-uda.json").read_text())
    before = json.loads((run / "seed-1/evaluation-mpl-uda-trained.json").read_text())
    assert judged["network"].endswith("student-mpl-uda-finetuned")
    assert before["network"].endswith("student-mpl-uda")
    assert found["seeds"] == [1, 2]
    assert "--seeds 2 --seed 1" in (run / "table1.md").read_text()
    pair = found["methods"]["UDA"]["mpl"][0]
    assert (pair["top1"], pair["trained_top1"], pair["nll"]) == (judged["top1"], before["top1"], judged["nll"])
    rows = list(csv.DictReader((run / "table1.csv").read_text().splitlines()))
    assert [(row["method"], row["mpl"]) for row in rows[::2]] == [
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
