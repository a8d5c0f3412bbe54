"""What the two pool stages share: who does the work (`--workers`, `--engine ray`), and how a person sees it go on."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pipeline.data.readers.shard import Shard
from pipeline.storage.workers import EngineSettings, Work, run_all
from stages.options import Context

Item = TypeVar("Item")
Result = TypeVar("Result")
OPENED = 64  # files that are opened to know how many rows they have

OPTIONS = (
    click.option("--workers", type=click.IntRange(0), default=None, metavar="N",
                 help="Processes on this machine [default: 1], or tasks at a time on Ray [default: as many as fit]."),
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="ray: one task for each shard, on a cluster."),
    click.option("--address", metavar="HOST:PORT|auto", help="Of the Ray cluster. [default: one on this machine]"),
    click.option("--gpus-per-worker", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="Accelerators of each Ray task; 0.5 lets two share one."),
    click.option("--cpus-per-worker", type=click.FloatRange(0.01), help="Cores of each Ray task. [default: 1]"),
)  # fmt: skip


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the engine to a command; it receives `engine`, its settings."""

    @functools.wraps(function)
    def command(
        *arguments: Any,
        workers: int | None,
        engine: str,
        address: str | None,
        gpus_per_worker: float,
        cpus_per_worker: float | None,
        **others: Any,
    ) -> Any:
        ray = engine == "ray"
        if not ray and (address is not None or gpus_per_worker or cpus_per_worker is not None):
            raise click.UsageError("--address, --gpus-per-worker and --cpus-per-worker belong to --engine ray")
        settings = EngineSettings(
            kind="ray" if ray else "local",
            workers=workers if workers is not None else (0 if ray else 1),
            address=address,
            gpus=gpus_per_worker,
            cpus=cpus_per_worker or 1.0,
        )
        return function(*arguments, engine=settings, **others)

    for option in reversed(OPTIONS):
        command = option(command)
    return command


def is_elsewhere(engine: EngineSettings) -> bool:
    """Whether the work is sent to other processes."""
    return engine.kind == "ray" or engine.workers > 1


def rows_of(items: Sequence[Any]) -> int | None:
    """Rows of all shards; None where to know them files would have to be read, or very many be opened."""
    if len(items) > OPENED or not all(isinstance(item, Shard) and item.knows_its_rows for item in items):
        return None
    return sum(item.rows() for item in items)


def run_shards(
    context: Context,
    engine: EngineSettings,
    work: Work[Item, Result],
    items: Sequence[Item],
    *,
    name: Callable[[Item], str],
    images: Callable[[Result], int],
) -> list[Result]:
    """Do all items with a bar for the person; the results in the order in which they came.

    Raises:
        WorkFailed: some items could not be done; the others are.
        KeyboardInterrupt: asked for by Ctrl-C; items that are done stay.
    """
    results: list[Result] = []
    total = rows_of(items)
    began, seen, finished = time.monotonic(), 0, 0

    def show() -> None:
        values = {"images_per_second": seen / max(time.monotonic() - began, 1e-9)}
        if total is None:
            context.console.progress(finished, len(items), values, "shards")
        else:
            context.console.progress(seen, total, values, "images")

    def here(count: int) -> None:
        nonlocal seen
        seen += count
        show()
        if context.console.stop_requested():
            raise KeyboardInterrupt("shards that are done stay")

    def done(item: Item, result: Result) -> None:
        nonlocal seen, finished
        results.append(result)
        finished += 1
        if is_elsewhere(engine):
            seen += images(result)
        show()

    run_all(engine, work, items, name=name, progress=here, done=done, stop=context.console.stop_requested)
    return results
