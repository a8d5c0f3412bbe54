"""`mpl reproduce correction`: a small one from end to end, with a teacher of 25 classes whose answers are made up."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import load_recipe
from pipeline.correction import load_correction
from pipeline.report.experiments.corrections import Corrections, Panel, TeacherRow
from pipeline.report.experiments.report import About
from pipeline.report.experiments.results import Contrast, Results
from stages.options import changed
from stages.reproduce.black_boxes import BlackBox, Place, long_tail
from stages.reproduce.correction import CELLS, METHODS, OURS, with_methods
from tests.stages.reproduce.comparisons import different_keys, run_here
from tests.stages.test_predictions import MAP, OWN, all_keys, truth

RECIPE = """
name: foreign
data: {{manifest: digits, image_size: 8, labelled: 20}}
pretrain: {{model: {{name: wrn_10_1}}, steps: 3, batch: 8}}
filter: {{k: 10, predictions: ["{answers}"], class_map: "{map}"}}
train_reduced:
  model: {{name: wrn_10_1}}
  steps: 4
  batch: 8
  optimizer: {{rule: sgd, lr: 0.05}}
  feedback: {{batch: 8, every: 2}}
finetune: {{steps: 2, batch: 8, optimizer: {{rule: sgd, lr: 0.01}}}}
"""


@pytest.fixture
def recipe_of_a_foreign_teacher(tmp_path: Path) -> Path:
    """Answers that tell the digit most of the time; two classes for each, five for photographs."""
    draw, keys = np.random.default_rng(0), all_keys()
    labels = truth(keys)
    z = draw.normal(size=(len(keys), 25))
    z[np.arange(len(keys)), 2 * labels + np.where(labels < 10, draw.integers(0, 2, len(keys)), 0)] += 4
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    table = pa.table({"key": keys, "probabilities": p.astype(np.float32).tolist()})
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(OWN)}), tmp_path / "own.parquet")
    (tmp_path / "map.yaml").write_text(json.dumps(MAP))
    recipe = tmp_path / "foreign.yaml"
    recipe.write_text(RECIPE.format(answers=tmp_path / "own.parquet", map=tmp_path / "map.yaml"))
    return recipe


def test_every_method_is_a_recipe(recipe_of_a_foreign_teacher: Path) -> None:
    """And differs from the others; those of a contrast in one thing alone where it says so."""
    tree = load_recipe(str(recipe_of_a_foreign_teacher)).model_dump(mode="json")
    everything = CELLS["long-tailed"].methods
    recipes = {method.name: changed(tree, method.changes, "tiny") for method in everything}
    assert len({recipe.model_dump_json() for recipe in recipes.values()}) == len(everything)
    for a, b, settings in (
        ("fixed", "fit", {"train_reduced.correction"}),
        ("fixed", "prior-em", {"train_reduced.correction"}),
        ("fixed", "prior-bbse", {"train_reduced.correction"}),
        ("feedback", "flipped", {"train_reduced.feedback.control"}),
        ("feedback", "feedback-fit", {"train_reduced.correction"}),
        ("feedback", "both", {"train_reduced.calibrator.supervised_weight"}),
        ("feedback", "feedback-seeing", {"train_reduced.calibrator.embedding"}),
        ("both", "both-seeing", {"train_reduced.calibrator.embedding"}),
        ("both-seeing", "term-seeing", {"train_reduced.feedback.weight"}),
        ("feedback", "per-image", {"train_reduced.feedback.scale", "train_reduced.calibrator.weight_decay"}),
    ):
        assert different_keys(recipes[a], recipes[b]) == settings


def test_a_small_one_from_end_to_end(mpl, monkeypatch, tmp_path: Path, recipe_of_a_foreign_teacher: Path) -> None:
    run_here(monkeypatch)
    names = ("fixed", "fit", OURS.name, "both-seeing", "prior-em", "prior-bbse")
    asked = tuple(method for method in CELLS["long-tailed"].methods if method.name in names)
    for name in ("long-tailed", "clean"):
        monkeypatch.setitem(CELLS, name, replace(CELLS[name], methods=asked))
    run = tmp_path / "run"
    line = ["reproduce", "correction", "--run", run, "--recipe", recipe_of_a_foreign_teacher, "--jobs", 1]
    outcome = mpl(*line, "--seeds", 2, "--teacher", "long-tailed", "--teacher", "clean")
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader((run / "correction.csv").read_text().splitlines()))
    students = {(row["teacher"], row["method"]) for row in rows}
    assert students == {("none", "supervised")} | {
        (cell.name, method.name) for cell in CELLS.values() if cell.tail for method in cell.methods
    }
    for row in rows:
        folder = run / f"{'alone' if row['teacher'] == 'none' else row['teacher']}-seed-{row['seed']}"
        for figure, name in (("top1", row["method"]), ("trained_top1", f"{row['method']}-trained")):
            judged = json.loads((folder / f"evaluation-{name}.json").read_text())
            assert float(row[figure]) == judged["top1"]
            assert judged["split"] == "test"
    seeds = [json.loads((run / f"clean-seed-{seed}/filter/record.json").read_text()) for seed in (0, 1)]
    assert [record["result"]["kept"] for record in seeds] == [1347, 1347]  # the pool is not filtered
    drawn = [json.loads((run / f"clean-seed-{s}/train-reduced-fit/record.json").read_text())["basis"] for s in (0, 1)]
    assert drawn[0]["labelled"] != drawn[1]["labelled"]
    found = json.loads((run / "correction.json").read_text())["teachers"]
    own = found["clean"]["teacher"]["as it is"][0]
    assert own > found["long-tailed"]["teacher"]["as it is"][0]  # a tail is worse than all images
    assert own > 70
    page = (run / "correction.md").read_text()
    assert "--seeds 2 --teacher long-tailed --teacher clean" in page
    assert "Not among the rivals: GLC, ZeroMatch" in page
    assert {"Feedback − Prior shift by EM", "Feedback − Prior shift by BBSE"} <= found["clean"]["differences"].keys()
    assert "p_holm" not in found["long-tailed"]["differences"]["Feedback − Prior shift by EM"]
    assert (run / "correction.png").read_bytes().startswith(b"\x89PNG")
    assert "already done" in mpl(*line, "--seeds", 2, "--teacher", "long-tailed", "--teacher", "clean").err


def test_the_teacher_itself_by_its_map(mpl, monkeypatch, tmp_path: Path, recipe_of_a_foreign_teacher: Path) -> None:
    run_here(monkeypatch)
    monkeypatch.setitem(CELLS, "zero-shot", replace(CELLS["zero-shot"], methods=METHODS[:3]))
    run = tmp_path / "run"
    line = ["reproduce", "correction", "--run", run, "--recipe", recipe_of_a_foreign_teacher, "--jobs", 1]
    names = tmp_path / "names.json"
    names.write_text(json.dumps(OWN))
    outcome = mpl(*line, "--seeds", 1, "--teacher", "zero-shot", "--set", f"filter.predictions_classes={names}")
    assert outcome.status == 0, outcome.err
    chain = run / "zero-shot-seed-0"
    assert load_correction(chain / "correction.safetensors").kind == "map"
    kinds = json.loads((chain / "train-reduced-scaling/record.json").read_text())["basis"]["settings"]["correction"]
    assert kinds == "scaling"
    recipe = json.loads((chain / "run.json").read_text())["recipe"]["filter"]
    assert recipe["predictions_classes"] is None  # what was said of other files is not said of these
    (box,) = [path for path in run.glob("answers-*") if "tail" not in path.name]
    places, q = BlackBox(box, tuple(OWN)).read(box / "unlabelled-00000.parquet")
    assert q.shape == (len(places), 25)
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [("data.labelled=null", "set data.labelled"), ("filter.predictions=[]", "was not trained on the labelled images")],
)
def test_what_it_needs(mpl, tmp_path: Path, recipe_of_a_foreign_teacher: Path, change: str, words: str) -> None:
    line = ["reproduce", "correction", "--run", tmp_path / "run", "--recipe", recipe_of_a_foreign_teacher]
    outcome = mpl(*line, "--set", change)
    assert outcome.status == 2
    assert words in outcome.err


def test_some_students_alone(mpl, tmp_path: Path, recipe_of_a_foreign_teacher: Path) -> None:
    some = with_methods(CELLS["long-tailed"], ["both-seeing", "fixed"])
    assert [method.name for method in some.methods] == ["fixed", "both-seeing"]
    assert with_methods(CELLS["clean"], ()) is CELLS["clean"]
    line = ["reproduce", "correction", "--run", tmp_path / "run", "--recipe", recipe_of_a_foreign_teacher]
    outcome = mpl(*line, "--teacher", "clean", "--method", "both-seeing")
    assert outcome.status == 2
    assert "the teacher clean has the students fixed, noisystudent, fit, feedback" in outcome.err


def test_a_tail_is_geometric() -> None:
    labels = np.repeat(np.arange(5), 200)
    counts = sorted(np.bincount(labels[long_tail(labels, 50)]).tolist(), reverse=True)
    assert counts == [200, 75, 28, 10, 4]
    assert len(long_tail(labels, 1)) == 1000


def test_an_image_without_an_answer_is_named(tmp_path: Path) -> None:
    box = BlackBox(tmp_path, ("a", "b"))
    box.write("test", 0, [Place("x", 3)], np.array([[0.25, 0.75]], np.float32))
    assert box.of("test", [Place("x", 3)]).tolist() == [[0.25, 0.75]]
    with pytest.raises(Exception, match="no answer about 1 test images"):
        box.of("test", [Place("x", 4)])


def made_up(ours: float) -> Corrections:
    """Three draws of a teacher."""
    draws = (0.0, 0.1, -0.1)
    means = {"feedback": 50 + ours, "fixed": 40.0, "fit": 50.0, "noisystudent": 42.0}
    figures = {
        name: {
            seed: dict.fromkeys(("top5", "nll", "ece", "seconds", "memory_mib", "validation_top1"), 1.0)
            | {"top1": mean + shift * (name == "feedback"), "trained_top1": mean}
            for seed, shift in enumerate(draws)
        }
        for name, mean in means.items()
    }
    results = Results({name: name for name in means}, figures, frozenset(means))
    asked = tuple(Contrast(f"− {o}", OURS.name, o, tested=True) for o in ("fixed", "fit", "noisystudent"))
    panel = Panel("p", "A teacher", results, asked, (), [TeacherRow("as it is", (40.0,))])
    return Corrections(About("correction", "t", "c"), (panel,), results)


def test_the_rule_asks_for_all_three() -> None:
    assert "feedback helps (+12.00 over fixed, +2.00 over fit, +10.00 over noisystudent)" in made_up(2).answer()
    assert "feedback does not help" in made_up(0).answer()
    assert "feedback does not help" in made_up(-2).answer()
