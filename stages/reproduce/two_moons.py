"""`mpl reproduce two-moons`: do Supervised, Pseudo Labels and MPL separate two moons with six labels?

The paper's settings first, then changes one at a time, and what the feedback does where the networks can learn.
"""

import os
from pathlib import Path
from typing import Any

import click

from pipeline.moons.settings import VariantName
from stages.execution import Stage, execute
from stages.options import Context
from stages.reproduce.commands import own_run, seeds_text

DRAWS = 20
CELLS = "two-moons/cells"  # results so far
RUN = Path("runs/two-moons")


def reproduce(
    context: Context, draws: int | None, jobs: int | None, variant: VariantName | None, steps: int | None
) -> None:
    """The command: choose the run directory, run, and show the table."""
    context = own_run(context, RUN)
    wanted = range(context.seed, context.seed + (draws or DRAWS))
    execute(context, lambda c: plan(c, wanted, jobs, variant, steps))
    if not context.dry_run and not context.as_json:
        click.echo((context.run / "two-moons.md").read_text())


def plan(context: Context, draws: range, jobs: int | None, variant: VariantName | None, steps: int | None) -> Stage:
    """Plan the experiment as one stage."""
    from pipeline.moons.study import rows

    study = rows(variant, {} if steps is None else {"steps": steps})
    outputs = [context.run / f"two-moons.{suffix}" for suffix in ("md", "csv", "json", "png")]
    settings = {row.name: [row.label, list(row.methods), row.settings.model_dump(mode="json")] for row in study}
    return Stage(
        name="two-moons",
        basis={"draws": len(draws), "rows": settings} | ({"first": draws.start} if draws.start else {}),
        outputs=outputs,
        work=lambda: work(context, draws, jobs, variant, steps),
        summary=lambda result: f"{outputs[0]}",
        replaces=[*outputs, context.run / CELLS],
        cheap=frozenset({"draws", "first"}),
    )


def work(
    context: Context, draws: range, jobs: int | None, variant: VariantName | None, steps: int | None
) -> dict[str, Any]:
    """Train every cell, a process each, then write table and figure."""
    from pipeline.moons.study import Cell, CellResult, RunCell, cells, rows
    from pipeline.report.experiments.moons import MoonsReport
    from pipeline.storage.workers import EngineSettings, run_all

    study = rows(variant, {} if steps is None else {"steps": steps})
    items, found, taken = cells(study, draws), dict[str, CellResult](), 0
    total, kept = sum(item.settings.steps for item in items), context.run / CELLS

    def done(cell: Cell, result: CellResult) -> None:
        nonlocal taken
        if not (kept / cell.file).exists():
            result.save(kept / cell.file)
        found[cell.name] = result
        taken += cell.settings.steps
        right = sum(result.successes(cell.settings))
        context.console.progress(taken, total, {})
        context.console.note(f"  {cell.name}: {right} of {len(draws)} draws separated")

    for cell in items:
        if (kept / cell.file).exists():  # of an interrupted attempt
            done(cell, CellResult.load(kept / cell.file))
    items = [cell for cell in items if cell.name not in found]
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
    command = " ".join(
        ["mpl reproduce two-moons", seeds_text(draws)]
        + ([f"--variant {variant}"] if variant else [])
        + ([f"--steps {steps}"] if steps else [])
    )
    report = MoonsReport(study, found, draws, command)
    report.write(context.run.root, "two-moons")
    return {"success": report.successes()}
