"""`mpl status`: where a run stands."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline.errors import RunError, UserError
from pipeline.storage.files import location, names_in, read_json
from pipeline.storage.metrics import read_metrics
from pipeline.storage.progress import Progress, read_progress, time_left
from pipeline.storage.runs import RECORD_FILE, STARTED_FILE, Run
from stages.terminal import say

STALE = 120.0  # seconds of silence that are told
ORDER = ("pretrain", "filter", "precompute", "train-reduced", "train-mpl", "finetune", "evaluate")


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/default"), envvar="MPL_RUN",
              show_default=True, show_envvar=True, help="Run directory.")  # fmt: skip
@click.option("--verify", is_flag=True, help="Read all that was made and compare it with its checksums.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def command(run: Path, verify: bool, as_json: bool) -> None:
    """Show which stages of a run are done, at work, begun or to come, their main figures and the time that is left."""
    directory = Run(run)
    description = directory.description
    if description is None:
        raise RunError(f"there is no run at {run}; begin one with: mpl pretrain --run {run}")
    rows = [stage_status(directory, name) for name in stage_names(directory)]
    recipe, seed = description["recipe"]["name"], description["seed"]
    problems = list(damage(directory)) if verify else []
    if as_json:
        found = {"problems": problems} if verify else {}
        click.echo(json.dumps({"run": str(run), "recipe": recipe, "seed": seed, "stages": rows, **found}))
    else:
        _show(f"{run}: recipe {recipe}, seed {seed}, begun {description['created']}", rows, problems, verify)
    if problems:
        sys.exit(1)


def _show(title: str, rows: list[dict[str, Any]], problems: list[str], verified: bool) -> None:
    say(title, err=False)
    for row in rows:
        say(f"  {row['stage']:<24} {row['state']:<12} {row['detail']}", err=False)
    for problem in problems:
        say(f"DAMAGED: {problem}", err=False)
    if verified and not problems:
        say("all that is done was read, and is what was made", err=False)


def damage(run: Run) -> Iterator[str]:
    """What is not as it was made, of all that finished stages made; everything is read."""
    from pipeline.answers.store import FOLDER, answers_trouble
    from pipeline.pool.scores import SCORES
    from pipeline.storage.tables import open_table
    from stages.basis import require_unchanged
    from stages.filter import selection_trouble
    from stages.precompute import targets_trouble

    store = location((run.description or {}).get("store") or run.root)

    def scores(result: dict[str, Any]) -> str:
        for name in sorted(name for name in names_in(store / "scores") if name.startswith("part-")):
            with open_table(store / "scores" / name, SCORES) as table:
                for _ in table.batches(table.file.schema_arrow.names, 4096):
                    pass
        return ""

    def answers(result: dict[str, Any]) -> str:
        return answers_trouble(store / FOLDER) if "answers" in result else ""

    of_pool: dict[str, list[Callable[[dict[str, Any]], str]]] = {
        "filter": [scores, answers, partial(selection_trouble, store)],
        "precompute": [partial(targets_trouble, store, full=True)],
    }
    for stage in stage_names(run):
        if (record := run.record(stage)) is None:
            continue
        for check in of_pool.get(stage, [partial(require_unchanged, run / metrics_folder(stage))]):
            try:
                trouble = check(record["result"])
            except (UserError, OSError) as error:
                trouble = str(error)
            if trouble:
                yield f"{stage}: {trouble}"


def stage_names(run: Run) -> list[str]:
    """The stages in pipeline order, then the named variants that are there.

    Of the two ways to train a student, Reduced MPL's is shown unless full MPL's alone was begun.
    """
    begun = {path.parent.name for name in (RECORD_FILE, STARTED_FILE) for path in run.root.glob(f"*/{name}")}
    full = "train-mpl" in begun and "train-reduced" not in begun
    other = {"filter", "precompute", "train-reduced"} if full else {"train-mpl"}
    return [*(name for name in ORDER if name in begun or name not in other), *sorted(begun - set(ORDER))]


def stage_status(run: Run, stage: str) -> dict[str, Any]:
    """State of one stage, with its main figures or how far it is."""
    record = run.record(stage)
    if record is not None:
        result = record["result"]
        top1 = result.get("top1", (result.get("validation") or {}).get("top1"))
        split = result.get("split", "validation")
        detail = f"{record['seconds']:.0f} s"
        if top1 is not None:
            detail += f", top-1 {top1:.2f}% on {split}"
        if "kept" in result:
            detail += f", {result['kept']:,} of {result['images']:,} images kept"
        state = "done"
        if (run.root / stage / STARTED_FILE).exists():
            detail += "; another is begun, and takes its place when it is done"
        if stale := why_stale(run, stage, record):
            state, detail = "stale", f"{stale}; {detail}"
        return {"stage": stage, "state": state, "detail": detail, "ended": record["ended"]}
    started = run.root / stage / STARTED_FILE
    if not started.exists():
        return {"stage": stage, "state": "to come", "detail": ""}
    progress = read_progress(run.root / stage)
    if progress is not None and progress.is_working():
        return {
            "stage": stage,
            "state": "working",
            "detail": progress_text(progress),
            "progress": vars(progress),
        }
    rows = read_metrics(run.root / metrics_folder(stage) / "metrics.csv")
    detail = f"begun {read_json(started)['started']}" + (f", at step {rows[-1]['step']}" if rows else "")
    if stage == "filter":
        store = location((run.description or {}).get("store") or run.root)
        detail += f", {sum(name.startswith('part-') for name in names_in(store / 'scores')):,} shards scored"
    return {"stage": stage, "state": "unfinished", "detail": detail}


def progress_text(progress: Progress) -> str:
    """How far a stage is that works now, and since when nothing was heard of it."""
    rate = progress.values.get("images_per_second")
    words = [
        f"{progress.done:,} of {progress.total:,} {progress.unit}",
        f"{rate:,.0f} images/s" if rate else "",
        time_left(progress.seconds_left),
        f"process {progress.process} on {progress.host}",
    ]
    silent = time.time() - progress.updated
    if silent > STALE:
        words.append(f"last heard of {silent / 60:.0f} min ago")
    return ", ".join(word for word in words if word)


def why_stale(run: Run, stage: str, record: dict[str, Any]) -> str:
    """What a finished stage was made from and is no longer so; empty if all is."""
    filtered, precomputed = run.record("filter"), run.record("precompute")
    old_targets = (
        precomputed is not None
        and filtered is not None
        and precomputed["basis"]["selection"] != filtered["result"]["fingerprint"]
    )
    if stage == "precompute" and old_targets:
        return "of another selection: mpl precompute"
    targets = record["basis"].get("targets") if stage.startswith("train-reduced") else None
    if targets is not None and (old_targets or precomputed is None or targets != precomputed["result"]["fingerprint"]):
        return "trained on other targets"
    return ""


def metrics_folder(stage: str) -> str:
    """Folder that a stage writes its metrics to; a folder without any for stages that do not train."""
    if stage == "pretrain":
        return "teacher"
    for prefix, suffix in (("train-reduced", ""), ("train-mpl", ""), ("finetune", "-finetuned")):
        if stage.startswith(prefix):
            return f"student{stage.removeprefix(prefix)}{suffix}"
    return stage
