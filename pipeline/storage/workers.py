"""Engines: one function over many items, in this process, in worker processes, or on a Ray cluster.

The function is the same in each, and is sent to a worker once. An item is done when its output file is whole, so an
engine keeps no state: after a kill, the items whose files are missing are given to any engine again.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pipeline.errors import RunError, UsageError, UserError
from pipeline.storage.files import remove_leftovers

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item, Callable[[int], None]], Result]
"""Called with an item and a function to call with progress; a worker process gets one that does nothing."""

RETRIES = 2  # of an item whose worker died: the kernel's out-of-memory killer, a lost machine
PRELOAD = ["pipeline.pool.score", "pipeline.targets.build"]  # into the process that workers are forked from


@dataclass(frozen=True)
class Outcome(Generic[Item, Result]):
    """An item with its result, or with the error that it ended in."""

    item: Item
    result: Result | None = None
    error: UserError | None = None


@dataclass(frozen=True)
class EngineSettings:
    """Where the work is done.

    Attributes:
        kind: this machine, or a Ray cluster.
        workers: processes on this machine; at most so many tasks at a time on Ray (0: as many as it has room for).
        address: of the Ray cluster; None starts one on this machine, "auto" finds one that runs.
        gpus: accelerators of each Ray task; a fraction shares one.
        cpus: cores of each Ray task.
    """

    kind: Literal["local", "ray"] = "local"
    workers: int = 1
    address: str | None = None
    gpus: float = 0.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.workers < 0 or (self.kind == "local" and self.workers < 1):
            raise UsageError(f"--workers {self.workers}: give at least 1")


class WorkFailed(RunError):
    """Some items could not be done; all others are."""


def run_all(
    settings: EngineSettings,
    work: "Work[Item, Result]",
    items: Sequence[Item],
    *,
    name: Callable[[Item], str],
    progress: Callable[[int], None],
    done: Callable[[Item, Result], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Do all items, in any order. One that fails does not keep the others from being done.

    Args:
        settings: which engine.
        work: the function; it and the items can be pickled unless all is done in this process.
        items: each is done once.
        name: of an item, for messages.
        progress: called by the work, in this process; workers elsewhere do not call it.
        done: called with each result, in this process.
        stop: called after each item: whether to end early.

    Raises:
        WorkFailed: names the items that could not be done, with their errors.
        KeyboardInterrupt: `stop` said so.
        UsageError: the engine cannot be used.
    """
    failed: list[Outcome[Item, Result]] = []
    for outcome in _outcomes(settings, work, items, progress):
        if outcome.error is not None:
            failed.append(outcome)
        else:
            done(outcome.item, outcome.result)  # type: ignore[arg-type]  # no error, so it is the result
        if stop():
            raise KeyboardInterrupt("what is done stays")
    if failed:
        shown = "\n".join(f"  {name(outcome.item)}: {outcome.error}" for outcome in failed[:5])
        more = f"\n  … and {len(failed) - 5:,} more" if len(failed) > 5 else ""
        raise WorkFailed(
            f"{len(failed):,} of {len(items):,} could not be done; the others are, and stay:\n{shown}{more}"
        )


def _outcomes(
    settings: EngineSettings, work: "Work[Item, Result]", items: Sequence[Item], progress: Callable[[int], None]
) -> Iterator[Outcome[Item, Result]]:
    if not items:
        return iter(())
    if settings.kind == "ray":
        return _on_ray(settings, work, items)
    if settings.workers == 1:
        return _here(work, items, progress)
    return _in_processes(min(settings.workers, len(items)), work, items)


def _here(
    work: "Work[Item, Result]", items: Sequence[Item], progress: Callable[[int], None]
) -> Iterator[Outcome[Item, Result]]:
    for item in items:
        try:
            yield Outcome(item, work(item, progress))
        except UserError as error:
            yield Outcome(item, error=error)


def _in_processes(workers: int, work: "Work[Item, Result]", items: Sequence[Item]) -> Iterator[Outcome[Item, Result]]:
    """A pool of processes. When one dies, the items that were under way are tried again one by one, so that the one
    that takes its worker down is known; then the others go on."""
    waiting = iter(items)
    while suspects := (yield from _until_broken(workers, work, waiting)):
        for item in suspects:
            for _ in range(RETRIES):
                if not (yield from _until_broken(1, work, iter([item]))):
                    break
            else:
                died = f"its worker died {RETRIES + 1} times; is there enough memory for {workers} workers?"
                yield Outcome(item, error=RunError(died))


def _until_broken(
    workers: int, work: "Work[Item, Result]", waiting: Iterator[Item]
) -> Generator[Outcome[Item, Result], None, list[Item]]:
    """Do items until none is left, or a worker dies; returns those that were under way then."""
    pool = _pool(workers, work)
    under_way: dict[Future[Result], Item] = {}
    try:
        while True:
            while len(under_way) < workers and (item := next(waiting, None)) is not None:
                try:
                    under_way[pool.submit(_call, item)] = item
                except BrokenProcessPool:
                    return [*under_way.values(), item]
            if not under_way:
                return []
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                outcome = _collect(future, under_way[future])
                del under_way[future]
                yield outcome
    except BrokenProcessPool:
        return list(under_way.values())
    finally:  # an error, Ctrl-C, a dead worker, or nothing left to do
        for process in list((pool._processes or {}).values()):
            process.kill()  # what it was writing is not whole, and is not waited for
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(future: "Future[Result]", item: Item) -> Outcome[Item, Result]:
    try:
        return Outcome(item, future.result())
    except UserError as error:
        return Outcome(item, error=error)


def _pool(workers: int, work: Any) -> ProcessPoolExecutor:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    cores = len(os.sched_getaffinity(0))
    number = processes.Value("i", 0)
    return ProcessPoolExecutor(
        workers, processes, _start, (pickle.dumps(work), max(1, cores // workers), number, dict(os.environ))
    )


_WORK: dict[str, Any] = {}  # of a worker process: what it was sent


def _start(pickled: bytes, threads: int, number: Any, environment: dict[str, str]) -> None:
    """Once per worker process."""
    os.environ.update(environment)  # the process that workers are forked from may be older than a setting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with number.get_lock():
        place, number.value = number.value, number.value + 1
    try:
        _WORK["work"] = _placed(pickle.loads(pickled), place, threads)  # from our own parent, by a pipe
    except Exception as error:  # raised where work is asked for; else the pool would be taken for broken
        _WORK["error"] = error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _placed(work: Any, place: int, threads: int) -> Any:
    """The work, with the worker's number and its share of the threads where it wants them."""
    return work.placed(place, threads) if hasattr(work, "placed") else work


def _call(item: Any) -> Any:
    if "error" in _WORK:
        raise _WORK["error"]
    return _WORK["work"](item, lambda count: None)


def _on_ray(
    settings: EngineSettings, work: "Work[Item, Result]", items: Sequence[Item]
) -> Iterator[Outcome[Item, Result]]:
    """One task for each item. Ray tries again where a worker or its machine died."""
    ray = _ray(settings.address)
    key, sent = uuid.uuid4().hex, ray.put(work)
    threads = max(1, int(settings.cpus))

    options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "max_retries": RETRIES, "retry_exceptions": False}
    task = ray.remote(**options)(_ray_task)
    room = settings.workers or max(1, int(2 * ray.cluster_resources().get("CPU", 1) / max(settings.cpus, 0.01)))
    waiting = iter(items)
    under_way: dict[Any, Item] = {}
    try:
        while True:
            while len(under_way) < room and (item := next(waiting, None)) is not None:
                under_way[task.remote(key, threads, [sent], item)] = item
            if not under_way:
                return
            ready, _ = ray.wait(list(under_way), num_returns=1, timeout=1)
            for reference in ready:
                item = under_way.pop(reference)
                try:
                    result, error = ray.get(reference)
                except ray.exceptions.RayTaskError:
                    raise  # a defect, with its traceback
                except ray.exceptions.RayError as died:
                    reason = str(died).strip().splitlines()[0]
                    result, error = None, RunError(f"its Ray worker died {RETRIES + 1} times ({reason})")
                yield Outcome(item, result, error)
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)


def _ray_task(key: str, threads: int, reference: list[Any], item: Any) -> tuple[Any, UserError | None]:
    """On a Ray worker, which serves many tasks: the work is fetched for the first of them."""
    try:
        if _WORK.get("key") != key:
            import ray

            remove_leftovers()  # uploads of workers of this machine that died
            _WORK.update(key=key, work=_placed(ray.get(reference[0]), 0, threads))
        return _call(item), None
    except UserError as error:
        return None, error


def _ray(address: str | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray; please install it: pip install 'reduced-mpl[ray]'") from error
    if not ray.is_initialized():
        if address is not None and address != "auto":
            _require_listener(address)  # Ray itself tries for minutes
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                include_dashboard=False if address is None else None,
                logging_level=logging.WARNING,
                namespace="mpl",
            )
        except Exception as error:  # of no particular class where a node does not start in Ray's half a minute
            raise UsageError(f"--engine ray: no cluster at {address or 'this machine'}: {error}") from error
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray puts its own in their place, which would not save and stop
    return ray


def _require_listener(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--engine ray: no cluster at {address}: {error}. Give the HOST:PORT that `ray start --head` printed"
        ) from error
