"""What a method is: it turns the views of one step into a lesson.

The same lesson is learned by a network alone (the baseline) or by the teacher of Meta Pseudo Labels, which
adds its feedback to it (arXiv:2003.10580v4, section 2 and table 10).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor

    Predict = Callable[[Tensor], Tensor]  # images (B, 3, S, S) → probabilities (B, C), without a gradient


@dataclass(frozen=True)
class Views:
    """What one step offers. Pool images are there only where a method or a student asks for them.

    Attributes:
        step: from 0.
        labelled: labelled images in the view that the method asks for, (L, 3, S, S).
        targets: their labels as distributions, with the recipe's label smoothing, (L, C).
        partner: a second draw of labelled images and targets, for methods that mix two; else None.
        uniform: a number in [0, 1) for each labelled image, (L,), the method's own chance.
        pool: the pool images as the student sees them (strong augmentation), (U, 3, S, S), or None.
        pool_weak: the same images, weakly augmented, (U, 3, S, S), or None.
    """

    step: int
    labelled: "Tensor"
    targets: "Tensor"
    partner: "tuple[Tensor, Tensor] | None"
    uniform: "Tensor"
    pool: "Tensor | None"
    pool_weak: "Tensor | None"


@dataclass(frozen=True)
class Rows:
    """Images of one kind with targets.

    Attributes:
        images: (n, 3, S, S).
        targets: (n, C), rows are distributions; constants.
        weight: of each row, (n,); the loss of these rows is the mean of weight · cross-entropy, nats.
    """

    images: "Tensor"
    targets: "Tensor"
    weight: "Tensor | None" = None


@dataclass(frozen=True)
class Lesson:
    """What a network is to learn in one step: the sum of the losses of both kinds of rows.

    Attributes:
        labelled: labelled rows.
        pool: rows of the pool, or None.
    """

    labelled: Rows
    pool: Rows | None = None

    @property
    def kinds(self) -> tuple[Rows, ...]:
        """The labelled rows, and the pool's where there are any."""
        return (self.labelled,) if self.pool is None else (self.labelled, self.pool)

    def images(self) -> "Tensor":
        """All images, labelled ones first, (N, 3, S, S)."""
        import torch

        return self.labelled.images if self.pool is None else torch.cat([rows.images for rows in self.kinds])

    def rows(self) -> "tuple[Tensor, Tensor]":
        """(targets (N, C), weights (N,)) with which the mean over the N rows is the lesson's loss."""
        import torch

        n = sum(len(rows.targets) for rows in self.kinds)
        weights = [
            (torch.ones(len(rows.targets), device=rows.targets.device) if rows.weight is None else rows.weight)
            * (n / len(rows.targets))
            for rows in self.kinds
        ]
        return torch.cat([rows.targets for rows in self.kinds]), torch.cat(weights)

    def loss(self, log_p: "Tensor") -> "Tensor":
        """Mean of weighted cross-entropy over the labelled rows plus the same over the pool's, nats, (); of (N, C)."""
        targets, weight = self.rows()
        return -(weight.to(log_p.dtype) * (targets.to(log_p.dtype) * log_p).sum(dim=1)).mean()


class Method(BaseModel):
    """Settings of one method, and how it makes a lesson. A subclass is a module of this package.

    Class attributes:
        labelled_view: how its labelled images are augmented.
        needs: further views that it uses: pool, pool_weak, partner.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    labelled_view: ClassVar[Literal["weak", "strong"]] = "weak"
    needs: ClassVar[frozenset[str]] = frozenset()

    name: str

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        """The lesson of a step; `predict` is the network that will learn it."""
        raise NotImplementedError


def ramp(step: int, steps: int) -> float:
    """From 0 to 1 over the first `steps` steps, linearly; 1 where steps is 0."""
    return 1.0 if step >= steps else step / steps
