"""`mpl precompute`: teacher + selection → targets/."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline.correction import CORRECTION_FILE, Correction, load_correction
from pipeline.errors import DataError, RunError, TargetsError, UsageError
from pipeline.pool.filter import SELECTION_FILE
from pipeline.pool.scores import open_scored
from pipeline.pool.selection import read_selection
from pipeline.storage.files import Location, fingerprint
from pipeline.storage.runs import Run
from pipeline.storage.workers import EngineSettings
from pipeline.targets import TargetsStore
from pipeline.targets.build import Ingredients, check_targets, precompute
from pipeline.targets.files import require_ours
from pipeline.targets.manifest import MANIFEST, StoreSettings, check_files, read_manifest
from stages.execution import Stage, execute
from stages.options import Context, stage_options
from stages.teachers import NetworkTeacher, PredictionsTeacher, Teacher, class_names, teacher_of
from stages.workers import engine_options, run_shards


@click.command()
@stage_options
@engine_options
@click.option("--teacher", type=click.Path(path_type=Path, file_okay=False),
              help="Another teacher than the one that scored the pool; its distributions are inferred.")  # fmt: skip
@click.option("--check", type=click.IntRange(1), metavar="N",
              help="Infer N stored rows again and report the largest difference; writes nothing.")  # fmt: skip
def command(context: Context, teacher: Path | None, check: int | None, engine: EngineSettings) -> None:
    """Store the selected images with the teacher's distributions, and those of the labelled images.

    Reads: selection.parquet, scores/, the pool. Writes: targets/.
    """
    if check is not None:
        _check(context, check)
        return
    execute(context, lambda c: plan(c, teacher, engine))


def plan(context: Context, teacher: Path | None = None, engine: EngineSettings | None = None) -> Stage:
    """Plan the stage."""
    filtered = require_fresh_selection(context.run)
    chosen = teacher_of(context, teacher, engine, assume_class_order=True, recorded=filtered["result"])  # it has asked
    settings = context.recipe.precompute
    scored_by = filtered["result"]["teacher_sha256"]
    used = chosen.digest if teacher is not None else scored_by
    shown = chosen.basis["preprocessing"]
    if used == scored_by and shown != filtered["basis"].get("preprocessing", shown):
        raise RunError(f"{chosen.told['teacher']}/config.json was changed after the pool was scored; run mpl filter")
    if used != scored_by and chosen.names != class_names(context):
        raise DataError(f"--teacher {teacher} has classes of its own; score the pool with it: mpl filter --teacher")
    basis = {
        "selection": filtered["result"]["fingerprint"],
        "teacher": used,
        "labelled": context.data_set.split("labelled").fingerprint(),
        "settings": settings.model_dump(
            mode="json", exclude={"batch"} | ({"embedding"} if not settings.embedding else set())
        ),
        "seed": context.seed,
        "precision": filtered["basis"]["precision"] if used == scored_by else context.precision,
        **({} if used == scored_by else {"preprocessing": shown}),
    }
    return Stage(
        name="precompute",
        basis=basis,
        outputs=[context.store / "targets" / MANIFEST],
        work=lambda: work(context, chosen, basis, engine),
        summary=lambda result: (
            f"{result['pool']:,} pool images and {result['labelled']:,} labelled ones, "
            f"{result['bytes'] / 2**20:,.1f} MiB"
        ),
        replaces=[context.store / "targets"],
        ready=lambda: require_ready(context, chosen),
        trouble=lambda result: targets_trouble(context.store, result),
        cheap=frozenset({"selection"}),  # derived: made again from the new one
    )


def require_ready(context: Context, teacher: Teacher) -> None:
    """Raise what would keep the targets from being made again, before the old ones go."""
    teacher.check()
    read_selection(context.store / SELECTION_FILE)
    require_ours(context.store / "targets")


def require_fresh_selection(run: Run) -> dict[str, Any]:
    """The record of `filter`, made with the run's present teacher.

    Raises:
        RunError: it is not there, or the teacher was trained anew since.
    """
    filtered = run.require("filter", "mpl filter")
    pretrained = run.record("pretrain")
    named = filtered["result"]["teacher"]
    own = named is not None and run.place("teacher") == run.place(named)
    if own and pretrained and pretrained["result"]["weights_sha256"] != filtered["result"]["teacher_sha256"]:
        raise RunError(f"{run.root}: the teacher was trained anew after the pool was scored; run mpl filter --force")
    return filtered


def require_fresh_targets(run: Run) -> dict[str, Any]:
    """The record of `precompute`, made from the run's present selection.

    Raises:
        RunError: it is not there.
        TargetsError: the selection changed since.
    """
    record = run.require("precompute", "mpl precompute")
    if record["basis"]["selection"] != require_fresh_selection(run)["result"]["fingerprint"]:
        raise TargetsError(f"{run / 'targets'} was made from another selection; run mpl precompute")
    return record


def open_targets(context: Context, verify: bool | None = None) -> TargetsStore:
    """The store that this run's `precompute` made.

    Raises:
        TargetsError: what lies in targets/ is another one, of another run or of other settings, or it is damaged.
    """
    record = context.run.require("precompute", "mpl precompute")["result"]
    store = TargetsStore.open(
        context.store / "targets",
        teacher=record["teacher_sha256"],
        class_names=context.data_set.split("labelled").class_names,
        verify=verify,
    )
    if store.fingerprint != record["fingerprint"]:
        raise TargetsError(
            f"{store.folder} holds other targets than {context.run.root} made: another run with the same --store has "
            "made them since; run mpl precompute to have this run's again, or give each run its own --store"
        )
    return store


def targets_trouble(store: Location, result: dict[str, Any], *, full: bool = False) -> str:
    """Why the targets in a store are not those that a record of `precompute` is of; empty if they are.

    Args:
        store: where they lie.
        result: the recorded figures.
        full: read all files, not their sizes and footers alone.
    """
    folder = store / "targets"
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, full)
    except TargetsError as error:
        return str(error)
    if manifest["fingerprint"] != result["fingerprint"]:
        return f"{folder} holds other targets than this run made"
    return ""


def store_settings(context: Context, basis: dict[str, Any]) -> StoreSettings:
    """How the store is made."""
    settings = context.recipe.precompute
    return StoreSettings(
        teacher=basis["teacher"],
        labelled=basis["labelled"],
        dtype=settings.dtype,
        format=settings.format,
        shard_rows=settings.shard_rows,
        seed=context.seed,
        preprocessing=fingerprint(basis["preprocessing"]) if "preprocessing" in basis else None,
        embedding=settings.embedding,
    )


def work(
    context: Context, teacher: Teacher, basis: dict[str, Any], engine: EngineSettings | None = None
) -> dict[str, Any]:
    """Gather stored distributions where the teacher is the one that scored, else infer; then write."""
    context = replace(context, precision=basis["precision"])  # of the pool's distributions and the labelled images'
    teacher = teacher.at(context)
    filtered = context.run.require("filter", "mpl filter")["result"]
    shards = context.data_set.split("unlabelled").shards
    teacher.begin()
    pool = open_scored(shards, context.store / "scores", filtered["scores_fingerprint"])  # refuses changed shards
    selection = read_selection(context.store / SELECTION_FILE)
    if selection.fingerprint != filtered["fingerprint"]:
        raise RunError(f"{context.store} does not hold the selection of {context.run.root}; run mpl filter again")
    manifest = precompute(
        context.store / "targets",
        Ingredients(
            selection=selection,
            shards=shards,
            labelled=context.data_set.split("labelled").read(),
            scorer=teacher.source(engine, context.recipe.precompute.batch),
            scores=pool if basis["teacher"] == filtered["teacher_sha256"] else None,
            correction=selected_correction(context, filtered),
            answers=lambda group: teacher.answers("labelled", list(group)),
            stored_answers=isinstance(teacher, PredictionsTeacher),
            embedder=teacher.embedder(engine) if context.recipe.precompute.embedding else None,
        ),
        store_settings(context, basis),
        preprocessing=teacher.basis["preprocessing"],
        run=partial(run_shards, context, engine or EngineSettings(), images=lambda count: count),
        tell=context.console.note,
    )
    return {
        "fingerprint": manifest["fingerprint"],
        "teacher": teacher.told["teacher"],
        "teacher_sha256": basis["teacher"],
        "pool": manifest["pool"]["rows"],
        "labelled": manifest["labelled"]["rows"],
        "inferred": manifest["inferred"],
        "precision": basis["precision"],
        "bytes": manifest["pool"]["bytes"] + manifest["labelled"]["bytes"],
    }


def selected_correction(context: Context, filtered: dict[str, Any]) -> Correction | None:
    """What the selection was made with; None where the teacher has the data set's classes.

    Raises:
        RunError: its file is another than this run made.
    """
    if "correction" not in filtered:
        return None
    found = load_correction(context.store / CORRECTION_FILE)
    if found.fingerprint() != filtered["correction"]:
        raise RunError(
            f"{context.store / CORRECTION_FILE} is not what {context.run.root} selected with; run mpl filter"
        )
    return found


def _check(context: Context, rows: int) -> None:
    """`--check N`."""
    record = context.run.require("precompute", "mpl precompute")["result"]
    context = replace(context, precision=record["precision"])
    if record["teacher"] is None:
        raise UsageError(
            "--check asks a network again; these targets were made of predictions, and there is none to ask"
        )
    teacher = NetworkTeacher(context, context.run.place(record["teacher"]), assume_class_order=True)
    store = open_targets(context, verify=True)
    largest = check_targets(store, teacher.source(), rows, context.seed)
    allowed = {"float16": 1e-3, "float32": 1e-5}[store.dtype]
    rows = min(rows, store.count)
    context.console.note(f"precompute --check: {rows:,} rows inferred again; largest difference {largest:.2g}")
    if context.as_json:
        click.echo(json.dumps({"rows": rows, "largest_difference": largest, "allowed": allowed}))
    if not largest <= allowed:
        raise TargetsError(
            f"{store.folder} differs from its teacher by {largest:.3g} (allowed {allowed:g} at {store.dtype}); "
            "run mpl precompute --force"
        )
