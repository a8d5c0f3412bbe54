"""A network's classes: what its files call them, and its outputs in the order of a data set's."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.classes import ClassNames, canonical, same_names
from pipeline.errors import DataError
from pipeline.networks.network import Network


class Reordered(nn.Module):
    """A classifier whose outputs stand in another order.

    Args:
        model: images → logits (B, C).
        order: for each output here its place among the model's, (C,).
    """

    def __init__(self, model: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("order", torch.tensor(order))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.order]


def order_of(network_names: Sequence[str], names: Sequence[str], where: str) -> list[int]:
    """For each class of a data set the network's output that is it, (C,).

    Raises:
        DataError: the classes are not the same, whatever their order.
    """
    if not same_names(network_names, names):
        lacks = [name for name in names if canonical(name) not in map(canonical, network_names)]
        more = [name for name in network_names if canonical(name) not in map(canonical, names)]
        raise DataError(
            f"{where} has other classes than the data set: {len(network_names)} against {len(names)}"
            + (f"; it lacks {', '.join(lacks[:5])}{', …' if len(lacks) > 5 else ''}" if lacks else "")
            + (f"; the data set lacks {', '.join(more[:5])}{', …' if len(more) > 5 else ''}" if more else "")
        )
    places = ClassNames(tuple(names), where).places(network_names, where)
    return [places.index(label) for label in range(len(names))]


def order_or_assumed(
    stated: Sequence[str] | None, outputs: int, names: Sequence[str], where: str, assume_order: bool
) -> list[int]:
    """As `order_of`, for a network that may not name its classes.

    Args:
        stated: its names, None if it has none.
        outputs: how many it has.
        names, where: as in `order_of`.
        assume_order: whether outputs without names are in the data set's order.

    Raises:
        DataError: its classes are others; or it names none, and nobody said that the order is right.
    """
    if stated is not None:
        return order_of(stated, names, where)
    if outputs != len(names):
        raise DataError(f"{where} has {outputs} classes, the data set {len(names)}")
    if not assume_order:
        raise DataError(
            f"{where} does not say which classes its {len(names)} outputs are; in a wrong order every label would "
            f"be wrong. Write them into its config.json as `label_names`; or, if they are in the data set's order "
            f"({', '.join(names[:5])}{', …' if len(names) > 5 else ''}): --assume-class-order"
        )
    return list(range(len(names)))


def with_classes_of(network: Network, names: Sequence[str], where: str, assume_order: bool = False) -> Network:
    """The network with its outputs in the order of a data set's classes, which are compared by name.

    Args:
        network: as loaded.
        names: of the data set, in the order of its labels, (C,).
        where: the network, for messages.
        assume_order: take a network that names no classes for one whose outputs are in that order.

    Raises:
        DataError: its classes are others; or it names none, and nobody said that the order is right.
    """
    stated = network.class_names if network.states_classes else None
    order = order_or_assumed(stated, len(network.class_names), names, where, assume_order)
    model = network.model if order == list(range(len(names))) else Reordered(network.model, order)
    return replace(network, model=model, class_names=list(names), states_classes=True)
