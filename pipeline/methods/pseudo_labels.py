"""Pseudo Labels (Lee, ICML workshop 2013): the network's most probable class of a pool image is its label."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from pipeline.methods.method import Lesson, Method, Rows, Views, ramp

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class PseudoLabels(Method):
    """Labels of the present network for weakly augmented pool images, learned on the same images."""

    needs: ClassVar[frozenset[str]] = frozenset({"pool_weak"})

    name: Literal["pseudo_labels"] = "pseudo_labels"
    weight: NonNegativeFloat = 1.0  # of the pool's loss
    threshold: float = Field(default=0.0, ge=0.0, le=1.0)  # pool images below this probability do not count
    ramp_steps: NonNegativeInt = 0  # over which the weight grows from 0

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        import torch.nn.functional as F

        assert views.pool_weak is not None
        q = predict(views.pool_weak)  # (U, C)
        probability, label = q.max(dim=1)
        weight = (probability >= self.threshold).to(q.dtype) * (self.weight * ramp(views.step, self.ramp_steps))
        pool = Rows(views.pool_weak, F.one_hot(label, q.shape[1]).to(q.dtype), weight)
        return Lesson(Rows(views.labelled, views.targets), pool)
