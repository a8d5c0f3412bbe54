"""`mpl reproduce ablation`: variants differ in the feedback alone, and a small one runs from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.calibration import read_calibration
from pipeline.config import Recipe
from pipeline.targets import TargetsStore
from stages import train_reduced
from stages.console import Console
from stages.execution import execute
from stages.options import Context, Options, changed, make_context
from stages.reproduce import ablation as module
from stages.reproduce.variants import Variant
from tests.stages.reproduce.comparisons import different_keys, run_here, tiny, tiny_context

LABELS = ("feedback on", "feedback off", "sign flipped", "rows shuffled")


def recipes(context: Context, chosen: list[Variant]) -> dict[str, Recipe]:
    """What every training stage sees."""
    tree = context.recipe.model_dump(mode="json")
    return {variant.name: changed(tree, variant.steps(Path("run"))[0].changes, "tiny") for variant in chosen}


@pytest.mark.parametrize("feedback", ["soft", "hard"])
def test_full_variants_differ_in_the_feedback_alone(tmp_path: Path, feedback: str) -> None:
    here = tiny_context(tmp_path)
    chosen = module.full_variants(here, feedback)
    assert [variant.label for variant in chosen] == [*LABELS, "UDA, alone", "Supervised, alone"]
    assert [variant.name for variant in chosen if variant.finetuned] == [f"mpl-{name}" for name in module.FEEDBACK]
    found = recipes(here, chosen)
    on = found["mpl-on"]
    assert on.train_mpl is not None
    assert on.train_mpl.feedback == feedback
    assert different_keys(on, found["mpl-off"]) == {"train_mpl.feedback_options.weight"}
    assert different_keys(on, found["mpl-flipped"]) == {"train_mpl.feedback_options.control"}
    assert different_keys(on, found["mpl-shuffled"]) == {"train_mpl.feedback_options.control"}
    assert found["mpl-off"].train_mpl is not None
    assert found["mpl-off"].train_mpl.feedback_options.weight == 0
    assert found["mpl-off"].train_mpl.feedback == feedback  # the same kind of targets
    assert different_keys(on, found["alone"]) - {"train_mpl.feedback"} == {"train_mpl.alone"}
    assert "alone-supervised" in found


def test_reduced_variants_differ_in_the_feedback_alone(tmp_path: Path) -> None:
    here = tiny_context(tmp_path)
    chosen = module.reduced_variants(here)
    assert [variant.label for variant in chosen] == [*LABELS, "NoisyStudent, the same data"]
    found = recipes(here, chosen)
    on = found["reduced-on"]
    assert different_keys(on, found["reduced-off"]) == {"train_reduced.feedback.weight"}
    assert different_keys(on, found["reduced-flipped"]) == {"train_reduced.feedback.control"}
    assert different_keys(on, found["reduced-shuffled"]) == {"train_reduced.feedback.control"}
    fixed = found["reduced-fixed"].train_reduced
    assert (fixed.teacher, fixed.student_data) == ("fixed", "pool")  # what the calibrator's student sees


def test_a_small_ablation_from_end_to_end(mpl, monkeypatch, tmp_path: Path) -> None:
    run_here(monkeypatch)
    monkeypatch.setattr(module, "FEEDBACK", {name: module.FEEDBACK[name] for name in ("on", "off")})
    run = tmp_path / "run"
    outcome = mpl("reproduce", "ablation", "--recipe", tiny(tmp_path), "--run", run, "--seeds", 1)
    assert outcome.status == 0, outcome.err
    found = json.loads((run / "ablation.json").read_text())
    full, reduced = found["groups"]
    assert list(full["results"]) == [
        "feedback on", "feedback off", "UDA, alone", "Supervised, alone",
    ]  # fmt: skip
    assert list(reduced["results"]) == ["feedback on", "feedback off", "NoisyStudent, the same data"]
    assert {name: d["holm"] for name, d in full["differences"].items()} == {  # with one seed none can be judged
        "feedback on": 1.0, "UDA, alone": None, "Supervised, alone": None,
    }  # fmt: skip
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
    assert read_calibration(run / ".student.new/calibration.json").steps == [0, 6, 12]
    assert read_calibration(path).steps == [0, 6, 12, 18, 24]  # the old one's, until the new one stands
    execute(make_context(Options(run), console=Console(quiet=True)), train_reduced.plan)
    assert path.read_bytes() == (finished / "student/calibration.json").read_bytes()
    found = read_calibration(path)
    assert found.steps == [0, 6, 12, 18, 24]
    store = TargetsStore.open(run / "targets")
    np.testing.assert_allclose(found.teacher, store.distributions()[: len(found.teacher)], atol=1e-6)
    np.testing.assert_allclose(found.calibrated.sum(-1), 1, atol=1e-5)
