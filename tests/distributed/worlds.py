"""Several gloo processes on this machine that run one function each, for the tests."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipeline.distributed.launch import joined
from pipeline.distributed.ranks import Ranks

CPU = torch.device("cpu")
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "tests.distributed.training"]


def in_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 60.0,
    limit: float = 240.0,
    absent: int | None = None,
    of_first: bool = False,
) -> list[Any]:
    """What function(ranks, *arguments) returns on each of `world` ranks, or the exception it raised.

    Processes start as forks of a server that has imported torch: a fraction of a second each. One that is still
    there after `limit` seconds hangs, which no test may ask for; with `of_first` only rank 0 is waited for, and
    the others are killed then. The rank `absent` is never started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [
            context.Process(
                target=_one,
                args=(environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, folder, timeout, function, arguments),
            )
            for r in range(world)
            if r != absent
        ]
        for process in processes:
            process.start()
        waited = processes[:1] if of_first else processes
        for process in waited:
            process.join(limit)
        hung = [process.name for process in waited if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not hung, f"{hung} hang"
        files = [Path(folder) / f"{rank}.pt" for rank in range(world) if rank != absent]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def results(found: list[Any]) -> list[Any]:
    """All ranks' results, where none of them failed."""
    for rank, value in enumerate(found):
        assert value is not None, f"rank {rank} died"
        if isinstance(value, BaseException):
            raise AssertionError(f"rank {rank}: {getattr(value, 'trace', value)}") from value
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _one(
    environment: dict[str, str], folder: str, timeout: float, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = int(environment["RANK"])
    try:
        with joined(CPU, timeout, environment) as ranks:
            value = function(ranks, *arguments)
    except Exception as error:
        error.trace = traceback.format_exc()  # type: ignore[attr-defined]
        value = error
    path = Path(folder) / f"{rank}.pt"
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


__all__ = ["CPU", "Ranks", "free_port", "in_ranks", "results"]
