"""The tensors of networks and optimisers by name, whatever their layout, for saving and for filling in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.distributed.layouts import bare
from pipeline.distributed.sharded import reshard
from pipeline.errors import CheckpointError

Networks = Mapping[str, tuple[nn.Module, Optimizer | None]]  # by a label that is kept with the checkpoint
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def tensors_of(networks: Networks) -> dict[str, Tensor]:
    """All tensors of networks and optimisers by name; each process's view of a sharded one.

    Parameters and buffers are `label/network/NAME`, an optimiser's are `label/optimizer/NAME/KEY` with the name of
    the parameter: they do not depend on the layout, or on how the optimiser groups them. Its settings are not kept.
    """
    found: dict[str, Tensor] = {}
    for label, (model, optimizer) in networks.items():
        network = bare(model)
        reshard(network)
        found |= {f"{label}/network/{name}": t.detach() for name, t in network.state_dict().items()}
        if optimizer is not None:
            found |= {
                f"{label}/optimizer/{name}/{key}": torch.as_tensor(value)
                for name, p in network.named_parameters()
                for key, value in optimizer.state.get(p, {}).items()
                if value is not None
            }
    return found


@contextmanager
def restoring(networks: Networks, stored: Shapes) -> Iterator[dict[str, Tensor]]:
    """Tensors to be filled with what is stored: the networks' own, and new ones for the optimisers.

    On a clean exit the new ones become the optimisers' state; before it, that is as it was.

    Raises:
        CheckpointError: names or shapes differ from what is stored.
    """
    into: dict[str, Tensor] = {}
    new: list[tuple[Optimizer, Tensor, str, Tensor]] = []
    for label, (model, optimizer) in networks.items():
        network = bare(model)
        reshard(network)
        into |= {f"{label}/network/{name}": t.detach() for name, t in network.state_dict().items()}
        if optimizer is not None:
            for name, p in network.named_parameters():
                prefix = f"{label}/optimizer/{name}/"
                for full in (n for n in stored if n.startswith(prefix)):
                    shape, dtype = stored[full]
                    if shape == p.shape:
                        into[full] = torch.empty_like(p.detach(), dtype=dtype)
                    else:  # a count of steps, say
                        into[full] = torch.empty(shape, dtype=dtype)
                    new.append((optimizer, p, full.removeprefix(prefix), into[full]))
    _check(into, stored)
    yield into
    for _, optimizer in networks.values():
        if optimizer is not None:
            optimizer.state.clear()
    for owner, parameter, key, tensor in new:
        owner.state[parameter][key] = tensor


def _check(into: dict[str, Tensor], stored: Shapes) -> None:
    wrong = sorted(into.keys() ^ stored.keys()) or [name for name, t in into.items() if t.shape != stored[name][0]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"it is of another network or optimiser: {', '.join(wrong[:3])}{more} differ; train with the model and "
            "the optimiser that it was saved with, or start again with --force"
        )
