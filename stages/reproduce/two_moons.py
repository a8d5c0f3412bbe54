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
from stages.options import Context
from stages.reproduce.experiment import comparison_stage, report_files, seeds_options

DRAWS = 20
CELLS = "two-moons/cells"  # results so far


def plan(context: Context, draws: range, jobs: int | None, variant: VariantName | None, steps: int | None) -> Stage:
    """Plan the experiment as one stage."""
    study = rows(variant, {} if steps is None else {"steps": steps})
    settings = {row.name: [row.label, list(row.methods), row.settings.model_dump(mode="json")] for row in study}
    files = report_files(context, "two-moons")
    command = " ".join(
        ["mpl reproduce two-moons", seeds_options(draws)]
        + ([f"--variant {variant}"] if variant else [])
        + ([f"--steps {steps}"] if steps else [])
    )
    stage = comparison_stage(
        "two-moons",
        {"draws": len(draws), "rows": settings} | ({"first": draws.start} if draws.start else {}),
        files,
        lambda: work(context, study, draws, jobs, command),
        cheap=frozenset({"draws", "first"}),
    )
    return replace(stage, replaces=[*files, context.run / CELLS])


def work(context: Context, study: list[Row], draws: range, jobs: int | None, command: str) -> dict[str, Any]:
    """Train every cell, a process each, then write table and figure."""
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
    workers = jobs or len(os.sched_getaffinity(0))
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
