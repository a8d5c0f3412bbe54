"""Several gloo processes on this machine that run one function each, for the tests."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from pipeline.distributed.launch import joined
from pipeline.distributed.ranks import Ranks
from tests.processes import LIMIT

CPU = torch.device("cpu")
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "tests.distributed.training"]


def in_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 600.0,
    absent: int | None = None,
    of_first: bool = False,
) -> list[Any]:
    """What function(ranks, *arguments) returns on each of `world` ranks, or the exception it raised.

    Processes start as forks of a server that has imported torch: a fraction of a second each. They join when all
    have started, and none that succeeds leaves before the others have ended as well: leaving breaks their
    connections. The store is this process's, as it is the agent's under torchrun, so none of them takes it away.
    With `of_first` only rank 0 is waited for, and the others are killed then. The rank `absent` is never started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if absent != 0 else None
    environment = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port() if store is None else store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(store is not None),
    }
    present = [rank for rank in range(world) if rank != absent]
    started = context.Barrier(len(present))
    channels, processes = [], []
    try:
        for rank in present:
            channel, theirs = context.Pipe()
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_one, args=(variables, timeout, started, theirs, function, arguments))
            process.start()
            theirs.close()
            channels.append(channel)
            processes.append(process)
        waited = 1 if of_first else len(present)
        end = time.monotonic() + LIMIT
        values = [_received(channel, end, f"rank {present[i]}") for i, channel in enumerate(channels[:waited])]
        for channel in channels:
            with suppress(OSError):  # of a process that died
                channel.send_bytes(b"leave")
        for process in processes[:waited]:
            process.join(LIMIT)
            assert process.exitcode is not None, f"{process.name} hangs when it leaves"
        return values
    finally:
        for process in processes:
            process.kill()
            process.join()
        for channel in channels:
            channel.close()


def _received(channel: Connection, end: float, who: str) -> Any:
    """The result of a rank; None where it died."""
    assert channel.poll(max(0.0, end - time.monotonic())), f"{who} hangs"
    try:
        return pickle.loads(channel.recv_bytes())
    except (EOFError, ConnectionError):
        return None


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
    environment: dict[str, str], timeout: float, started: Any, channel: Connection, function: Any, arguments: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    started.wait()
    try:
        with joined(CPU, timeout, environment) as ranks:
            channel.send_bytes(pickle.dumps(function(ranks, *arguments)))
            channel.recv_bytes()
    except Exception as error:
        error.trace = traceback.format_exc()  # type: ignore[attr-defined]
        channel.send_bytes(pickle.dumps(error))


__all__ = ["CPU", "Ranks", "free_port", "in_ranks", "results"]
