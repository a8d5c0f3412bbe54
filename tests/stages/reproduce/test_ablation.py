"""`mpl reproduce ablation`: variants differ in the feedback alone, and a small one runs from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.calibration import read_calibration
from pipeline.config import Recipe
from pipeline.errors import RunError
from pipeline.report.experiments.ablation import Ablation, Group
from pipeline.report.experiments.curves import read_curve
from pipeline.storage.runs import differences
from pipeline.targets import TargetsStore
from stages import train_reduced
from stages.console import Console
from stages.execution import execute
from stages.options import Context, Options, changed, make_context
from stages.reproduce import ablation as module
from stages.reproduce import parts as parts_module
from tests.stages.reproduce.comparisons import run_here, tiny
from tests.stages.reproduce.test_table1 import result


def context(folder: Path) -> Context:
    return make_context(Options(folder / "run", str(tiny(folder))), console=Console(quiet=True))


def recipe_of(context: Context, changes: tuple[str, ...]) -> Recipe:
    return changed(context.recipe.model_dump(mode="json"), changes, "tiny")


def keys(a: Recipe, b: Recipe) -> set[str]:
    return {line.split(":")[0] for line in differences(a.model_dump(mode="json"), b.model_dump(mode="json"))}


@pytest.mark.parametrize("feedback", ["soft", "hard"])
def test_full_variants_differ_in_the_feedback_alone(tmp_path: Path, feedback: str) -> None:
    here = context(tmp_path)
    found = {name: recipe_of(here, of) for name, of in module.full_variants(here, feedback).items()}
    on = found["mpl-on"]
    assert on.train_mpl is not None
    assert on.train_mpl.feedback == feedback
    assert keys(on, found["mpl-off"]) == {"train_mpl.feedback_options.weight"}
    assert keys(on, found["mpl-flipped"]) == {"train_mpl.feedback_options.control"}
    assert keys(on, found["mpl-shuffled"]) == {"train_mpl.feedback_options.control"}
    assert found["mpl-off"].train_mpl is not None
    assert found["mpl-off"].train_mpl.feedback_options.weight == 0
    assert found["mpl-off"].train_mpl.feedback == feedback  # the same kind of targets
    assert keys(on, found["alone"]) - {"train_mpl.feedback"} == {"train_mpl.alone"}
    assert "alone-supervised" in found


def test_reduced_variants_differ_in_the_feedback_alone(tmp_path: Path) -> None:
    here = context(tmp_path)
    found = {name: recipe_of(here, of) for name, of in module.reduced_variants(here).items()}
    on = found["reduced-on"]
    assert keys(on, found["reduced-off"]) == {"train_reduced.feedback.weight"}
    assert keys(on, found["reduced-flipped"]) == {"train_reduced.feedback.control"}
    assert keys(on, found["reduced-shuffled"]) == {"train_reduced.feedback.control"}
    fixed = found["reduced-fixed"].train_reduced
    assert (fixed.teacher, fixed.student_data) == ("fixed", "pool")  # what the calibrator's student sees


def test_all_tested_differences_are_judged_together() -> None:
    """Oracle: scipy's paired t-tests, Holm by hand over both groups."""
    off, on, flipped, reduced = [80.0, 82, 84, 81], [85.0, 86.5, 88, 86], [70.0, 75, 74, 70], [80.5, 81, 84.5, 80.8]
    of = {"on": on, "off": off, "flipped": flipped}
    first = {name: [result(x, x - {"on": 1, "off": 0.5}.get(name, 0)) for x in values] for name, values in of.items()}
    second = {"on": [result(x) for x in reduced], "off": [result(x) for x in off]}
    groups = (Group("A", first, "off", ("on", "flipped"), ("on", "off")), Group("B", second, "off", ("on",), ()))
    ablation = Ablation("T", [0, 1, 2, 3], groups, [], [], "c", {})
    p = {name: stats.ttest_rel(values, off).pvalue for name, values in {**of, "reduced": reduced}.items()}
    one, two = sorted((p["on"], p["flipped"]))
    expected = {one: 3 * one, two: max(3 * one, 2 * two)}
    found = ablation.adjusted()
    assert found["A", "on"] == pytest.approx(expected[p["on"]])
    assert found["A", "flipped"] == pytest.approx(expected[p["flipped"]])
    assert found["B", "on"] == pytest.approx(p["reduced"])
    assert "Before finetuning: +4.12" in ablation.answers()[0]
    assert "Before finetuning" not in ablation.answers()[1]
    assert ablation.as_json()["groups"][0]["differences"]["on"]["mean"] == pytest.approx(4.625)


def test_curves_have_one_value_for_each_seed_and_look(tmp_path: Path) -> None:
    for seed, add in (("a", 0), ("b", 10)):
        rows = ["step,train_top1,loss", "2,,1", f"4,{50 + add},1", f"8,{60 + add},1", f"12,{70 + add},"]
        (tmp_path / f"{seed}.csv").write_text("\n".join(rows) + "\n")
    curve = read_curve([tmp_path / "a.csv", tmp_path / "b.csv"], "train_top1", "x", "black")
    assert curve.steps.tolist() == [4, 8, 12]
    np.testing.assert_array_equal(curve.values, [[50, 60, 70], [60, 70, 80]])
    assert curve.averages == [60, 70]
    (tmp_path / "c.csv").write_text("step,train_top1\n4,1\n")
    with pytest.raises(RunError, match="different steps"):
        read_curve([tmp_path / "a.csv", tmp_path / "c.csv"], "train_top1", "x", "black")
    with pytest.raises(RunError, match=r"a\.csv has no teacher_train_top1"):
        read_curve([tmp_path / "a.csv"], "teacher_train_top1", "x", "black")


def test_a_small_ablation_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts_module, "run_chains", run_here)
    run = tmp_path / "run"
    outcome = mpl("reproduce", "ablation", "--recipe", tiny(tmp_path), "--run", run, "--seeds", 1)
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "ablation.json").read_text())
    full, reduced = found["groups"]
    assert list(full["results"]) == [
        "feedback on", "feedback off", "sign flipped", "rows shuffled", "UDA, alone", "Supervised, alone",
    ]  # fmt: skip
    assert list(reduced["results"])[:4] == list(full["results"])[:4]
    on, off = full["results"]["feedback on"], full["results"]["feedback off"]
    assert full["differences"]["feedback on"]["mean"] == pytest.approx(
        np.mean([a["top1"] - b["top1"] for a, b in zip(on, off, strict=True)])
    )
    (train, validation) = found["training"].values()
    assert [line["name"] for line in train] == [line["name"] for line in validation]
    assert train[2]["steps"] == [1, 2, 3, 4]
    assert np.array(train[2]["values"]).shape == (1, 4)
    quarters = json.loads((run / "seed-0/student-reduced-on/calibration.json").read_text())["quarters"]
    assert [quarter["step"] for quarter in quarters] == [0, 2, 4, 6, 8]
    assert found["calibration"]["steps"] == [0, 2, 4, 6, 8]
    assert not (run / "seed-0/student-reduced-fixed/calibration.json").exists()
    text = (run / "ablation.md").read_text()
    for name in ("ablation.png", "ablation-training.png", "ablation-calibration.png"):
        assert f"]({name})" in text
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_training_leaves_the_same_calibration(finished: Path, run: Path) -> None:
    class Stops(Console):
        asked = 0

        def stop_requested(self) -> bool:
            self.asked += 1
            return self.asked == 14

    path = run / "student/calibration.json"
    stopped = replace(make_context(Options(run), console=Stops(quiet=True)), force=True)
    with pytest.raises(KeyboardInterrupt):
        execute(stopped, train_reduced.plan)
    assert read_calibration(path).steps == [0, 6, 12]
    execute(make_context(Options(run), console=Console(quiet=True)), train_reduced.plan)
    assert path.read_bytes() == (finished / "student/calibration.json").read_bytes()
    found = read_calibration(path)
    assert found.steps == [0, 6, 12, 18, 24]
    store = TargetsStore.open(run / "targets")
    np.testing.assert_allclose(found.teacher, store.distributions()[: len(found.teacher)], atol=1e-6)
    np.testing.assert_allclose(found.calibrated.sum(-1), 1, atol=1e-5)
