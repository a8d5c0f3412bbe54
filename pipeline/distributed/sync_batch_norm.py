"""Batch normalisation over the images of all ranks, with a forward-mode derivative.

torch's SyncBatchNorm works on accelerators alone and has no such derivative, so that feedback through it would
need finite differences. Here the statistics are sums over the ranks, and a sum's derivatives, in either
direction, are again sums over the ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import UsageError


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all ranks' images while training."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input) if self.training else super().forward(input)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d`, likewise."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input) if self.training else super().forward(input)


class SyncBatchNormAct2d(BatchNormAct2d):
    """timm's normalisation with an activation, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalise(self, x))) if self.training else super().forward(x)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    BatchNormAct2d: SyncBatchNormAct2d,
}


def synchronise(network: nn.Module) -> None:
    """Make the BatchNorm layers of a network synchronised ones, in place; parameters and names stay.

    Raises:
        UsageError: there is a kind of batch normalisation among them that cannot be.
    """
    for name, m in network.named_modules():
        if type(m) in KINDS:
            m.__class__ = KINDS[type(m)]
        elif isinstance(m, _BatchNorm) and not isinstance(m, (nn.SyncBatchNorm, *KINDS.values())):
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise UsageError(
                f"sync_batch_norm knows {known}, but {name} is a {type(m).__name__}; switch sync_batch_norm off, or "
                "make it one of those"
            )


class SumOverRanks(torch.autograd.Function):
    """Σ over ranks of a tensor; its derivatives are sums over ranks too."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.forward(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return SumOverRanks.forward(tangent)


def _normalise(layer: Any, x: Tensor) -> Tensor:
    """x (B, C, …) with mean 0 and variance 1 over all ranks' images, scaled and shifted; at least in float32."""
    others = [d for d in range(x.ndim) if d != 1]

    def along_channels(t: Tensor) -> Tensor:
        return t.view(-1, *[1] * (x.ndim - 2))  # (C, 1, …)

    precise = x if x.dtype == torch.float64 else x.float()
    n = x.numel() / x.shape[1] * dist.get_world_size()  # equal parts, as everywhere
    mean = SumOverRanks.apply(precise.sum(dim=others)) / n  # (C,)
    centred = precise - along_channels(mean)
    variance = SumOverRanks.apply(centred.square().sum(dim=others)) / n  # (C,)
    if layer.track_running_stats:
        _track(layer, mean.detach(), variance.detach() * (n / (n - 1)))
    scale = torch.rsqrt(variance + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    result = centred * along_channels(scale)
    return (result if layer.bias is None else result + along_channels(layer.bias)).to(x.dtype)


@torch.no_grad()
def _track(layer: Any, mean: Tensor, variance: Tensor) -> None:
    """Running statistics as `nn.BatchNorm2d` keeps them."""
    layer.num_batches_tracked.add_(1)
    momentum = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean), momentum)
    layer.running_var.lerp_(variance.to(layer.running_var), momentum)
