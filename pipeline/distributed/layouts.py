"""How a network lies on the processes: a copy on each (DDP), or its parameters in shards (FSDP2, hybrid)."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.blocks import blocks_of, checkpoint_block
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.sharded import is_sharded
from pipeline.distributed.sync_batch_norm import synchronise
from pipeline.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """Where parameters, gradients and optimiser state of a network lie.

    Attributes:
        kind: replicated: a copy on every rank (DistributedDataParallel). sharded: each rank holds a part of
            every tensor (FSDP2). hybrid: shards within groups of `shard_size` ranks (a node, say), and copies
            of them between the groups.
        shard_size: ranks of one group of `hybrid`; divides the number of ranks.
        sync_batch_norm: batch statistics over all ranks' images instead of each rank's own.
        checkpoint_activations: keep only what goes into each block, and run blocks again in the backward pass.
    """

    kind: Literal["replicated", "sharded", "hybrid"] = "replicated"
    shard_size: int = 1
    sync_batch_norm: bool = False
    checkpoint_activations: bool = False

    def shards(self, ranks: Ranks) -> bool:
        """Whether a network with this layout lies in shards on these ranks."""
        return ranks.world > 1 and self.kind != "replicated"


def lay_out(network: nn.Module, layout: Layout, ranks: Ranks) -> nn.Module:
    """The network to train, on its device and in the given layout; all ranks start from rank 0's weights.

    Build the optimiser afterwards, over the parameters of `bare(...)` of what is returned: sharding replaces them.
    With one rank only activation checkpointing has an effect.

    Raises:
        UsageError: `shard_size` does not divide the number of ranks.
    """
    prepare(network, layout, ranks)
    if layout.shards(ranks):
        return shard(network, layout, ranks)
    if ranks.world == 1:
        return network
    device = next(network.parameters()).device
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"  # torch < 2.13
    return DistributedDataParallel(
        network,
        device_ids=None if device.type == "cpu" else [device],
        gradient_as_bucket_view=True,
        **{flag: cast(Any, False)},  # Student averages running statistics over the ranks
    )


def lay_out_average(average: nn.Module, layout: Layout, ranks: Ranks) -> nn.Module:
    """The same for a moving average, which is never trained: only sharded, where the network is."""
    return shard(average, layout, ranks) if layout.shards(ranks) else average


def prepare(network: nn.Module, layout: Layout, ranks: Ranks) -> None:
    """What does not wrap the network: synchronised batch statistics, activation checkpointing."""
    if layout.sync_batch_norm and ranks.world > 1:
        synchronise(network)
    if layout.checkpoint_activations:
        for block in blocks_of(network):
            checkpoint_block(block)


@torch.no_grad()
def shard(network: nn.Module, layout: Layout, ranks: Ranks) -> nn.Module:
    """Shard a network in place, block by block, from rank 0's weights."""
    mesh = mesh_of(layout, ranks, next(network.parameters()).device)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 knows no other memory format
    for tensor in (*network.parameters(), *network.buffers()):
        dist.broadcast(tensor.detach(), 0)
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh)
    # The rest too is given up after a forward pass: a look at the network between steps (validation, its
    # average) must see and change the shards.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if mesh.device_type == "cpu":
        for m in network.modules():
            if isinstance(m, FSDPModule) and hasattr(m, "set_force_sum_reduction_for_comms"):
                m.set_force_sum_reduction_for_comms(True)  # older gloo cannot average
    return network


def mesh_of(layout: Layout, ranks: Ranks, device: torch.device) -> DeviceMesh:
    """The mesh of a sharded layout: (shard,) or (replicate, shard).

    Raises:
        UsageError: the groups would not be of one size.
    """
    if layout.kind == "sharded":
        return init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))  # of the group of all
    if layout.shard_size < 1 or ranks.world % layout.shard_size:
        raise UsageError(
            f"shard_size (={layout.shard_size}) must divide the number of processes (={ranks.world}); "
            "the processes of one node are a good choice"
        )
    shape = (ranks.world // layout.shard_size, layout.shard_size)
    grid = torch.arange(ranks.world).view(shape)
    wait = timedelta(seconds=ranks.timeout)  # init_device_mesh would make groups that wait half an hour
    groups: list[Any] = [dist.new_subgroups_by_enumeration(g.tolist(), timeout=wait)[0] for g in (grid.t(), grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


def bare(model: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def average_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Average `.grad` over the ranks, unless the backward pass of its layout has done so."""
    if ranks.world > 1 and _wrapper(model) is None and not is_sharded(model):
        ranks.mean_([p.grad for p in model.parameters() if p.grad is not None])


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context a backward pass of a replicated network adds to the local gradients alone.

    A sharded one reduces each time: keeping whole gradients would cost the memory that sharding saves.
    """
    wrapper = _wrapper(model)
    return nullcontext() if wrapper is None else wrapper.no_sync()


def full_state(network: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Whole parameters and buffers by name, on the CPU of rank 0; {} on the others. All ranks must call it."""
    result = {}
    for name, tensor in network.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if ranks.first:
            result[name] = whole.detach().cpu()
    return result


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers."""
    return [
        buffer
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
        for buffer in (m.running_mean, m.running_var)
        if buffer is not None
    ]


def _wrapper(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        if not hasattr(model, "_orig_mod"):
            return None
        model = cast(nn.Module, model._orig_mod)
    return model
