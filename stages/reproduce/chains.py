"""Run the stages over seeds: a chain per seed, every stage in a process (and with a peak memory) of its own."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from stages.options import Context, Options, make_context

PRELOAD = ["stages.train_reduced", "stages.train_mpl", "stages.finetune", "stages.evaluate", "stages.learning",
           "pipeline.training", "pipeline.lessons", "pipeline.targets.build", "torch.utils.tensorboard"]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One stage of a chain.

    Attributes:
        module: of `stages`, with a function `plan(context, **arguments)`.
        run: run directory.
        changes: `a.b=value` changes of the recipe.
        arguments: further arguments of `plan`.
        seed: of this stage; None: the chain's key.
    """

    module: str
    run: Path
    changes: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    seed: int | None = None


Chain = Sequence[Step]


def run_chains(context: Context, chains: dict[int, Chain], jobs: int | None) -> dict[int, list[dict[str, Any]]]:
    """Run every seed's chain, up to `jobs` at a time; returns the records, in the order of each chain.

    Args:
        context: recipe, data, device and precision for all.
        chains: by seed, or by any number where every step has a seed of its own.
        jobs: chains at a time; None: one on an accelerator, else one per core.

    Raises:
        UserError: the first failure; what other chains have done stays.
    """
    if context.store != context.run.root:
        raise UsageError("--store (MPL_STORE) cannot be shared by the seeds' runs; leave it out")
    jobs = min(jobs or (1 if context.device.type != "cpu" else len(os.sched_getaffinity(0))), len(chains))
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    total, done = sum(map(len, chains.values())), 0
    with (
        ProcessPoolExecutor(jobs, mp_context=processes, max_tasks_per_child=1) as pool,
        ThreadPoolExecutor(jobs) as watchers,
    ):

        def run_chain(seed: int, chain: Chain) -> list[dict[str, Any]]:
            records = []
            for step in chain:
                if context.console.stop_requested():
                    raise KeyboardInterrupt
                record = pool.submit(run_step, _portable(context, seed, step), step, threads).result()
                records.append(record)
                count()
            return records

        def count() -> None:
            nonlocal done
            done += 1
            context.console.progress(done, total, {})

        futures: dict[Future[list[dict[str, Any]]], int] = {
            watchers.submit(run_chain, seed, chain): seed for seed, chain in chains.items()
        }
        try:
            return {futures[future]: future.result() for future in as_completed(futures)}
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _portable(context: Context, seed: int, step: Step) -> dict[str, Any]:
    """The context of one step, in values that another process can be sent."""
    return {
        "run": step.run,
        "recipe": context.recipe.model_dump(mode="json"),
        "changes": step.changes,
        "data": context.data,
        "seed": seed if step.seed is None else step.seed,
        "device": context.device_name,
        "precision": context.precision,
        "force": context.force,
    }


def run_step(values: dict[str, Any], step: Step, threads: int) -> dict[str, Any]:
    """One stage, in a process of its own."""
    import importlib

    import torch

    from pipeline.storage.runs import Action
    from stages.cli import silence_torch
    from stages.console import Console
    from stages.execution import decide, execute
    from stages.options import changed

    silence_torch()
    torch.set_num_threads(threads)
    values = dict(values)
    recipe = changed(values.pop("recipe"), values.pop("changes"), "recipe")
    name = dict(step.arguments).get("name")
    console = Console(quiet=True, prefix=f"{step.run.name}{f'/{name}' if name else ''} ")
    context = make_context(Options(**values), parsed=recipe, console=console)
    plan: Callable[..., Any] = importlib.import_module(f"stages.{step.module}").plan
    if context.force:  # of a comparison: make again what changed, and only that
        stage = plan(replace(context, force=False), **dict(step.arguments))
        context = replace(context, force=decide(replace(context, force=False), stage).action is Action.REFUSE)
    return execute(context, lambda c: plan(c, **dict(step.arguments)))
