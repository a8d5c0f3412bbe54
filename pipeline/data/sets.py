"""Decoded images in memory: labelled ones, and the pool."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import batch_indices
from pipeline.errors import DataError
from pipeline.seeds import permutation


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images.

    Attributes:
        pixels: uint8, (N, 3, S, S).
        labels: class indices, (N,), int64.
        classes: C.
        distributions: q_large of each, and its embedding where there is one, (N, C + E), where they are stored.
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    distributions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: np.ndarray) -> "LabelledSet":
        """The rows of `index`."""
        chosen = torch.from_numpy(index)
        stored = None if self.distributions is None else self.distributions[chosen]
        return LabelledSet(self.pixels[chosen], self.labels[chosen], self.classes, stored)


class Pool(Protocol):
    """Pool images; each is used `repeat` times in an epoch."""

    def __len__(self) -> int:
        """Images, each counted once."""
        ...

    def draw(self, seed: int, step: int, batch: int, part: slice = ...) -> tuple[Tensor, Tensor | None]:
        """Pixels, uint8 (n, 3, S, S), and what is stored of them, of `part` of the batch of a step.

        That is q_large and, where there is one, the embedding, (n, C + E); None: nothing is.
        """
        ...

    def close(self) -> None:
        """Stop whatever works ahead."""
        ...


@dataclass(frozen=True)
class PoolSet:
    """A pool in memory; the other kind is `pipeline.targets.stream.StreamedPool`.

    Attributes:
        pixels: uint8, (N, 3, S, S).
        repeat: how often each image counts, (N,), int64.
        distributions: as of a `LabelledSet`.
    """

    pixels: Tensor
    repeat: Tensor
    distributions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, seed: int, step: int, batch: int, part: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """As `Pool` says; the order is one permutation of all uses after another."""
        index = batch_indices(len(self._uses), batch, seed, "pool", step)
        rows = self._uses[torch.from_numpy(index[part])]
        return self.pixels[rows], None if self.distributions is None else self.distributions[rows]

    def close(self) -> None:
        """Nothing works ahead."""

    @cached_property
    def _uses(self) -> Tensor:
        """Row numbers, each as often as it counts."""
        return torch.repeat_interleave(torch.arange(len(self.repeat)), self.repeat)


def hold_out(labelled: LabelledSet, share: float, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """(for the student, for the feedback); without a share both are all labelled images.

    Raises:
        DataError: nothing is left to the student.
    """
    n = len(labelled)
    count = round(share * n)
    if not count:
        return labelled, labelled
    if count == n:
        raise DataError(f"feedback.held_out = {share} leaves none of the {n} labelled images to the student")
    order = batch_indices(n, n, seed, "held-out", 0)
    return labelled.rows(np.sort(order[count:])), labelled.rows(np.sort(order[:count]))


def with_wrong_labels(labelled: LabelledSet, share: float, seed: int) -> LabelledSet:
    """Asymmetric label noise: in each class, `share` of the labels say the next class instead."""
    if not share:
        return labelled
    noisy = labelled.labels.clone()
    for c in range(labelled.classes):
        members = np.flatnonzero(labelled.labels.numpy() == c)
        chosen = members[permutation(len(members), seed, "label noise", c)[: round(share * len(members))]]
        noisy[torch.from_numpy(chosen)] = (c + 1) % labelled.classes
    return replace(labelled, labels=noisy)
