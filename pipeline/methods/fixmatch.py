"""FixMatch (arXiv:2001.07685): the weak view's most probable class, where it is confident, labels the strong one."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from pipeline.methods.method import Lesson, Method, Rows, Views

if TYPE_CHECKING:
    from pipeline.methods.method import Predict


class FixMatch(Method):
    """Hard labels of the weak view as targets of the strong view."""

    needs: ClassVar[frozenset[str]] = frozenset({"pool", "pool_weak"})

    name: Literal["fixmatch"] = "fixmatch"
    weight: NonNegativeFloat = 1.0
    threshold: float = Field(default=0.95, ge=0.0, le=1.0)

    def lesson(self, views: Views, predict: "Predict") -> Lesson:
        import torch.nn.functional as F

        assert views.pool is not None
        assert views.pool_weak is not None
        q = predict(views.pool_weak)  # (U, C)
        probability, label = q.max(dim=1)
        weight = (probability >= self.threshold).to(q.dtype) * self.weight
        pool = Rows(views.pool, F.one_hot(label, q.shape[1]).to(q.dtype), weight)
        return Lesson(Rows(views.labelled, views.targets), pool)
