"""Run the stages over seeds: chains of stages side by side, every stage in a process (and peak memory) of its own."""

import importlib
import multiprocessing
import os
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.errors import RunError, UsageError
from pipeline.storage.runs import Action
from stages.cli import silence_torch
from stages.console import Console
from stages.execution import decide, execute
from stages.options import Context, Options, changed, make_context

PRELOAD = ["stages.pretrain", "stages.filter", "stages.precompute", "stages.train_reduced", "stages.train_mpl",
           "stages.finetune", "stages.evaluate", "pipeline.training", "pipeline.targets.build",
           "torch.utils.tensorboard"]  # fmt: skip
DIGITS = ["sklearn.datasets"]  # for the embedded digits; its import takes longer than a short stage
Records = dict[str, dict[str, Any]]  # of a chain, by the name under which a stage records itself
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Step:
    """One stage of a chain.

    Attributes:
        module: of `stages`, with a function `plan(context, **arguments)`.
        changes: `a.b=value` changes of the recipe.
        arguments: further arguments of `plan`.
    """

    module: str
    changes: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Stages that run one after another, with one seed in one run directory."""

    run: Path
    seed: int
    steps: tuple[Step, ...]


def run_chains(context: Context, chains: Mapping[K, Chain], jobs: int | None) -> dict[K, Records]:
    """Run all chains, up to `jobs` at a time; returns the records of each.

    Args:
        context: recipe, data, device and precision for all.
        chains: by any key.
        jobs: chains at a time; None: one on an accelerator, else one per core.

    Raises:
        UserError: the first failure; what other chains have done stays.
    """
    if context.store != context.run.root:
        raise UsageError("--store (MPL_STORE) cannot be shared by the seeds' runs; leave it out")
    jobs = min(jobs or (1 if context.device.type != "cpu" else len(os.sched_getaffinity(0))), len(chains))
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD + DIGITS * (context.recipe.data.manifest.startswith("digits")))
    total, done = sum(len(chain.steps) for chain in chains.values()), 0
    with (
        ProcessPoolExecutor(jobs, mp_context=processes, max_tasks_per_child=1) as pool,
        ThreadPoolExecutor(jobs) as watchers,
    ):

        def run_chain(chain: Chain) -> Records:
            records = {}
            for step in chain.steps:
                if context.console.stop_requested():
                    raise KeyboardInterrupt
                record = pool.submit(run_step, _portable(context, chain, step), step, threads).result()
                records[record["stage"]] = record
                count()
            return records

        def count() -> None:
            nonlocal done
            done += 1
            context.console.progress(done, total, {}, "stages")

        futures: dict[Future[Records], K] = {watchers.submit(run_chain, chain): key for key, chain in chains.items()}
        try:
            records = {futures[future]: future.result() for future in as_completed(futures)}
        except BaseException as error:
            for future in futures:
                future.cancel()
            if isinstance(error, BrokenProcessPool):
                if context.console.stop_requested():
                    raise KeyboardInterrupt from error
                raise RunError(
                    "the process of a stage was ended from outside: by a signal, or for lack of memory. Run the same "
                    "command again: what is done stays; with fewer --jobs it takes less memory"
                ) from error
            raise
    return {key: records[key] for key in chains}


def _portable(context: Context, chain: Chain, step: Step) -> dict[str, Any]:
    """The context of one step, in values that another process can be sent."""
    return {
        "run": chain.run,
        "recipe": context.recipe.model_dump(mode="json"),
        "changes": step.changes,
        "data": context.data,
        "seed": chain.seed,
        "device": context.device_name,
        "precision": context.precision,
        "force": context.force,
    }


def run_step(values: dict[str, Any], step: Step, threads: int) -> dict[str, Any]:
    """One stage, in a process of its own."""
    silence_torch()
    torch.set_num_threads(threads)
    values = dict(values)
    recipe = changed(values.pop("recipe"), values.pop("changes"), "recipe")
    name = step.arguments.get("name")
    console = Console(quiet=True, prefix=f"{values['run'].name}{f'/{name}' if name else ''} ")
    context = make_context(Options(**values), parsed=recipe, console=console)
    plan = importlib.import_module(f"stages.{step.module}").plan
    if context.force:  # of a comparison: make again what changed, and only that
        stage = plan(replace(context, force=False), **step.arguments)
        context = replace(context, force=decide(replace(context, force=False), stage).action is Action.REFUSE)
    return execute(context, lambda c: plan(c, **step.arguments))
