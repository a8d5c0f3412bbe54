"""`mpl reproduce two-moons`: do Supervised, Pseudo Labels and MPL separate two moons with six labels?

The paper's settings first, then changes one at a time, and what the feedback does where the networks can learn.
"""

import os
from dataclasses import replace
from typing import Any

from pipeline.moons.settings import VariantName
from pipeline.moons.study import Cell, CellResult, Row, RunCell, cells, rows
from pipeline.report.experiments.moons import MoonsReport
from pipeline.report.experiments.report import About
from pipeline.storage.workers import EngineSettings, run_all
from stages.execution import Stage
from stages.reproduce.experiment import SeedRuns, seeds_options

DRAWS = 20
CELLS = "two-moons/cells"  # results so far


def plan(runs: SeedRuns, variant: VariantName | None, steps: int | None) -> Stage:
    """Plan the experiment as one stage; a seed is a draw."""
    study = rows(variant, {} if steps is None else {"steps": steps})
    settings = {row.name: [row.label, list(row.methods), row.settings.model_dump(mode="json")] for row in study}
    command = " ".join(
        ["mpl reproduce two-moons", seeds_options(runs.seeds)]
        + ([f"--variant {variant}"] if variant else [])
        + ([f"--steps {steps}"] if steps else [])
    )
    first = {"first": runs.seeds.start} if runs.seeds.start else {}
    stage = runs.stage(
        "two-moons",
        {"draws": len(runs.seeds), "rows": settings, **first},
        lambda: work(runs, study, command),
        cheap=frozenset({"draws", "first"}),
    )
    return replace(stage, replaces=sorted((runs.context.run / CELLS).glob("*.npz")))


def work(runs: SeedRuns, study: list[Row], command: str) -> dict[str, Any]:
    """Train every cell, a process each, then write table and figure."""
    context, draws = runs.context, runs.seeds
    items, results, taken = cells(study, draws), dict[str, CellResult](), 0
    total, folder = sum(item.settings.steps for item in items), context.run / CELLS

    def done(cell: Cell, result: CellResult) -> None:
        nonlocal taken
        if not (folder / cell.file).exists():
            result.save(folder / cell.file)
        results[cell.name] = result
        taken += cell.settings.steps
        right = sum(result.successes(cell.settings))
        context.console.progress(taken, total, {})
        context.console.note(f"  {cell.name}: {right} of {len(draws)} draws separated")

    for cell in items:
        if (folder / cell.file).exists():  # of an interrupted attempt
            done(cell, CellResult.load(folder / cell.file))
    items = [cell for cell in items if cell.name not in results]
    workers = runs.jobs or len(os.sched_getaffinity(0))
    run_all(
        EngineSettings(workers=max(1, min(workers, len(items)))),
        RunCell(),
        items,
        name=lambda cell: cell.name,
        progress=lambda steps: None,
        done=done,
        stop=context.console.stop_requested,
    )
    report = MoonsReport(About("two-moons", "Two moons", command), study, results, draws)
    report.write(context.run.root)
    return {"success": report.successes()}
