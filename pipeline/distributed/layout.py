"""How a network lies on the processes: a copy on each (DDP), or its parameters in shards (FSDP2, hybrid)."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def bare(model: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def averages_gradients(model: nn.Module) -> bool:
    """Whether its backward pass leaves gradients that are averaged over the ranks."""
    return isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)


def unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context a backward pass adds to the local gradients without talking to other ranks."""
    model = getattr(model, "_orig_mod", model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of the normalisation layers."""
    return [
        buffer
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
        for buffer in (m.running_mean, m.running_var)
        if buffer is not None
    ]
