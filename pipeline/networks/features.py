"""What a classifier's last linear layer sees of images."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pipeline.errors import DataError


@contextmanager
def last_layer_seen(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it is entered, every forward adds the inputs (n, D) of the last linear layer, float32 on the CPU.

    Raises:
        DataError: the network has no linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise DataError("the network has no linear layer, whose inputs would be its features")
    seen: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float().cpu()))
    try:
        yield seen
    finally:
        handle.remove()
