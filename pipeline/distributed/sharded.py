"""Parameters that lie in shards on several processes (FSDP2): each holds a part of every tensor.

FSDP2 makes the parameters of a network DTensors. What happens here is done on each process's own part of
them, in place; the network gathers them for its forward pass, block by block.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor

from pipeline.errors import NonFiniteError


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds its parameters."""
    return next(_sharded_modules(module), None) is not None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def placed_like(whole: Tensor, like: Any) -> Tensor:
    """A whole tensor as this process would hold it: sharded as `like` is."""
    if not hasattr(like, "device_mesh"):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Free what was gathered for a forward pass, so that the next one sees the parameters as they are then.

    FSDP2 leaves the outermost parameters gathered after a forward pass without a backward pass.
    """
    for m in _sharded_modules(module):
        m.reshard()


def sum_over_shards(module: nn.Module, value: Tensor) -> Tensor:
    """The sum of one number per shard over the processes that hold a network's shards; ()."""
    p: Any
    for p in module.parameters():
        if hasattr(p, "device_mesh"):
            total = value.detach().clone()
            for dimension, placement in enumerate(p.placements):
                if placement.is_shard():
                    dist.all_reduce(total, group=p.device_mesh.get_group(dimension))
            return total
    return value


def norm_over_shards(module: nn.Module, tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of tensors of which each process holds its part; ()."""
    square = sum((torch.linalg.vector_norm(t).square() for t in tensors), torch.zeros(()))
    first = next(module.parameters())
    return sum_over_shards(module, torch.as_tensor(square).to(first.device)).sqrt()


def clip_gradients(module: nn.Module, limit: float | None, what: str) -> Tensor:
    """Clip all `.grad` in place to a common L2 norm of `limit` (None: as they are); returns the norm before, ().

    Raises:
        NonFiniteError: the norm is NaN or infinite, on all ranks; the gradients are freed.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if sharded := is_sharded(module):
        gradients = [local(g) for g in gradients]
        norm = norm_over_shards(module, gradients)
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        module.zero_grad(set_to_none=True)
        raise NonFiniteError(f"{what} is {float(norm)}")
    if limit is not None and sharded:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    elif limit is not None:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), limit, norm)
    return norm


def _sharded_modules(module: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in module.modules() if isinstance(m, FSDPModule))
