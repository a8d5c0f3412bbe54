"""Run one stage: decide, lock, work, record. The same for every stage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from pipeline.errors import RunError
from pipeline.files import Location, discard
from pipeline.runs import NOT_DONE, Action, Decision, Stopwatch
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
        replaces: files and folders that `--force` removes first.
        keeps_recipe: the recipe it ran with becomes the run's own; not so for a named variant.
        cheap: top-level keys of the basis whose change is no reason to refuse: the work is done again at once.
    """

    name: str
    basis: dict[str, Any]
    outputs: Sequence[Location]
    work: Callable[[], dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]
    replaces: Sequence[Location] = ()
    cheap: frozenset[str] = frozenset()
    keeps_recipe: bool = True


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
    context.run.description  # noqa: B018  (refuses a foreign directory before anything is written there)
    with context.run.locked():
        stage = plan(context)
        return _tell(context, _execute_locked(context, stage))


def _execute_locked(context: Context, stage: Stage) -> dict[str, Any]:
    run, console = context.run, context.console
    require_store(context, stage.name)
    decision = decide(context, stage)
    if decision.action is Action.SKIP:
        record = run.record(stage.name)
        assert record is not None
        console.note(f"{stage.name}: {decision.reason}. {stage.summary(record['result'])}")
        return record
    if decision.action is Action.REFUSE:
        raise RunError(decision.reason)
    if stage.keeps_recipe or run.description is None:
        store = None if context.store == run.root else str(context.store)
        run.keep(context.recipe, context.seed, str(context.data) if context.data else None, store)
    if context.store != run.root:
        run.claim(context.store)
    if context.force:
        discard(*stage.replaces)
    console.note(f"{stage.name}: {'starts' if decision.reason == NOT_DONE else decision.reason}")
    run.begin(stage.name, stage.basis)
    clock = Stopwatch()
    try:
        with console.graceful_stop():
            result = stage.work()
    finally:
        console.close()
    record = run.finish(stage.name, stage.basis, clock.seconds, result)
    console.note(f"{stage.name}: done in {clock.seconds:.1f} s. {stage.summary(result)}")
    return record


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
    return context.run.decide(stage.name, stage.basis, stage.outputs, force=context.force, cheap=stage.cheap)


def _tell(context: Context, value: dict[str, Any]) -> dict[str, Any]:
    if context.as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    return value
