"""Joining the processes that torchrun started, and leaving them."""

import os
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


def device_of_this_rank(device: torch.device, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The accelerator of this process on its node, by LOCAL_RANK; the CPU stays the CPU.

    Raises:
        UsageError: the node has fewer accelerators than processes.
    """
    if device.type == "cpu" or not is_launched(environment):
        return device
    index, found = int(environment.get("LOCAL_RANK", "0")), torch.get_device_module(device).device_count()
    if index >= found:
        raise UsageError(
            f"process {index} of this node wants an accelerator of its own, but there are {found} ({device.type}); "
            f"start torchrun with --nproc-per-node={max(1, found)}, or use --device cpu"
        )
    return torch.device(device.type, index)


@contextmanager
def joined(
    device: torch.device, timeout: float = 600.0, environment: Mapping[str, str] = os.environ
) -> Iterator[Ranks]:
    """The processes of this training; `ALONE` where there is one. Leaves them at the end."""
    ranks = start(device, timeout, environment)
    try:
        yield ranks
    finally:
        leave(ranks)


def leave(ranks: Ranks) -> None:
    """Leave the other processes; nothing that was laid over them can be used afterwards.

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
    store = _store(environment, rank, world, host, port, timeout)
    store.set(f"here/{rank}", "1")
    try:
        missing = absent(store, "here", world, timeout)
    except RuntimeError as error:
        raise RanksError(f"rank {rank}: rank 0 has given up, or died; its own output says why") from error
    if missing:
        names = ", ".join(map(str, missing))
        raise RanksError(
            f"rank {rank}: of {world} processes {world - len(missing)} came within {timeout:g} s; missing: {names}. "
            "Were all nodes started, and does --nnodes × --nproc-per-node fit?"
        )
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
    return Ranks(rank, world, timeout, group, store)


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


def _store(environment: Mapping[str, str], rank: int, world: int, host: str, port: int, timeout: float) -> Any:
    """Keys that all ranks see, fresh for each attempt of torchrun."""
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
    return dist.PrefixStore(f"mpl/attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
