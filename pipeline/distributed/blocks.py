"""The natural blocks of a network: what is sharded, and run again in the backward pass, as one piece."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Members of its (nested) sequences that are made of layers themselves and have parameters.

    Of a vision transformer these are the transformer blocks, of ResNet and EfficientNet the residual blocks,
    of ConvNeXt the stages; a plain sequence of layers has none.
    """
    blocks: list[nn.Module] = []
    for child in network.children():
        if isinstance(network, (nn.Sequential, nn.ModuleList)) and not isinstance(
            child, (nn.Sequential, nn.ModuleList)
        ):
            if next(child.children(), None) is not None and next(child.parameters(), None) is not None:
                blocks.append(child)
        else:
            blocks += blocks_of(child)
    return blocks


def checkpoint_block(block: nn.Module) -> None:
    """Do not keep this block's activations: run it again in the backward pass, with the same random numbers."""
    if "forward" in vars(block):
        return  # it does so already
    block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    block = forward.__self__
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_first_and_second, block), **named)


def _first_and_second(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_left_alone(block)


@contextmanager
def _statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """The second run must not move the running statistics a second time: it gets copies."""
    layers = [(m, dict(m._buffers)) for m in block.modules() if isinstance(m, _BatchNorm) and m.training]
    for m, buffers in layers:
        m._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for m, buffers in layers:
            m._buffers.update(buffers)
