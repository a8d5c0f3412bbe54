"""Chains of stages: results by name, first failures, what a new process finds loaded."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError, UsageError
from stages.reproduce import chains
from stages.reproduce.chains import Chain, Step, run_chains
from stages.reproduce.variants import Variant, results_of
from tests.stages.reproduce.comparisons import run_here, tiny_context


def test_what_a_new_process_finds_loaded_exists() -> None:
    """The server of processes is silent about a name that is gone, and every stage would start slowly."""
    for name in chains.PRELOAD + chains.DIGITS:
        importlib.import_module(name)


def test_records_come_back_by_name_in_the_order_of_the_chains(monkeypatch, tmp_path: Path) -> None:
    def step_of(values: dict[str, Any], step: Step, threads: int) -> dict[str, Any]:
        return {"stage": f"{step.module}-{values['run'].name}", "seed": values["seed"]}

    run_here(monkeypatch)
    monkeypatch.setattr(chains, "run_step", step_of)
    asked = {key: Chain(tmp_path / key, seed, (Step("b"), Step("a"))) for seed, key in enumerate("zyxw")}
    found = run_chains(tiny_context(tmp_path), asked, 3)
    assert list(found) == list(asked)
    for seed, key in enumerate(asked):
        assert found[key] == {f"{m}-{key}": {"stage": f"{m}-{key}", "seed": seed} for m in ("a", "b")}


def test_stages_run_in_processes_of_their_own(tmp_path: Path) -> None:
    context = tiny_context(tmp_path)
    found = run_chains(context, {0: Chain(tmp_path / "run", 3, (Step("pretrain"), Step("filter", ("filter.k=4",))))}, 1)
    assert list(found[0]) == ["pretrain", "filter"]
    assert found[0]["filter"]["result"]["k"] == 4
    assert (tmp_path / "run/selection.parquet").exists()


def test_the_first_failure_is_raised_and_a_store_is_refused(monkeypatch, tmp_path: Path) -> None:
    begun = []

    def step_of(values: dict[str, Any], step: Step, threads: int) -> dict[str, Any]:
        begun.append(step.module)
        if step.module == "bad":
            raise RunError("no room")
        return {"stage": step.module}

    run_here(monkeypatch)
    monkeypatch.setattr(chains, "run_step", step_of)
    context = tiny_context(tmp_path)
    with pytest.raises(RunError, match="no room"):
        run_chains(context, {0: Chain(tmp_path, 0, (Step("good"), Step("bad"), Step("never")))}, 1)
    assert begun == ["good", "bad"]
    with pytest.raises(UsageError, match="--store"):
        run_chains(replace(context, store=tmp_path / "elsewhere"), {}, 1)


def test_figures_of_a_finetuned_student_are_of_both_trainings() -> None:
    def judged(top1: float) -> dict[str, Any]:
        return {"result": {"top1": top1, "top5": 99.0, "nll": 0.5, "ece": 2.0}}

    def trained(seconds: float, top1: float) -> dict[str, Any]:
        return {
            "result": {"train_seconds": seconds, "train_peak_memory_mib": seconds, "validation": {"top1": top1}},
        }

    records = {
        "train-mpl-x": trained(10, 70),
        "evaluate-x-trained": judged(71),
        "finetune-x": trained(2, 80),
        "evaluate-x": judged(81),
    }
    tuned = Variant("x", "X", "train_mpl", finetuned=True)
    results = results_of([tuned], {3: records})
    assert results.figures["x"][3] == {
        "top1": 81, "top5": 99, "nll": 0.5, "ece": 2, "seconds": 12, "memory_mib": 10, "validation_top1": 80,
        "trained_top1": 71,
    }  # fmt: skip
    assert (results.seeds, results.labels, results.finetuned) == ([3], {"x": "X"}, {"x"})
    plain = Variant("x", "X", "train_mpl").figures(records)
    assert (plain["trained_top1"], plain["seconds"], plain["validation_top1"]) == (81, 10, 70)
    assert [step.module for step in tuned.steps(Path("run"))] == ["train_mpl", "evaluate", "finetune", "evaluate"]
    before = tuned.steps(Path("run"))[1]
    assert before.arguments == {"network": Path("run/student-x"), "name": "x-trained"}
