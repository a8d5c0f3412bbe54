"""Joining the processes that torchrun started, and leaving them."""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.ranks import ALONE, Ranks, absent
from pipeline.errors import RanksError, UsageError

KEPT: list[Any] = []  # groups that were left
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that torchrun (or the like) started."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


def processes_here(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of this training on this node, which share its memory."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def device_of_this_rank(device: torch.device, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The accelerator of this process on its node, by LOCAL_RANK; the CPU stays the CPU.

    Raises:
        UsageError: the node has fewer accelerators than processes.
    """
    if device.type == "cpu" or not is_launched(environment):
        return device
    index, count = int(environment.get("LOCAL_RANK", "0")), torch.get_device_module(device).device_count()
    if not count:
        raise UsageError(f"no {device.type} device is here for process {index} of this node; use --device cpu")
    if index >= count:
        raise UsageError(
            f"process {index} of this node wants an accelerator of its own, but there are {count} ({device.type}); "
            f"start torchrun with --nproc-per-node={count}, or use --device cpu"
        )
    return torch.device(device.type, index)


@contextmanager
def joined(
    device: torch.device, timeout: float = 600.0, environment: Mapping[str, str] = os.environ
) -> Iterator[Ranks]:
    """The processes of this training; `ALONE` if there is one. At the end it leaves the others and reports an error."""
    ranks = start(device, timeout, environment)
    try:
        with ranks.reporting():
            yield ranks
    finally:
        leave(ranks)


def leave(ranks: Ranks) -> None:
    """Leave the other processes; a network distributed over them cannot be used afterwards.

    The groups are kept in memory to the end of the process: a gloo group that is freed by Python waits for its
    threads, and these may wait for Python to free the tensors of the last message (a deadlock seen at the end of
    DistributedDataParallel, torch 2.8).
    """
    if ranks.world > 1 and dist.is_initialized():
        KEPT.extend(getattr(dist.distributed_c10d._world, "pg_map", ()))
        dist.destroy_process_group()


def start(device: torch.device, timeout: float = 600.0, environment: Mapping[str, str] = os.environ) -> Ranks:
    """Join the other processes, as torchrun's environment names them.

    Args:
        device: where this process computes (`device_of_this_rank`): gradients go over NCCL between CUDA
            devices, over gloo between CPUs. Agreements always go over gloo.
        timeout: seconds that a rank waits for the others, here and in every collective.
        environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them.

    Raises:
        UsageError: the environment is incomplete, or this torch cannot talk between such devices.
        RanksError: naming the ranks that did not come in time.
    """
    if not is_launched(environment):
        return ALONE
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    except KeyError as error:
        raise UsageError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {error.args[0]} is not set; start several processes "
            "with torchrun, or unset WORLD_SIZE"
        ) from None
    backend = backend_of(device)
    store, launch = _store(environment, rank, world, host, port, timeout)
    store = _keys_of_this_attempt(store, rank, world, timeout)
    wait = timedelta(seconds=timeout)
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=wait,
        device_id=None if device.type == "cpu" else device,
    )
    group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=wait)
    return Ranks(rank, world, timeout, group, store, launch)


def _keys_of_this_attempt(store: Any, rank: int, world: int, timeout: float) -> Any:
    """The part of the store that this attempt alone uses, once all ranks have come.

    Raises:
        RanksError: as `start`.
    """
    try:
        keys, missing = _meet_all(store, world, timeout) if rank == 0 else _meet(store, rank, world, timeout)
    except RuntimeError as error:
        raise RanksError(f"rank {rank}: rank 0 has given up, or died; its own output says why") from error
    if missing:
        names = ", ".join(map(str, missing))
        raise RanksError(
            f"rank {rank}: of {world} processes {world - len(missing)} came within {timeout:g} s; missing: {names}. "
            "Were all nodes started, and does --nnodes × --nproc-per-node fit?"
        )
    return keys


def _meet_all(store: Any, world: int, timeout: float) -> tuple[Any, list[int]]:
    """Rank 0: (keys of this attempt alone, ranks that did not come).

    torchrun's agents keep one store for all attempts, and each counts restarts for itself: nothing that they
    give distinguishes the attempts. So each rank says hello with a new token, and rank 0 answers every token that
    it finds with the name of its session; the answer to a token of an earlier attempt is never read.
    """
    session = uuid.uuid4().hex
    keys = dist.PrefixStore(session, store)
    keys.set("here/0", "1")
    end = time.monotonic() + timeout
    while missing := [rank for rank in range(world) if not keys.check([f"here/{rank}"])]:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}/0", session)
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return keys, missing


def _meet(store: Any, rank: int, world: int, timeout: float) -> tuple[Any, list[int]]:
    """The same on another rank."""
    token = uuid.uuid4().hex
    store.set(f"hello/{rank}", token)
    if missing := absent(store, f"welcome/{token}", 1, timeout):
        return store, missing
    keys = dist.PrefixStore(store.get(f"welcome/{token}/0").decode(), store)
    keys.set(f"here/{rank}", "1")
    return keys, absent(keys, "here", world, timeout)


def backend_of(device: torch.device) -> str:
    """How processes on such devices exchange tensors.

    Raises:
        UsageError: this torch cannot, or there is no such device.
    """
    backend = BACKENDS.get(device.type)
    if backend is None:
        raise UsageError(f"several processes can work on {', '.join(BACKENDS)}, not on {device.type}; use --device cpu")
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        raise UsageError(f"no {device.type} device is here for this process; use --device cpu (over gloo)")
    if not dist.is_backend_available(backend):
        raise UsageError(
            f"{device.type} devices talk over {backend}, which this torch {torch.__version__} was built without; "
            "install a build that has it, or use --device cpu (over gloo)"
        )
    return backend


def _store(
    environment: Mapping[str, str], rank: int, world: int, host: str, port: int, timeout: float
) -> tuple[Any, str]:
    """(keys that all ranks see, the same for all attempts of a torchrun; a name for these attempts)."""
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            world,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise RanksError(
            f"rank {rank}: no answer from rank 0's node at {host}:{port} within {timeout:g} s; rank 0 is missing, or "
            "another process holds that port"
        ) from error
    keys = dist.PrefixStore("mpl", store)
    name = uuid.uuid4().hex if agent else environment.get("TORCHELASTIC_RUN_ID", uuid.uuid4().hex)
    return keys, keys.compare_set("launch", "", name).decode()
