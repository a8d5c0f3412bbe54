"""Run one stage: decide, lock, work, record. The same for every stage."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import click

import pipeline
from pipeline.distributed.launch import joined
from pipeline.errors import DataError, FeedbackError, NonFiniteError, RunError, UsageError, UserError
from pipeline.storage.files import Location, fingerprint
from pipeline.storage.ours import remove_ours
from pipeline.storage.runs import NOT_DONE, Action, Decision, Longer, Stopwatch
from stages.console import Console
from stages.options import Context


@dataclass(frozen=True)
class Stage:
    """A planned stage.

    Attributes:
        name: folder of its record.
        basis: settings and fingerprints of inputs; equal basis, equal result.
        outputs: paths that exist when it is done.
        work: does it; returns figures for the record.
        summary: a line for a person from those figures.
        replaces: files, and folders of ours, that `--force` removes before the work begins.
        ready: raises what would keep the work from being done, before `--force` removes anything.
        kept: says whether former output stays until the new one takes its place.
        leftovers: of no use once it is recorded as done: its checkpoints.
        together: several processes, started by torchrun, do it together.
        keeps_recipe: the recipe it ran with becomes the run's own; not so for a named variant.
        cheap: top-level keys of the basis whose change is no reason to refuse: the work is done again at once.
        longer: of a training, what more steps of it are when it is done.
        trouble: from the recorded figures, why its output is not what was made, and is to be made again; empty if it
            is. Looks at sizes, footers and checksums of what is small.
    """

    name: str
    basis: dict[str, Any]
    outputs: Sequence[Location]
    work: Callable[[], dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]
    replaces: Sequence[Location] = ()
    ready: Callable[[], Any] = lambda: None
    kept: Callable[[], bool] = lambda: False
    leftovers: Sequence[Location] = ()
    cheap: frozenset[str] = frozenset()
    keeps_recipe: bool = True
    together: bool = False
    longer: Longer | None = None
    trouble: Callable[[dict[str, Any]], str] = lambda result: ""


def execute(context: Context, plan: Callable[[Context], Stage]) -> dict[str, Any]:
    """Plan and run a stage; returns its record (or, on a dry run, the decision).

    Raises:
        RunError: it would overwrite something, or the run is in use.
    """
    if context.dry_run:
        stage = plan(context)
        decision = decide(context, stage)
        context.console.note(f"{stage.name}: would {decision.action} ({decision.reason})")
        return _tell(context, {"stage": stage.name, "action": str(decision.action), "reason": decision.reason})
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _execute_together(context, plan)
    context.run.description  # noqa: B018  (refuses a foreign directory before anything is written there)
    with context.run.locked():
        stage = plan(context)
        require_store(context, stage.name)
        return _tell(context, _execute_locked(context, stage, decide(context, stage)))


def _execute_together(context: Context, plan: Callable[[Context], Stage]) -> dict[str, Any]:
    """The same under torchrun: the first process holds the lock, decides and records; all of them work."""
    with joined(context.device, context.recipe.distributed.timeout_seconds) as ranks, ExitStack() as held:
        context = replace(context, ranks=ranks)
        if not ranks.first:
            context = replace(context, console=Console(silent=True))
        ranks.together(lambda: held.enter_context(context.run.locked()) if ranks.first else None)
        stage = ranks.together(lambda: plan(context))
        if not stage.together:
            raise UsageError(
                f"{stage.name} runs in one process; leave torchrun out (mpl filter has --workers)"
            ).on_all()
        for what, value in ranks.together(lambda: _the_same(context, stage)).items():
            ranks.check_same(what, fingerprint(value))
        if ranks.first and context.run.launch_of(stage.name) == ranks.launch:
            context = replace(context, force=False)  # what an attempt before had begun, or done, is not to be removed
        decided = ranks.together(lambda: _decide_first(context, stage))
        action, reason = json.loads(ranks.texts(json.dumps(decided))[0])
        decision = Decision(Action(action), reason)
        with ranks.watched(stage.name):
            result = _execute_locked(context, stage, decision)
        ranks.barrier("the end")
        return _tell(context, result) if ranks.first else result


def _the_same(context: Context, stage: Stage) -> dict[str, Any]:
    """What all processes must have in common, by its name; some of it changes no result, but who waits for whom."""
    return {
        "the version of mpl": pipeline.__version__,
        "--run": str(context.run.root.resolve()),
        "the recipe": context.recipe.model_dump(mode="json"),
        "the options": [stage.name, str(context.store), context.seed, context.precision, context.device.type],
        "the data": [stage.basis, _validation(context)],
    }


def _validation(context: Context) -> str | None:
    data = context.data_set
    return data.split("validation").fingerprint() if "validation" in data.manifest.splits else None


def _decide_first(context: Context, stage: Stage) -> tuple[str, str]:
    """The first process's decision; the others take it over."""
    if not context.first:
        return "", ""
    require_store(context, stage.name)
    decision = decide(context, stage)
    return decision.action.value, decision.reason


def _execute_locked(context: Context, stage: Stage, decision: Decision) -> dict[str, Any]:
    run, console = context.run, context.console
    if decision.action is Action.SKIP:
        record = run.record(stage.name)
        assert record is not None
        console.note(f"{stage.name}: {decision.reason}. {stage.summary(record['result'])}")
        return record
    if decision.action is Action.REFUSE:
        raise RunError(decision.reason)
    console.note(f"{stage.name}: {'starts' if decision.reason == NOT_DONE else decision.reason}")
    restore, beside = run.restorer(), run.beside(stage.name)
    if context.first:
        _begin(context, stage)
    context.together.barrier("the start")
    clock = Stopwatch()
    try:
        with console.graceful_stop(), console.telling(run.root / stage.name):
            result = stage.work()
    except (UsageError, DataError) as error:
        error.resumable = isinstance(error, DataError)
        traces = stage.replaces if stage.kept() else (*stage.replaces, *stage.outputs)
        if context.first and not any(place.exists() for place in traces) and run.beside(stage.name) <= beside:
            run.withdraw(stage.name)  # nothing was made of it: it may begin again with what the message advises
            restore()
        raise
    except UserError as error:
        error.resumable = not isinstance(error, NonFiniteError | FeedbackError)  # these come again
        raise
    finally:
        console.close()
    context.together.barrier("the end of the work")
    if not context.first:
        return result
    record = run.finish(stage.name, stage.basis, clock.seconds, result)
    remove_ours(*stage.leftovers, run.decoded, tell=console.note)
    console.note(f"{stage.name}: done in {clock.seconds:.1f} s. {stage.summary(result)}")
    return record


def _begin(context: Context, stage: Stage) -> None:
    """Note what begins, and remove what --force removes."""
    if context.force:
        stage.ready()  # before anything is changed, the run's recipe included
    run = context.run
    if stage.keeps_recipe or run.description is None:
        store = None if context.store == run.root else str(context.store)
        run.keep(context.recipe, context.seed, str(context.data) if context.data else None, store)
    if context.store != run.root:
        run.claim(context.store)
    if context.force:
        remove_ours(*stage.replaces, tell=context.console.note)
    run.begin(stage.name, stage.basis, context.together.launch, beside=stage.kept())


def require_store(context: Context, stage: str) -> None:
    """Refuse a store that is another run's, or another one than this run's scores lie in.

    Raises:
        RunError: with what to do.
    """
    run, known = context.run, context.run.description
    if known is None:
        return
    before = known.get("store") or str(run.root)
    if stage != "filter" and run.record("filter") is not None and str(context.store) != before:
        raise RunError(f"{run.root} has its scores and targets in {before}; another --store begins with mpl filter")
    if context.store != run.root and run.record("filter") is not None:
        run.claim(context.store)


def decide(context: Context, stage: Stage) -> Decision:
    """What the stage would do."""
    decision = context.run.decide(
        stage.name, stage.basis, stage.outputs, force=context.force, cheap=stage.cheap, longer=stage.longer
    )
    if decision.action is Action.SKIP:
        record = context.run.record(stage.name)
        if record is not None and (trouble := stage.trouble(record["result"])):
            return Decision(Action.RUN, f"made again: {trouble}")
    return decision


def _tell(context: Context, value: dict[str, Any]) -> dict[str, Any]:
    if context.as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    return value
