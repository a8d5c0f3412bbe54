"""Unsupervised Data Augmentation (arXiv:1904.12848): the prediction for the weak view teaches the strong one."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from pipeline.methods.method import Lesson, Method, Rows, Views, ramp

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class Uda(Method):
    """Sharpened distributions of the weak view, where they are confident, as targets of the strong view."""

    needs: ClassVar[frozenset[str]] = frozenset({"pool", "pool_weak"})

    name: Literal["uda"] = "uda"
    weight: NonNegativeFloat = 1.0  # "UDA factor" of the paper's table 3
    temperature: PositiveFloat = 0.8  # targets are p^(1/T), renormalised
    threshold: float = Field(default=0.0, ge=0.0, le=1.0)  # of the weak view's largest probability (0.6 at Google)
    ramp_steps: NonNegativeInt = 0  # over which the weight grows from 0

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        assert views.pool is not None
        assert views.pool_weak is not None
        q = predict(views.pool_weak)  # (U, C)
        sharp = (q.log() / self.temperature).softmax(dim=1)
        weight = (q.amax(dim=1) >= self.threshold).to(q.dtype) * (self.weight * ramp(views.step, self.ramp_steps))
        return Lesson(Rows(views.labelled, views.targets), Rows(views.pool, sharp, weight))
