"""`mpl reproduce sweep`: its pairs differ in the feedback alone, and a small one runs from end to end."""

import csv
import itertools
import json
from pathlib import Path

import pytest

from pipeline.config import Recipe, load_recipe
from pipeline.report.experiments.axes import Axis, Level
from pipeline.storage.files import sha256_file
from stages.console import Console
from stages.options import Context, Options, changed, make_context
from stages.reproduce import sweep as module
from stages.reproduce.sweep import FIXED, MPL, MPL_OFF, ORIGIN, REDUCED, REDUCED_OFF, STUDY, Point, Study, pool_of
from tests.stages.reproduce.comparisons import different_keys, run_here

METHODS = {method.name: method for method in STUDY.methods}
POINTS = {point.name: point for point in STUDY.points}
SMALL = (
    "pretrain.steps=6", "pretrain.model.name=wrn_10_1", "pretrain.schedule.warmup_steps=0",
    "train_reduced.batch=8", "train_reduced.schedule.warmup_steps=0", "train_reduced.feedback.batch=8",
    "train_mpl.batch=8", "train_mpl.labelled_batch=8", "train_mpl.schedule.warmup_steps=0",
)  # fmt: skip


def context(run: Path, *changes: str) -> Context:
    return make_context(Options(run, "digits", changes), console=Console(quiet=True))


def recipe_of(name: str, point: Point = ORIGIN) -> Recipe:
    """What the training stage of a method sees."""
    chain = module.point_chain(context(Path("run")), point, 3, 400)
    (step,) = [s for s in chain.steps if s.module.startswith("train") and s.arguments == {"name": name}]
    assert step.module == METHODS[name].module
    assert chain.seed == 3
    return changed(load_recipe("digits").model_dump(mode="json"), step.changes, "digits")


@pytest.mark.parametrize("point", [ORIGIN, Point(outside=0.6), Point(noise=0.4), Point(imbalance=16)])
def test_pairs_differ_in_the_feedback_alone(point: Point) -> None:
    assert different_keys(recipe_of(MPL, point), recipe_of(MPL_OFF, point)) == {"train_mpl.feedback"}
    assert different_keys(recipe_of(REDUCED, point), recipe_of(REDUCED_OFF, point)) == {"train_reduced.feedback.weight"}
    assert recipe_of(REDUCED_OFF, point).train_reduced.feedback.weight == 0
    assert {(c.variant, c.against) for c in STUDY.contrasts if c.tested} == {(MPL, MPL_OFF), (REDUCED, REDUCED_OFF)}
    assert recipe_of(REDUCED).train_reduced.calibrator.supervised_weight == 0


def test_one_thing_changes_along_an_axis() -> None:
    for axis in STUDY.axes:
        assert axis.levels[0].point == ORIGIN.name
        for a, b in itertools.pairwise(vars(POINTS[level.point]) for level in axis.levels):
            assert len({key for key in a if a[key] != b[key]}) == 1
    for point in STUDY.points:
        for seed in range(10):
            assert pool_of(point, seed).per_class().sum() + pool_of(point, seed).pieces() == STUDY.size
    assert set(POINTS) == {level.point for axis in STUDY.axes for level in axis.levels}
    assert len(POINTS) == len(STUDY.points)


def test_noise_is_the_teachers() -> None:
    """Its own labelled loss has wrong labels; nothing else in the recipe knows of them."""
    point = Point(noise=0.4)
    run = context(Path("run"))
    assert recipe_of(MPL, point).train_mpl.teacher.label_noise == 0.4
    assert recipe_of(MPL).train_mpl.teacher.label_noise == 0.0
    teacher = module.teacher_chain(run, point.noise, 0, 400)
    (pretrain,) = teacher.steps
    assert "pretrain.label_noise=0.4" in pretrain.changes
    chosen = module.point_chain(run, point, 0, 400).steps[0].arguments["teacher"]
    assert chosen == (teacher.run / "teacher").resolve()
    assert different_keys(recipe_of(FIXED, point), recipe_of(FIXED)) == {"train_mpl.teacher.label_noise"}


def test_a_small_sweep_runs_and_goes_on(mpl, monkeypatch, tmp_path: Path) -> None:
    outside = Point(outside=0.5)
    study = Study(
        size=40,
        points=(outside,),
        axes=(Axis("Outside", "outside", (Level("50%", outside.name),)),),
        methods=tuple(METHODS[name] for name in (REDUCED_OFF, REDUCED, MPL)),
        contrasts=STUDY.contrasts[:1],
    )
    monkeypatch.setattr(module, "STUDY", study)
    run_here(monkeypatch)
    small = [word for change in SMALL for word in ("--set", change)]
    line = ["reproduce", "sweep", "--run", tmp_path / "run", "--seeds", 1, "--jobs", 1, "--steps", 4, *small]
    outcome = mpl(*line)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "run/sweep.json").read_text())
    rows = list(csv.DictReader((tmp_path / "run/sweep.csv").read_text().splitlines()))
    assert len(rows) == 3
    for row in rows:
        judged = json.loads((tmp_path / f"run/{row['point']}-seed-0/evaluation-{row['method']}.json").read_text())
        assert float(row["top1"]) == judged["top1"]
        assert judged["split"] == "test"
    kept = json.loads((tmp_path / f"run/{outside.name}-seed-0/filter/record.json").read_text())["result"]["kept"]
    assert kept == 40
    assert found["seeds"] == [0]
    assert found["reference"]["results"][0]["top1"] > 0
    assert "Outside" in (tmp_path / "run/sweep.md").read_text()
    assert "already done" in mpl(*line).err

    weights = tmp_path / f"run/{outside.name}-seed-0/student-{REDUCED}/model.safetensors"
    before, page = sha256_file(weights), (tmp_path / "run/sweep.csv").read_text().split("seconds")[0]
    weights.unlink()
    (tmp_path / "run/sweep/record.json").unlink()
    assert mpl(*line).status == 0
    assert sha256_file(weights) == before
    assert (tmp_path / "run/sweep.csv").read_text().startswith(page)


def test_other_data_and_recipes_without_mpl_are_refused(mpl, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "data").mkdir()
    outcome = mpl("reproduce", "sweep", "--run", tmp_path / "a", "--data", tmp_path / "data", "--recipe", "digits")
    assert outcome.status == 2
    assert "leave out --data" in outcome.err
    outcome = mpl("reproduce", "sweep", "--run", tmp_path / "b", "--recipe", "svhn")
    assert outcome.status == 2
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").glob("*seed*"))
